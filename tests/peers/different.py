"""What is different here on purpose; the page `docs/migrate/behaviours.md` says why."""

import torch

from perceptual_at import (
    L2,
    Linf,
    cw,
    fgsm,
    pgd,
)
from tests.peers.listing import (
    ATTACKS,
    DRAWS,
    FOLLOWS_STEPS,
    Images,
    different,
    flat_case,
    images,
    is_inside,
    refused,
    smooth_case,
    still_right,
)


@different("cleverhans", "A step of 0 with a budget gives back the inputs", attack=FOLLOWS_STEPS)
def _(attack):
    model, x, labels = flat_case()
    refused(lambda: attack(model, x, labels, Linf(0.1), step_size=0), "`step_size`", ValueError)
    assert torch.equal(attack(model, x, labels, Linf(0.0), step_size=0), x)


@different("cleverhans, foolbox", "An Linf budget may be larger than the box")
def _():
    refused(lambda: Linf(1.0, bounds=(0.5, 0.7)), "exceeds the input range", ValueError)
    refused(lambda: Linf(100.0), "did you mean 100 / 255", ValueError)
    assert Linf(0.1).scaled(1000) == Linf(1.0)


@different("cleverhans", "Inputs outside the box are clipped into it on request")
def _():
    model, x, labels = smooth_case()
    refused(lambda: pgd(model, x, labels, Linf(0.2, bounds=(0.5, 0.7))), "bounds", ValueError)
    inside = x.clamp(0.5, 0.7)
    assert is_inside(Linf(0.2, bounds=(0.5, 0.7)), pgd(model, inside, labels, Linf(0.2, bounds=(0.5, 0.7))), inside)


@different("advertorch", "A float32 budget for each sample gives the bits of a number")
def _():
    held = torch.full((8,), 0.1)
    assert float(held[0]) != 0.1
    assert float(held.double()[0]) == float(torch.tensor(0.1))


@different("torchattacks", "A targeted attack never raises accuracy")
def _():
    # A point on its way to another class may be right: here the target is on the far side of the label.
    model = lambda z: torch.cat([z[:, :1], 0.8 - z[:, :1], 3 * z[:, :1] - 2.1], dim=1)  # noqa: E731
    x, labels, targets = torch.tensor([[0.35]]), torch.tensor([0]), torch.tensor([2])
    assert still_right(model, x, labels) == 0
    verdict = pgd(model, x, labels, Linf(0.1), start="clean", targets=targets, verdict=True)
    assert still_right(model, verdict.x_adv, labels) == 1
    assert not bool(verdict.success.any())  # success is reaching the target, and no accuracy


@different("advertorch, cleverhans", "Labels may be left out, and are then the model's own predictions", attack=ATTACKS)
def _(attack):
    x, _ = images()
    refused(lambda: attack(Images().eval(), x, None, Linf(0.1)), "labels", TypeError)


@different("advertorch, torchattacks", "The global seed, set once more, gives the same noise again", attack=DRAWS)
def _(attack):
    x, labels = images()
    model, found = Images().eval(), []
    for seed in (8, 7, 7, 8, 7):
        torch.manual_seed(seed)
        found.append(attack(model, x, labels, Linf(0.1)))
    _, first, again, other, rewound = found
    assert not torch.equal(first, again)  # the stream goes on
    assert not torch.equal(first, other)
    assert torch.equal(first, rewound)


@different("foolbox", "One call takes a list of budgets")
def _():
    refused(lambda: Linf([0.1, 0.2]), "eps", TypeError)


@different("foolbox", "A model is wrapped before it is attacked, and training mode is warned of")
def _():
    x, labels = images()
    assert is_inside(Linf(0.1), fgsm(Images().train(), x, labels, Linf(0.1)), x)


@different("cleverhans, advertorch, foolbox, torchattacks", "Carlini and Wagner's attack is a penalty without a ball")
def _():
    x, labels = images()
    assert is_inside(L2(0.4), cw(Images().eval(), x, labels, L2(0.4)), x)
