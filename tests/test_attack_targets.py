"""Targets, undefined predictions, infinite slopes and losses of a batch, in the attacks that search."""

import functools

import pytest
import torch
from torch import nn

from perceptual_at import L1, L2, Linf, apgd, auto_attack, dlr, fab, kl_to, margin, pgd, square, targeted_dlr
from perceptual_at.attacks import cospgd_loss, segpgd_loss
from tests.strategies import generator

ATTACKS = {
    "pgd": functools.partial(pgd, steps=20, keep="best"),
    "apgd": functools.partial(apgd, steps=20),
    "fab": functools.partial(fab, steps=20),
    "square": functools.partial(square, queries=500),
}
THREATS = [Linf(0.3), L2(3.0), L1(15.0)]
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def problem():
    torch.manual_seed(0)
    x = torch.rand(8, 1, 8, 8, generator=generator(1))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return net, x, net(x).argmax(dim=1)


@every_attack
@pytest.mark.parametrize("threat", THREATS, ids=repr)
def test_success_is_being_taken_for_the_target(attack, threat):
    net, x, labels = problem()
    targets = ((labels + 1) % 10).to(torch.uint8)
    verdict = attack(net, x, labels, threat, targets=targets, verdict=True)
    assert torch.equal(net(verdict.x_adv).argmax(dim=1) == targets, verdict.success)
    assert verdict.success.sum() >= (1 if "square" in str(attack) else 6)  # a random search finds as many as it finds
    assert threat.contains(verdict.x_adv, x).all()


BY_LOSS = {name: attack for name, attack in ATTACKS.items() if name != "fab"}
by_loss = pytest.mark.parametrize("attack", BY_LOSS.values(), ids=BY_LOSS)


@pytest.mark.slow
@by_loss
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.uint16])
def test_dlr_with_targets_is_its_targeted_form_from_the_labels(attack, dtype):
    net, x, labels = problem()
    targets = ((labels + 1) % 10).to(dtype)
    drawn = {"generator": generator(0)}
    verdict = attack(net, x, labels.to(dtype), Linf(0.3), targets=targets, loss=dlr, verdict=True, **drawn)
    drawn = {"generator": generator(0)}
    same = attack(net, x, labels, Linf(0.3), targets=targets, loss=targeted_dlr, verdict=True, **drawn)
    assert torch.equal(verdict.x_adv, same.x_adv)
    assert torch.equal(net(verdict.x_adv).argmax(dim=1) == targets.long(), verdict.success)
    assert verdict.success.sum() >= (2 if "square" in str(attack) else 6)


def test_the_first_step_of_dlr_with_targets_climbs_towards_them():
    net, x, labels = problem()
    targets = (labels + 3) % 10
    point = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(targeted_dlr(net(point), labels, targets).sum(), point)
    expected = (x + 0.01 * grad.sign()).clamp(0, 1)
    found = pgd(net, x, labels, Linf(0.3), targets=targets, loss=dlr, steps=1, step_size=0.01, start="clean")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@by_loss
def test_dlr_with_targets_needs_labels_that_are_classes(attack):
    net, x, labels = problem()
    with pytest.raises(ValueError, match=r"`labels` must lie in \[0, 9\] for 10 classes") as raised:
        attack(net, x, labels + 10, Linf(0.1), targets=(labels + 1) % 10, loss=dlr)
    assert str(raised.value).split(":")[0] in ("pgd", "apgd", "square")


@by_loss
def test_the_targeted_loss_needs_targets(attack):
    _, x, labels = problem()
    with pytest.raises(ValueError, match=r": `loss`=targeted_dlr leads from a label to a target, so it needs"):
        attack(lambda z: pytest.fail("a pass was made"), x, labels, Linf(0.1), loss=targeted_dlr)


@pytest.mark.parametrize("attack", [apgd, square])
@pytest.mark.parametrize("count", [7, 9])
def test_predictions_of_another_batch_are_refused(attack, count):
    net, x, labels = problem()
    with pytest.raises(ValueError, match=f"^{attack.__name__}: `loss`=kl_to.* {count} predictions and `labels` are 8"):
        attack(net, x, labels, Linf(0.1), loss=kl_to(torch.zeros(count, 10)))


@by_loss
@pytest.mark.parametrize("loss", ["kl_to", "cospgd_loss", "segpgd_loss"])
def test_losses_that_lead_to_no_target_when_turned_round_are_refused(attack, loss):
    net, x, labels = problem()
    bound = functools.partial(segpgd_loss, wrong_weight=0.0)
    given = {"kl_to": kl_to(net(x)), "cospgd_loss": cospgd_loss, "segpgd_loss": bound}[loss]
    with pytest.raises(ValueError, match=f": `loss`={loss}.* not towards `targets`"):
        attack(lambda z: pytest.fail("a pass was made"), x, labels, Linf(0.1), targets=labels, loss=given)


def test_dlr_is_known_when_it_is_bound():
    net, x, labels = problem()
    options = {"targets": (labels + 1) % 10, "start": "clean"}
    found = pgd(net, x, labels, Linf(0.1), loss=functools.partial(dlr), **options)
    assert torch.equal(found, pgd(net, x, labels, Linf(0.1), loss=dlr, **options))


@pytest.mark.parametrize("loss", [dlr, margin, lambda logits, labels: logits[:, 0]])
def test_target_classes_need_a_loss_of_three_arguments(loss):
    _, x, labels = problem()
    with pytest.raises(TypeError, match=r"^apgd: `loss` must be a function \(logits, labels, targets\)"):
        apgd(lambda z: pytest.fail("a pass was made"), x, labels, Linf(0.1), loss=loss, target_classes=2)


@pytest.mark.parametrize("attack", [apgd, fab])
def test_targets_and_target_classes_exclude_each_other(attack):
    net, x, labels = problem()
    with pytest.raises(ValueError, match="`target_classes` has no effect with given `targets`"):
        attack(net, x, labels, Linf(0.1), targets=labels, target_classes=3)


@pytest.mark.parametrize("attack", [*ATTACKS.values(), functools.partial(auto_attack, version=["apgd-ce"])])
def test_samples_without_a_prediction_are_neither_broken_nor_robust(attack):
    net, x, labels = problem()
    broken = torch.arange(8) < 3

    def model(z):
        return torch.where(broken[: len(z), None] & (len(z) == 8), torch.nan, net(z))

    verdict = attack(model, x, labels, Linf(0.001), verdict=True)
    assert not verdict.robust[:3].any()
    assert not verdict.success[:3].any()
    assert verdict.robust[3:].any()


def test_fab_follows_slopes_that_are_infinite():
    _, x, _ = problem()
    x = torch.where(x < 0.3, 0.0, x)
    linear = nn.Linear(64, 10)
    labels = linear(x.flatten(1).sqrt()).argmax(dim=1)
    found = fab(lambda z: linear(z.flatten(1).sqrt()), x, labels, Linf(0.1), steps=20, verdict=True)
    assert found.success.sum() >= 4


def test_losses_of_a_batch_keep_up_with_the_samples_that_stay():
    net, x, labels = problem()
    labels = torch.where(torch.arange(8) < 3, (labels + 1) % 10, labels)  # three are wrong and leave at once
    loss = kl_to(net(x).detach())
    together = apgd(net, x, labels, Linf(0.05), steps=5, loss=loss)
    assert Linf(0.05).contains(together, x).all()
    square(net, x, labels, Linf(0.05), queries=5, loss=loss)


def test_apgd_compares_its_first_loss_with_0_as_the_original_does():
    # The same slopes: only what the first step is compared with tells a margin below 0 from one above it.
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        net[0].weight.mul_(9)  # curved, so that a run depends on its step sizes
    x = torch.rand(20, 6, generator=generator(4), dtype=torch.float64)
    labels = net(x).argmax(dim=1)

    def found(offset):
        return apgd(
            net, x, labels, L2(0.5), steps=10, start=x, early_stop=False,
            loss=lambda logits, labels: margin(logits, labels) + offset,
        )  # fmt: skip

    assert (found(0.0) - found(16.0)).abs().max() > 1e-2
