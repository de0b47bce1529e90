"""Training steps with the passes of the methods' released codes, written from their formulas.

What they compute is what `perceptual_at.objectives` computes; what differs is how often the network runs. The attack of
PGD-AT, RPAT, Consistency-AT and RAAT calls `backward`, which also computes the gradients of all parameters in every
step; TRADES runs the clean images anew in every step; all read the partition of a batch on the host.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from cases import STEP_SIZE, STEPS, THREAT
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from perceptual_at import (
    boosted_cross_entropy,
    consistency_loss,
    dicar_loss,
    robust_perception_loss,
    weighted_kl_loss,
)

Release = Callable[..., Tensor]
MIX, ETA = 0.75, 0.1


def pgd(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int = STEPS, noise: float = 0.0) -> Tensor:
    """PGD by `backward`: F + Bx + Bp per step."""

    def slope(point: Tensor) -> Tensor | None:
        cross_entropy(model(point), labels).backward()
        return point.grad

    return climbed(model, x, slope, steps=steps, noise=noise)


def pgd_to_input(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int = STEPS, noise: float = 0.001) -> Tensor:
    """MART's attack: F + Bx per step, although its parameters require gradients."""

    def slope(point: Tensor) -> Tensor:
        return torch.autograd.grad(cross_entropy(model(point), labels), point)[0]

    return climbed(model, x, slope, steps=steps, noise=noise)


def trades_attack(
    model: nn.Module, x: Tensor, *, steps: int = STEPS, noise: float = 0.001, once: bool = False
) -> Tensor:
    """TRADES' attack: 2 F + Bx per step, as the clean images run again each time; with `once`, they run once."""
    with evaluating(model):
        clean = softmax(model(x), dim=1).detach() if once else None

        def slope(point: Tensor) -> Tensor:
            logits = model(point)
            target = softmax(model(x), dim=1) if clean is None else clean
            return torch.autograd.grad(kl_div(log_softmax(logits, dim=1), target, reduction="sum"), point)[0]

        return climbed(model, x, slope, steps=steps, noise=noise)


def climbed(
    model: nn.Module, x: Tensor, slope: Callable[[Tensor], Tensor | None], *, steps: int, noise: float
) -> Tensor:
    """Steps up the slope from noise around `x`, in eval mode."""
    with evaluating(model):
        point = x + noise * torch.randn_like(x)
        for _ in range(steps):
            point = point.detach().requires_grad_()
            point = moved(point, x, slope(point))
    return point


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and then the mode before."""
    training = model.training
    model.eval()
    yield
    model.train(training)


def moved(point: Tensor, x: Tensor, slope: Tensor) -> Tensor:
    """One projected sign step."""
    point = point.detach() + STEP_SIZE * slope.sign()
    return torch.clamp(torch.clamp(point, x - THREAT.eps, x + THREAT.eps), 0.0, 1.0)


def pgd_at(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int = STEPS) -> Tensor:
    """11 F, 10 Bx, 11 Bp."""
    return cross_entropy(model(pgd(model, x, labels, steps=steps)), labels)


def rpat(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int = STEPS) -> Tensor:
    """13 F, 10 Bx, 13 Bp."""
    x_adv = pgd(model, x, labels, steps=steps)
    adv = model(x_adv)
    return cross_entropy(adv, labels) + unevenness(model, x, x_adv, None, adv)


def consistency_at(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int = STEPS) -> Tensor:
    """11 F, 10 Bx, 11 Bp of both views."""
    adv = model(pgd(model, x, labels, steps=steps))
    return cross_entropy(adv, labels) + consistency_loss(*adv.chunk(2))


def consistency_at_rpat(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int = STEPS) -> Tensor:
    """13 F, 10 Bx, 13 Bp of both views."""
    x_adv = pgd(model, x, labels, steps=steps)
    adv = model(x_adv)
    return cross_entropy(adv, labels) + consistency_loss(*adv.chunk(2)) + unevenness(model, x, x_adv, None, adv)


def trades(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int = STEPS) -> Tensor:
    """23 F, 10 Bx, 3 Bp: the original, which runs the clean images once more for the KL."""
    x_adv = trades_attack(model, x, steps=steps)
    clean, adv, again = model(x), model(x_adv), model(x)
    return cross_entropy(clean, labels) + 6.0 * _kl(again, adv)


def trades_rpat(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int = STEPS) -> Tensor:
    """15 F, 10 Bx, 4 Bp: RPAT's copy of TRADES, whose attack runs the clean images once."""
    x_adv = trades_attack(model, x, steps=steps, once=True)
    clean, adv, again = model(x), model(x_adv), model(x)
    return cross_entropy(clean, labels) + 6.0 * _kl(again, adv) + unevenness(model, x, x_adv, clean, adv)


def mart(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int = STEPS) -> Tensor:
    """12 F, 10 Bx, 2 Bp."""
    x_adv = pgd_to_input(model, x, labels, steps=steps)
    clean, adv = model(x), model(x_adv)
    return boosted_cross_entropy(adv, labels) + 6.0 * weighted_kl_loss(clean, adv, labels)


def mart_rpat(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int = STEPS) -> Tensor:
    """13 F, 10 Bx, 3 Bp."""
    x_adv = pgd_to_input(model, x, labels, steps=steps)
    clean, adv = model(x), model(x_adv)
    loss = boosted_cross_entropy(adv, labels) + 6.0 * weighted_kl_loss(clean, adv, labels)
    return loss + unevenness(model, x, x_adv, clean, adv)


def raat(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int = STEPS) -> Tensor:
    """15 F, 10 Bx and 12 Bp of both views, and half an F and a Bp for the pairs that DICAR keeps."""
    x_adv = pgd(model, x, labels, steps=steps)
    inputs, rows, kept = _partition(model, x, x_adv, labels)
    return cross_entropy(model(inputs), labels[rows]) + _dicar(model, x, x_adv, kept)


def raat_plus_plus(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int = STEPS) -> Tensor:
    """17 F, 10 Bx and 4 Bp of both views, and half an F and a Bp for the pairs that DICAR keeps."""
    x_adv = pgd_to_input(model, x, labels, steps=steps)
    inputs, rows, kept = _partition(model, x, x_adv, labels)
    adv, clean = model(x_adv), model(x)
    loss = boosted_cross_entropy(model(inputs), labels[rows]) + 6.0 * weighted_kl_loss(clean, adv, labels)
    return loss + _dicar(model, x, x_adv, kept)


RELEASES: dict[str, Release] = {
    "pgd_at": pgd_at,
    "rpat": rpat,
    "trades": trades,
    "rpat, trades": trades_rpat,
    "mart": mart,
    "rpat, mart": mart_rpat,
    "consistency_at": consistency_at,
    "rpat, consistency_at": consistency_at_rpat,
    "raat": raat,
    "raat_plus_plus": raat_plus_plus,
}


def unevenness(model: nn.Module, x: Tensor, x_adv: Tensor, clean: Tensor | None, adv: Tensor) -> Tensor:
    """RPAT's term: the middle, and the clean images where the base has not run them."""
    mid = model(0.5 * (x + x_adv))
    return robust_perception_loss(model(x) if clean is None else clean, mid, adv, form="interpolation")


def _kl(clean: Tensor, adv: Tensor) -> Tensor:
    return kl_div(log_softmax(adv, dim=1), softmax(clean, dim=1), reduction="batchmean")


def _partition(model: nn.Module, x: Tensor, x_adv: Tensor, labels: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """The supervised inputs group by group, their rows, and the pairs that DICAR keeps: decided on the host."""
    reduced = x + ETA * (x_adv - x)
    with evaluating(model):
        right, held, near = ((model(inputs).argmax(dim=1) == labels).tolist() for inputs in (x, x_adv, reduced))
    groups: tuple[list[int], ...] = ([], [], [])
    for row, clean in enumerate(right):
        groups[2 if not clean else 0 if held[row] or near[row] else 1].append(row)
    interior, boundary, wrong = groups
    inputs = torch.cat([x_adv[interior], reduced[boundary], x_adv[wrong]])
    half = len(labels) // 2
    return inputs, interior + boundary + wrong, [row for row in range(half) if right[row] and right[row + half]]


def _dicar(model: nn.Module, x: Tensor, x_adv: Tensor, kept: list[int]) -> Tensor:
    if not kept:
        return x.new_zeros(())
    adv_1, adv_2 = x_adv.chunk(2)
    mixed = model((MIX * adv_1 + (1 - MIX) * adv_2)[kept])
    clean_1, clean_2 = (half[kept] for half in model(x).chunk(2))
    return dicar_loss(mixed, clean_1, clean_2, mix=MIX, space="logits", temperature=0.5)
