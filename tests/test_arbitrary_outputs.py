"""Diagnostics and theory of `h: x -> any tensor`: dense outputs, one number per sample, dicts through the adapter."""

import functools
import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from perceptual_at import Linf, apgd, objectives, pgd, sanity_checks, theory
from perceptual_at.diagnostics import PerceptionGap, perception_gap, perception_path
from perceptual_at.metrics import pixel_accuracy
from perceptual_at.models import UNet, logits_of, perceive_at
from tests.strategies import integers, normal, uniform

exactly = functools.partial(assert_close, rtol=1e-9, atol=1e-10)


class Dense(nn.Module):
    """Two classes at each pixel."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.activation = nn.Conv2d(1, 2, 3, padding=1), activation
        self.second = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        return self.second(self.activation(self.first(x)))


class Packed(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return {"out": self.network(x), "aux": x}


def dense(activation=None):
    torch.manual_seed(0)
    return Dense(nn.GELU() if activation is None else activation).double().eval()


KINDS = {
    "dense": lambda network: (network, nn.Sequential(network, nn.Flatten()).eval()),
    "dict": lambda network: (logits_of(Packed(network), "out").eval(), nn.Sequential(network, nn.Flatten()).eval()),
    "number": lambda network: (lambda x: network(x).flatten(1).sum(1), lambda x: network(x).flatten(1).sum(1, True)),
}
x, other = uniform(0, 2, 1, 3, 3), uniform(1, 2, 1, 3, 3)
delta, delta2 = normal(2, *x.shape, scale=0.5), normal(3, *x.shape, scale=0.5)
GIVEN = {
    "x": x, "delta": delta, "alphas": [0.25, 0.5], "u": delta, "v": delta2, "x1": x, "x2": other, "delta1": delta,
    "delta2": delta2, "mix": 0.3, "lipschitz": 100.0,
}  # fmt: skip
OF_A_MAP = [
    name for name in theory.__all__
    if inspect.isfunction(getattr(theory, name)) and "h" in inspect.signature(getattr(theory, name)).parameters
]  # fmt: skip
PIECEWISE_LINEAR = {"kinks", "kink_identity", "count_activation_flips"}


def flat(value):
    """All numbers of a result, in their order."""
    if isinstance(value, torch.Tensor):
        return value.double().reshape(-1)
    if isinstance(value, tuple):
        return torch.cat([flat(part) for part in value]) if value else torch.zeros(0)
    return torch.tensor([float(value)]) if isinstance(value, int | float) else torch.zeros(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OF_A_MAP)
def test_theory_sees_no_shape_in_the_outputs(name, kind):
    function = getattr(theory, name)
    parameters = inspect.signature(function).parameters
    given = {key: GIVEN[key] for key, p in parameters.items() if key in GIVEN and p.default is p.empty}
    if name == "residual_certificate":
        given["curvature"] = torch.tensor([3.0, 4.0])
    maps = KINDS[kind](dense(nn.ReLU() if name in PIECEWISE_LINEAR else None))
    results = []
    for h in maps:
        if "generator" in parameters:
            given["generator"] = torch.Generator().manual_seed(0)
        results.append(flat(function(h, **given)))
    assert results[0].numel()
    exactly(*results)


def test_theory_says_how_to_take_a_tensor_out_of_a_dict():
    with pytest.raises(TypeError, match=r"segment_residual: `h` must return .* got dict; `models.logits_of"):
        theory.segment_residual(Packed(dense()), x, delta, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perception_path_is_that_of_the_flat_outputs(kind):
    exactly(*(perception_path(h, x, x + delta, [0.0, 0.5, 1.0]) for h in KINDS[kind](dense())))


def moved(model, x, labels):
    return x + 0.1


def test_a_gap_of_dense_outputs_weighs_samples_by_their_shares():
    network, labels = dense(), integers(4, 2, 3, 3, below=2)
    labels[0, 0] = -100
    gap = perception_gap(network, [(x, labels)], moved)
    exactly(gap.defended.double(), pixel_accuracy(network(x + 0.1), labels).double())
    exactly(gap.distance, (network(x + 0.1) - network(x)).square().flatten(1).mean(dim=1))
    share = gap.defended.double()
    assert 0 < share.mean() < 1
    assert gap.success == pytest.approx(float((gap.distance * share).sum() / share.sum()))
    assert gap.failure == pytest.approx(float((gap.distance * (1 - share)).sum() / (1 - share).sum()))
    assert gap.robust_accuracy == pytest.approx(float(share.mean()))


def test_a_gap_takes_any_task_by_its_score_and_an_inner_perception():
    network = UNet(width=2, num_classes=2).eval()
    images, labels = x.float()[..., :2, :2].repeat(1, 1, 2, 2), integers(4, 2, 4, 4, below=2)
    attack = functools.partial(pgd, threat=Linf(0.1), steps=1)
    gap = perception_gap(network, [(images, labels)], attack, perceive=perceive_at(network, "second_to_last"))
    assert gap.distance.shape == (2,)
    own = perception_gap(lambda z: z.flatten(1), [(x, labels)], moved, score=lambda z, _: (z[:, 0] > 0.5).double())
    assert_close(own.distance, torch.full((2,), 0.01).double())
    assert PerceptionGap(own.distance, own.defended, own.correct) == own


def test_samples_without_a_number_are_not_defended():
    def undefined(z):
        return torch.stack([z.flatten(1)[:, 0] * torch.nan, z.flatten(1)[:, 0]], dim=1)

    assert perception_gap(undefined, [(x, torch.tensor([0, 1]))], moved).robust_accuracy == 0


def test_outputs_that_are_no_tensors_are_named():
    with pytest.raises(TypeError, match=r"perception_path: `model` must return a torch.Tensor, got dict.*logits_of"):
        perception_path(Packed(dense()), x, x, [0.5])
    with pytest.raises(TypeError, match=r"perception_path: `model` must return a floating-point tensor with 2 rows"):
        perception_path(lambda z: z.flatten(1).argmax(1), x, x, [0.5])
    with pytest.raises(ValueError, match=r"perception_gap: .* with 2 rows, got torch.float64 of shape \(1, 9\)"):
        perception_gap(lambda z: z.flatten(1)[:1], [(x, torch.tensor([0, 1]))], moved)
    with pytest.raises(TypeError, match=r"perception_gap: .* got dict"):
        perception_gap(Packed(dense()), [(x, torch.tensor([0, 1]))], moved)


# Several labels at once -------------------------------------------------------------------------------------------


def several():
    """A network of three attributes, images, which attributes they have, and the loss of these."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).double()
    loss = functools.partial(nn.functional.binary_cross_entropy_with_logits, reduction="none")
    return network, uniform(0, 4, 1, 3, 3), integers(0, 4, 3, below=2).double(), lambda z, y: loss(z, y).mean(dim=1)


SOFT = {
    "pgd_at": {}, "trades": {}, "consistency_at": {}, "standard": {}, "random_noise": {"threat": Linf(0.1)},
    "rebat": {"average": None}, "rpat": {}, "rpat_plus_plus": {"average": None}, "kd": {},
}  # fmt: skip


@pytest.mark.parametrize("name", SOFT)
def test_objectives_that_take_probabilities_take_no_other_numbers(name):
    network, x, present, loss = several()
    options = SOFT[name] if name != "kd" else dict.fromkeys(("standard_teacher", "robust_teacher"), network)
    attack = (
        (lambda model, x, labels, **_: x) if name == "trades" else functools.partial(pgd, threat=Linf(0.1), loss=loss)
    )
    views = (x, x) if name == "consistency_at" else (x,)
    with pytest.raises(ValueError, match="`labels` of a floating dtype must be class probabilities"):
        getattr(objectives, name)(network, views, present, attack, **options)


def test_a_base_of_ones_own_takes_labels_of_any_kind():
    network, x, present, loss = several()

    def base(model, views, labels, attack):
        value = loss(model(attack(model, views[0], labels)), labels).mean()
        return value, {"attributes": value.detach()}

    attack = functools.partial(pgd, threat=Linf(0.1), loss=loss)
    assert list(objectives.rpat(network, (x,), present, attack, base=base)[1]) == ["attributes", "robust_perception"]


def test_what_other_tasks_cannot_have_is_said():
    network, x, present, loss = several()
    for options in ({"verdict": True}, {"keep": "best", "early_stop": True}):
        with pytest.raises(TypeError, match=r"^pgd: .*success is a matter of one class per sample"):
            pgd(network, x, present, Linf(0.1), loss=loss, **options)
    with pytest.raises(TypeError, match=r"^apgd: .*`pgd` and `fgsm` without `verdict`"):
        apgd(network, x, present, Linf(0.1), loss=loss)
    with pytest.raises(TypeError, match=r"^sanity_checks: .*other tasks are for `evaluate` with a `score`"):
        sanity_checks(network, x, present, Linf(0.1))
    each = functools.partial(nn.functional.binary_cross_entropy_with_logits, reduction="none")
    with pytest.raises(ValueError, match=r"got shape \(4, 3\); take the mean over the others"):
        pgd(network, x, present, Linf(0.1), loss=each)
