"""What is compared with what: the settings that all runs share, the arms, and the order of the runs."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from perceptual_at.objectives import preset

SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Design:
    """Settings that all arms share."""

    width: int = 16
    stem_stride: int = 2
    batch: int = 128
    rate: float = 0.1
    """Peak of the one-cycle schedule: a rise over three tenths of the run, a fall to zero; momentum stays. The released
    codes' rate: a pilot on PGD-AT alone (seed 100, a cycle of four epochs, stopped after two) had 38.1 / 25.4 % clean
    and PGD-10 on the held-out images with it, and 37.7 / 25.2 % with 0.2."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    eps: float = 8 / 255
    steps: int = 10
    step_size: float = 2 / 255
    lane: str = "bfloat16"
    """Of the attacks; verdicts and training passes are float32."""
    epochs_all: int = 12
    epochs_small: int = 75
    small: int = 8000
    """Images of the regime "small", the same for every seed."""
    held_out: int = 1000
    probed: int = 1000
    """Images for perception gap, groups and training accuracy; twice as many for batch norm's statistics."""
    strong: int = 1000
    """Test images for AutoAttack."""
    autoattack: str = "standard"

    def epochs(self, regime: str) -> int:
        """Length of a run."""
        return self.epochs_all if regime == "all" else self.epochs_small


QUICK = Design(
    width=2, stem_stride=1, batch=8, steps=2, lane="float32", epochs_all=2, epochs_small=2, small=16, held_out=8,
    probed=4, strong=4, autoattack="quick",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way of training. Objectives are those of `perceptual_at.objectives`, with the released code's choices, and
    `raat_adaptive` of `evidence.training`.
    """

    title: str
    objective: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    views: int = 1
    silenced: dict[str, Any] | None = None
    """The keywords that leave the regulariser out and nothing else, to weigh its gradient; None if it has none."""
    regulariser: str | None = None
    """Name of its term, and the keyword that is its weight in the loss."""
    weight: float = 1.0
    regimes: tuple[str, ...] = ("all", "small")
    perturbation: float = 0.0
    """Size of an adversarial weight perturbation in every step; 0 for none."""
    decay: float = 0.0
    """Of the moving average of the weights that is judged in place of the last ones; 0 judges those."""


_RELEASE = preset("rpat", "release")
_RPAT = {"silenced": {"weight": 0.0}, "regulariser": "robust_perception"}
_RAAT = preset("raat", "release")
_DICAR = {"silenced": {"weight": 0.0}, "regulariser": "dicar", "views": 2}
_ALL: dict[str, Any] = {"regimes": ("all",)}

ARMS: dict[str, Arm] = {
    "pgd_at": Arm("PGD-AT", "pgd_at"),
    "rpat_release": Arm("RPAT, release", "rpat", _RELEASE, **_RPAT),
    "rpat_weight_0": Arm("RPAT's passes, weight 0", "rpat", {**_RELEASE, "weight": 0.0}),
    "rpat_eq3": Arm("RPAT, Eq. 3", "rpat", preset("rpat", "paper"), **_RPAT),
    "pgd_at_two_views": Arm("PGD-AT, two views", "pgd_at", views=2),
    "raat": Arm("RAAT", "raat", _RAAT, **_DICAR),
    "consistency_at": Arm(
        "Consistency-AT", "consistency_at", views=2, silenced={"consistency_weight": 0.0}, regulariser="consistency"
    ),
    "consistency_at_rpat": Arm(
        "Consistency-AT + RPAT", "rpat", preset("rpat", "release", base="consistency_at"), views=2, **_RPAT
    ),
    "raat_without_bound": Arm("RAAT without BOUND", "raat", {**_RAAT, "bound": False}, **_DICAR, **_ALL),
    "raat_without_dicar": Arm("RAAT without DICAR", "raat", {**_RAAT, "weight": 0.0}, views=2, **_ALL),
    "trades": Arm(
        "TRADES", "trades", preset("trades", "release"), silenced={"beta": 0.0}, regulariser="kl", weight=6, **_ALL
    ),
    "mart": Arm("MART", "mart", silenced={"beta": 0.0}, regulariser="weighted_kl", weight=6, **_ALL),
    "pgd_at_awp": Arm("PGD-AT + AWP", "pgd_at", perturbation=0.01),
    "pgd_at_average": Arm("PGD-AT, averaged weights", "pgd_at", decay=0.999),
    "rpat_relative": Arm("RPAT, relative form", "rpat", {**_RELEASE, "form": "relative"}, **_RPAT, **_ALL),
    "rpat_raat_weight_0": Arm(
        "RAAT, RPAT's passes, weight 0", "rpat_raat", {**_RAAT, "weight": 0.0}, views=2,
        silenced={"dicar_weight": 0.0}, regulariser="dicar", **_ALL,
    ),
    "rpat_raat": Arm("RPAT + RAAT", "rpat_raat", _RAAT, views=2, **_RPAT, **_ALL),
    "raat_adaptive": Arm("RAAT, adaptive eta", "raat_adaptive", _RAAT, **_DICAR, **_ALL),
}  # fmt: skip
ETAS = (0.1, 0.25, 0.5, 0.75)
"""What adaptive eta chooses from."""
SWEPT_WEIGHTS = (10, 100, 1000)
SWEEP: dict[str, Arm] = {
    f"rpat_weight_{weight}": Arm(
        f"RPAT, weight {weight}", "rpat", {**_RELEASE, "weight": float(weight)}, weight=weight, **_RPAT
    )
    for weight in SWEPT_WEIGHTS
}
"""RPAT's term at more than its published weight, which is 0.02 % of the loss and 0.4 % of the gradient here. One seed
on all images, looked at on the held-out images alone; no arm of the experiment."""
CORE = tuple(ARMS)[:8]
MORE = tuple(ARMS)[8:12]
LATER = tuple(ARMS)[12:]
REGIMES = ("all", "small")


class Job(NamedTuple):
    """One run."""

    regime: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.regime}/{self.arm}/{self.seed}"


def sweep() -> list[Job]:
    """The runs with other weights, beside those of weights 0 and 1 among the core arms."""
    return [Job("all", arm, 0) for arm in SWEEP]


def order(seeds: int = SEEDS) -> Iterator[list[Job]]:
    """All runs in blocks, in the order in which they are made: the core arms seed by seed, then the others."""
    for arms in (CORE, MORE, LATER):
        for regime in REGIMES:
            for seed in range(seeds):
                if block := [Job(regime, arm, seed) for arm in arms if regime in ARMS[arm].regimes]:
                    yield block
