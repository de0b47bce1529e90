"""Values of the released codes of the methods that both papers compare with, reached through public functions only.

Values agree to 1e-9 and gradients to 1e-8, as in `test_golden.py`.
"""

import torch

from perceptual_at import kl_divergence
from perceptual_at.attacks import cross_entropy
from perceptual_at.weight_perturbation import ascend, restore
from tests.golden import cases, close, inputs

# AWP --------------------------------------------------------------------------------------------------------------


@cases("awp", only=lambda c: "gamma" in c["hyperparameters"])
def test_awp_moves_weights_and_takes_its_step_as_released(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    model, x, x_adv, labels = given["model"].train(), given["x"], given["x_adv"], given["labels"]
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def loss():
        if h["beta"] is None:
            return cross_entropy(model(x_adv), labels).mean()
        clean, adv = model(x), model(x_adv)
        return cross_entropy(clean, labels).mean() + h["beta"] * kl_divergence(clean, adv).mean()

    moved = ascend(model, loss, size=h["gamma"])
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name])
    for name, diff in expected["diff"].items():
        close(moved.move[name] / h["gamma"], diff)
    assert moved.move.keys() == expected["diff"].keys()
    for name, value in expected["perturbed_weights"].items():
        close(model.state_dict()[name], value)
    close(cross_entropy(model(x_adv), labels).mean(), expected["ce_x_adv_train_mode_at_perturbed_weights"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.001)  # in place of the optimiser's step
    restore(model, moved, form="awp")
    for name, value in expected["restored_weights"].items():
        close(model.state_dict()[name], value)


@cases("awp", only=lambda c: "nb_iter" in c["hyperparameters"])
def test_awps_second_version_takes_steps_as_released(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    model, x_adv, labels = given["model"].train(), given["x_adv"], given["labels"]
    ascend(model, lambda: cross_entropy(model(x_adv), labels).mean(), size=h["eta"], steps=h["nb_iter"],
           parameters="matrices")  # fmt: skip
    for name, value in expected["perturbed_weights"].items():
        if "num_batches" not in name and "running" not in name:
            close(model.state_dict()[name], value)
