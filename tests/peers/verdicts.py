"""Verdicts and evaluation."""

import tempfile
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch.testing import assert_close

from perceptual_at import (
    L1,
    Linf,
    accuracy,
    evaluate,
    fgsm,
    frozen,
    n_fgsm,
    pgd,
    quantize,
    sanity_checks,
    still_adversarial,
)
from perceptual_at.diagnostics import perception_path
from tests.peers.listing import (
    ATTACKS,
    NORMS,
    Images,
    expected,
    flat_case,
    images,
    is_inside,
    points,
    threat_of,
)


@expected("foolbox", "points and their success come together", attack=ATTACKS, kind=NORMS)
def _(attack, kind):
    x, labels = images()
    model = Images().eval()
    verdict = attack(model, x, labels, threat_of(kind, 2.0), verdict=True)
    assert verdict.x_adv.shape == x.shape
    assert verdict.success.dtype == torch.bool
    assert torch.equal(verdict.success, model(verdict.x_adv).argmax(dim=1) != labels)


@expected(
    "AutoAttack, foolbox",
    "samples that are wrong already count as broken",
    attack={name: attack for name, attack in ATTACKS.items() if name != "fgsm"},
)
def _(attack):
    x, labels = images()
    verdict = attack(Images().eval(), x, (labels + 1) % 4, Linf(1e-6), verdict=True)
    assert bool(verdict.success.all())


@expected("foolbox, RobustBench", "accuracy is a share, and 1 on a model's own predictions")
def _():
    model, x, labels = flat_case()
    assert float(accuracy(model(x), labels)) == 1.0
    assert float(accuracy(model(x), (labels + 1) % 4)) == 0.0
    assert 0 <= float(accuracy(model(x), torch.arange(8) % 4)) <= 1


@expected(
    "RobustBench", "clean accuracy does not depend on the size of the batches", size={str(n): n for n in (1, 3, 8)}
)
def _(size):
    model, x, labels = flat_case()
    wrong = torch.where(torch.arange(8) < 3, (labels + 1) % 4, labels)
    result = evaluate(model, list(zip(x.split(size), wrong.split(size), strict=True)), {}, progress=False)
    assert result.clean_accuracy == 5 / 8


@expected("RobustBench, foolbox", "evaluating a model in train mode judges it in eval mode and gives it back")
def _():
    x, labels = images()
    model = Images().train()
    assert evaluate(model, [(x, labels)], {}, progress=False).clean_accuracy == 1.0
    assert all(part.training for part in model.modules())


@expected("cleverhans, AutoAttack", "only samples that are still right are attacked")
def _():
    model, x, labels = flat_case()
    labels = torch.where(torch.arange(8) % 2 == 0, (labels + 1) % 4, labels)
    sizes = []
    attack = lambda f, x, labels: sizes.append(len(x)) or x  # noqa: E731
    evaluate(model, [(x, labels)], {"none": attack}, progress=False)
    assert sizes == [4]


@expected("torchattacks, AutoAttack, cleverhans", "the worst case over attacks counts what any of them breaks")
def _():
    model, x, labels = flat_case(n=16)
    attacks = {"small": partial(fgsm, threat=Linf(0.02)), "sparse": partial(pgd, threat=L1(0.5), steps=3)}
    result = evaluate(model, [(x, labels)], attacks, progress=False)
    assert result.worst_case == float((result.robust["small"] & result.robust["sparse"]).double().mean())


@expected("torchattacks, AutoAttack", "attacks in a row run on what the ones before left")
def _():
    model, x, labels = flat_case()
    sizes = []
    attack = lambda f, x, labels: sizes.append(len(x)) or x  # noqa: E731
    attacks = {"first": partial(pgd, threat=Linf(0.1), steps=3), "second": attack}
    result = evaluate(model, [(x, labels)], attacks, progress=False, cascade=True)
    assert sum(sizes) == int(result.robust["first"].sum())


class Counted:
    """Moves nothing, and notes how many samples it was asked for; a copy is the same attack."""

    asked: ClassVar[list[int]] = []

    def __call__(self, model, x, labels):
        type(self).asked.append(len(x))
        return x


@expected("cleverhans, AutoAttack", "an evaluation that was cut short goes on where it stopped")
def _():
    model, x, labels = flat_case()
    Counted.asked.clear()
    with tempfile.TemporaryDirectory() as folder:
        for batches in ([(x[:4], labels[:4])], [(x[:4], labels[:4]), (x[4:], labels[4:])]):
            result = evaluate(model, batches, {"none": Counted()}, progress=False, record=Path(folder) / "run.jsonl")
            seen, Counted.asked = [*Counted.asked], []
            assert seen == [4]
    assert len(result.correct) == 8


@expected("torchattacks", "points saved as bytes are read back inside the ball", kind=NORMS)
def _(kind):
    model, x, labels = flat_case()
    x, threat = (255 * x).round() / 255, threat_of(kind)
    x_adv = pgd(model, x, labels, threat, steps=4)
    saved = (255 * quantize(x_adv, x, threat)).round().to(torch.uint8)
    assert is_inside(threat, saved.float() / 255, x)
    assert still_adversarial(model, saved.float() / 255, labels).shape == (8,)


@expected("torchattacks", "batches of a loader are attacked one after the other")
def _():
    model, x, labels = flat_case()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=3)
    result = evaluate(model, loader, {"fgsm": partial(fgsm, threat=Linf(0.1))}, progress=False)
    assert len(result.robust["fgsm"]) == 8


@expected("RobustBench", "the steepness of a linear function is its slope", slope={"0.3": 0.3, "2": 2.0})
def _(slope):
    x = points(23, 20, 1, dtype=torch.float64)
    found = perception_path(lambda z: slope * z, x, x + 0.25, [1.0])
    assert_close(found, torch.full_like(found, 0.25 * slope))


@expected("foolbox, RobustBench", "models are asked without gradients where none are wanted")
def _():
    x, _ = images()
    with frozen(Images().train()) as model:
        assert not model(x).requires_grad


@expected(
    "torchattacks",
    "n-FGSM and FGSM with noise stay in the box",
    attack={"n_fgsm": n_fgsm, "one step": partial(pgd, steps=1, step_size=0.125)},
)
def _(attack):
    x, labels = images()
    x_adv = attack(Images().eval(), x, labels, Linf(0.1))
    assert (float(x_adv.min()) >= 0, float(x_adv.max()) <= 1) == (True, True)


@expected("RobustBench, AutoAttack", "masking is found by comparing attacks")
def _():
    model, x, _ = flat_case(n=60)
    rounded = lambda z: model((4 * z).round() / 4)  # noqa: E731
    found = sanity_checks(rounded, x, rounded(x).argmax(dim=1), Linf(0.2), steps=3, queries=30)
    assert "gradients" in {check.name for check in found if not check.passed}


@expected("foolbox", "one sample is a batch", attack=ATTACKS)
def _(attack):
    x, labels = images(1)
    assert is_inside(Linf(0.1), attack(Images().eval(), x, labels, Linf(0.1)), x)


@expected("torchattacks", "no sample is a batch too", attack=ATTACKS)
def _(attack):
    x, labels = images()
    assert attack(Images().eval(), x[:0], labels[:0], Linf(0.1)).shape == (0, 3, 4, 4)
