"""Who attacks a network: the attacks of the library, the official AutoAttack and those of other libraries."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from evidence.books import packed
from networks import Network
from peers import Budget, peers, strongest
from torch import Tensor, nn

from perceptual_at import Linf, SampleGenerator, auto_attack, pgd
from perceptual_at.attacks import apgd, dlr, fab, margin, square, surrogate_pgd
from perceptual_at.attacks.autoattack import AutoAttackVerdict

STANDARD, THOROUGH, OFFICIAL = "AutoAttack standard", "AutoAttack thorough", "official AutoAttack"
HERE = "perceptual_at"


class Case(NamedTuple):
    """A network with the samples that it gets right."""

    network: Network
    right: Tensor
    """Which of the images these are."""
    x: Tensor
    labels: Tensor
    seed: int
    quick: bool

    @property
    def threat(self) -> Linf:
        """The ball."""
        return Linf(self.network.eps)

    def verdicts(self, mask: Tensor) -> str:
        """Of the samples, as bits over all images."""
        found = torch.zeros_like(self.right)
        found[self.right] = mask
        return packed(found.tolist())


class Counted(nn.Module):
    """A network that counts the images it sees, with a gradient to come and without."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.gradients, self.others = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            self.gradients += len(x)
        else:
            self.others += len(x)
        return self.model(x)


def own_attacks(case: Case) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """The library's attacks by name, with their options."""
    classes = case.network.model(case.x[:1]).shape[1]
    targets = min(9, classes - 1)
    steps, queries = (3, 5) if case.quick else (100, 5000)
    few = [("apgd-ce", {"steps": 3}), ("square", {"queries": 5})]
    return {
        "PGD-20": (pgd, {"steps": min(20, steps)}),
        "margin PGD-30": (pgd, {"steps": min(30, steps), "loss": margin}),
        "APGD-CE": (apgd, {"steps": steps}),
        "APGD-DLR": (apgd, {"steps": steps, "loss": dlr if classes > 3 else margin}),
        "APGD-T": (apgd, {"steps": steps, "target_classes": targets}),
        "FAB-T": (fab, {"steps": steps, "target_classes": targets}),
        "Square": (square, {"queries": queries}),
        "surrogate PGD, 1 restart": (surrogate_pgd, {"restarts": 1, "steps": 2 * steps, "target_classes": targets}),
        STANDARD: (auto_attack, {"version": few if case.quick else "standard"}),
    }


def attacks(case: Case, model: nn.Module, found: dict[str, Any]) -> dict[tuple[str, str], Callable[[], Any] | str]:
    """Everything to run, by library and name; a text says why something cannot run.

    Args:
        case: network and samples.
        model: to be called by the attacks, the network itself or something around it.
        found: what the attacks before returned, by name, once they have run.
    """
    eps, generator = case.network.eps, SampleGenerator(case.seed, torch.arange(len(case.x)))
    listed: dict[tuple[str, str], Callable[[], Any] | str] = {
        (HERE, name): functools.partial(
            attack, model, case.x, case.labels, case.threat, generator=generator, verdict=True, **options
        )
        for name, (attack, options) in own_attacks(case).items()
    }  # fmt: skip
    listed[HERE, THOROUGH] = lambda: thorough(case, model, found[STANDARD])
    version = ["apgd-ce"] if case.quick else "standard"
    listed["pyautoattack", OFFICIAL] = functools.partial(
        auto_attack, model, case.x, case.labels, case.threat, version=version, backend="pyautoattack",
        generator=generator, verdict=True,
    )  # fmt: skip
    steps = 3 if case.quick else 20
    budget = Budget(eps, steps, 2.5 * eps / steps)
    for library, attack in peers(model, case.x, case.labels, budget).items():
        listed[library, f"{library} PGD-{steps}"] = attack
    for name, attack in strongest(model, case.x, case.labels, eps, steps=5 * steps).items():
        if not (case.quick and "AutoAttack" in name):  # whose steps cannot be chosen
            listed[name.split()[0], name] = attack
    return listed


def thorough(case: Case, model: nn.Module, standard: AutoAttackVerdict) -> AutoAttackVerdict:
    """What `version="thorough"` finds: it goes on where the standard version ended, with the same random numbers."""
    left, options = (~standard.success).nonzero().squeeze(1), {"steps": 3, "probes": 2} if case.quick else {}
    if not len(left):
        return standard
    further = auto_attack(
        model, case.x[left], case.labels[left], case.threat, version=[("surrogate", options)], verdict=True,
        generator=SampleGenerator(case.seed, left),
    )  # fmt: skip
    x_adv = standard.x_adv.index_copy(0, left, further.x_adv)
    return dataclasses.replace(standard, x_adv=x_adv, success=standard.success.index_copy(0, left, further.success))
