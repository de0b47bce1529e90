"""What the settings make of one step: its views, its attack and its loss."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import perceptual_at as pat
from perceptual_at import diagnostics, models
from perceptual_at.augment import cutmix, random_crop_flip
from perceptual_at.averaging import Weights
from perceptual_at.commands.ingredients.protocol import LANES, THREATS, threat_of
from perceptual_at.commands.options.method import asked, keywords, objective_named, parts, two_views
from perceptual_at.commands.options.settings import Budget, Settings
from perceptual_at.victims import bare
from perceptual_at.weight_perturbation import once

Attack = Callable[..., Tensor]
Result = tuple[Tensor, dict[str, Tensor]]


def attack_of(chosen: Budget, generator: torch.Generator, *, size: float = 1.0, epoch: int = 0) -> Attack:
    """The attack in training at some epoch; `size` scales budget and step."""
    strong = chosen.strong_attack_from is not None and epoch >= chosen.strong_attack_from
    threat = THREATS[chosen.norm](chosen.strong_eps if strong else chosen.eps)
    size *= min(1.0, (epoch + 1) / max(chosen.eps_ramp, 1))
    common: dict[str, Any] = {
        "threat": threat.scaled(size), "model_mode": chosen.model_mode, "lane": LANES[chosen.lane], "validate": False,
        "generator": generator,
    }  # fmt: skip
    if chosen.attack == "n_fgsm":
        return functools.partial(pat.n_fgsm, **common)
    common |= {
        "steps": chosen.strong_steps if strong else chosen.steps, "step_size": size * chosen.step_size,
        "start": chosen.start,
    }  # fmt: skip
    if chosen.attack == "friendly":
        patience = sum(epoch >= begins for begins in chosen.patience)
        return functools.partial(pat.friendly_pgd, patience=patience, noise=chosen.attack_noise, **common)
    return functools.partial(_least_likely if chosen.attack == "least_likely" else pat.pgd, **common)


def _least_likely(model: nn.Module, x: Tensor, labels: Tensor, *, model_mode: Any, **options: Any) -> Tensor:
    """PGD towards the class that is least likely at the clean input."""
    with torch.no_grad(), pat.frozen(model, model_mode=model_mode) as f:
        targets = f(x).scatter(1, labels[:, None], torch.inf).argmin(dim=1)
    x_adv: Tensor = pat.pgd(model, x, labels, targets=targets, model_mode=model_mode, **options)
    return x_adv


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where a run draws from: `noise` for the samples of one process, `mixes` for what all processes share."""

    noise: torch.Generator
    mixes: torch.Generator
    classes: int


class Step:
    """The loss of one batch, which can be computed more than once: views, draws and the attack stay the same.

    Args:
        settings: of the run.
        sources: what draws.
        x: images, on the device.
        labels: their classes.
        epoch: counted from 0.
        average: averaged weights, if there are any.
    """

    def __init__(
        self, settings: Settings, sources: Sources, x: Tensor | tuple[Tensor, ...], labels: Tensor, *, epoch: int,
        average: Weights | None,
    ) -> None:  # fmt: skip
        self.function = objective_named(settings.method.objective)
        self.views, self.labels = views_of(settings, sources, x, labels)
        self.keywords = keywords(settings.method, epoch=epoch) | _supplied(settings, sources, epoch, average)
        self.release = settings.method.source == "release" and settings.threat.model_mode == "as_is"
        self.perceive, self.dummies = settings.method.perceive, settings.network.dummies
        attack = _trained_on(settings, attack_of(settings.threat, sources.noise, epoch=epoch))
        if settings.method.smoothing:
            attack = functools.partial(_on_plain_labels, attack, self.labels.repeat(len(self.views)))
            smoothing, over = settings.method.smoothing, settings.method.smoothing_over
            self.labels = pat.smooth_labels(self.labels, sources.classes, smoothing=smoothing, over=over)
        sharp = settings.method.objective == "raat_sharp"
        if self.release:
            attack = functools.partial(_as_released, attack)
        self.attack = once(attack, calls=2 if sharp and self.keywords.get("weight") != 0 else 1)
        self.logged = "x_adv" if sharp else "x"

    def __call__(self, model: nn.Module, *, function: Callable[..., Result] | None = None, **changes: Any) -> Result:
        """Compute loss and terms with the model as it is; another function, or other keywords, where given."""
        options = self.keywords | changes
        if self.dummies:  # the loss is made of all 2K outputs, which are folded for everybody else
            model = getattr(bare(model), "model")  # noqa: B009
        if self.perceive not in (None, "logits"):  # the tapped network runs outside of a distributed wrapper
            options["perceive"] = models.perceive_at(bare(model), self.perceive)
        return (function or self.function)(model, self.views, self.labels, self.attack, **options)

    def trial(self, model: nn.Module) -> Tensor:
        """The loss where it is only asked for its slope: nothing is counted."""
        return self(model, **({"sums": None} if "sums" in self.keywords else {}))[0]

    def after(self, model: nn.Module) -> None:
        """What ReBAT's released code does after the optimiser's step: one more pass, for its log."""
        if not self.release:
            return
        x = self.views[0]
        with torch.no_grad():
            model(self.attack(model, x, self.labels) if self.logged == "x_adv" else x)


def views_of(
    settings: Settings, sources: Sources, x: Tensor | tuple[Tensor, ...], labels: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Views of a batch, augmented as the settings say, and their labels; what came as views is taken as it is."""
    method, data = settings.method, settings.data
    if isinstance(x, tuple):
        views = x
    elif data.augment == "none":
        views = (x,) * (1 + two_views(method))
    else:
        shifted = functools.partial(
            random_crop_flip, padding=data.padding, padding_mode=data.padding_mode, flip=data.flip,
            generator=sources.noise,
        )  # fmt: skip
        views = tuple(shifted(x) for _ in range(1 + two_views(method)))
    if method.cutmix:
        seed = int(torch.randint(2**62, (), generator=sources.mixes))
        drawn = [
            cutmix(view, labels, num_classes=sources.classes, generator=torch.Generator().manual_seed(seed))
            for view in views
        ]
        views, labels = tuple(view for view, _ in drawn), drawn[0][1]
    if settings.running.channels_last:
        views = tuple(view.contiguous(memory_format=torch.channels_last) for view in views)
    return views, labels


def _supplied(settings: Settings, sources: Sources, epoch: int, average: Weights | None) -> dict[str, Any]:
    """What an objective's signature asks for beside the options: draws, averaged weights, the threat."""
    method, start = settings.method, settings.optimisation.average_start
    known, given = asked(method), keywords(method)
    draw = functools.partial(pat.draw_beta, concentration=method.concentration, generator=sources.mixes)
    found: dict[str, Any] = {}
    if "mix" in known:
        found["mix"] = draw(fold="max" if method.source == "release" else "none")
    if isinstance(method.alpha, str):
        folds: dict[str, Any] = {"beta": "none", "beta-": "min", "beta+": "max"}
        found["alpha"] = draw(fold=folds[method.alpha])
    if "generator" in known:
        found["generator"] = sources.noise
    if "threat" in known:
        found["threat"] = threat_of(settings.threat)
    if "kappa" in known:  # GAIRAT counts the attack's steps
        found["steps"] = settings.threat.steps
    if settings.network.cosines is not None:
        found["scale"] = settings.network.cosines
    if "reduced_attack" in known and method.source == "paper" and given.get("bound", True):
        found["reduced_attack"] = attack_of(settings.threat, sources.noise, size=method.eta or 0.1, epoch=epoch)
    if "average" in known and "cure" not in parts(method):  # which keeps one of its own
        # Until the end of the first epoch with averaged weights the released code leaves them in train mode.
        trap = method.source == "release" and epoch <= start
        if "teacher_mode" in known:
            found["teacher_mode"] = "as_is" if trap else "eval"
        found["average"] = average if epoch >= start or method.objective == "raat_sharp" else None
        if method.objective == "raat_sharp" and epoch < start:
            found["weight"] = 0.0
    return found


def _trained_on(settings: Settings, attack: Attack) -> Attack:
    """The attack, or for RAAT's Fig. 2 one whose strength depends on where a sample stands."""
    method = settings.method
    if method.boundary_perturbation is None and method.interior_perturbation is None:
        return attack
    return functools.partial(
        _by_group, attack=attack, eta=0.1 if method.eta is None else method.eta,
        boundary=method.boundary_perturbation or "full", interior=method.interior_perturbation or "full",
    )  # fmt: skip


def _by_group(model: nn.Module, x: Tensor, labels: Tensor, *, attack: Attack, **options: Any) -> Tensor:
    return diagnostics.attacked_by_group(model, x, labels, attack, **options)


def _on_plain_labels(attack: Attack, plain: Tensor, model: nn.Module, x: Tensor, _: Tensor, **options: Any) -> Tensor:
    """The attack sees classes, whatever the loss is given."""
    return attack(model, x, plain, **options)


def _as_released(attack: Attack, model: nn.Module, x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """ReBAT's attack looks at its result once more, in train mode, to choose among restarts (of which it has one)."""
    x_adv = attack(model, x, labels, **options)
    with torch.no_grad():
        model(x_adv)
    return x_adv
