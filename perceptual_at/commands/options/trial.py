"""An objective tried on a network of one layer: values that it does not take are refused before anything is trained."""

import copy
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import perceptual_at as pat
from perceptual_at import models
from perceptual_at.commands.options.method import (
    SPOKEN,
    asked,
    epochs_of,
    keywords,
    objective_named,
    two_views,
    words_of,
)
from perceptual_at.commands.options.settings import Settings
from perceptual_at.commands.options.words import option

ROWS, CLASSES = 8, 4
ATTACKS: dict[str, Callable[..., Tensor]] = {"pgd": pat.pgd, "n_fgsm": pat.n_fgsm, "friendly": pat.friendly_pgd}


def refuse_values(settings: Settings) -> None:
    """Refuse values of the method's options that its objective does not take, in any epoch.

    Raises:
        ValueError: if there is one; it says by which option.
    """
    for epoch in epochs_of(settings.method):
        refused = _refused(settings, epoch)
        if refused is not None:
            raise ValueError(f"{_culprit(settings, epoch, str(refused))}: {refused}") from refused


def _refused(settings: Settings, epoch: int) -> ValueError | TypeError | None:
    """What the objective says against the keywords of an epoch."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            _run(settings, epoch)
        except (ValueError, TypeError) as error:
            return error
    return None


def _run(settings: Settings, epoch: int) -> None:
    """One step of the objective on random images, with something for all that a run supplies."""
    method, scale = settings.method, settings.network.cosines
    known, chosen = asked(method), keywords(method, epoch=epoch)
    model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES * (1 + settings.network.dummies)))
    if scale is not None:
        model = models.with_cosine_logits(model, scale=scale)
        chosen["scale"] = scale
    x, labels = torch.rand(ROWS, 3, 2, 2), torch.arange(ROWS) % CLASSES
    generator, threat = torch.Generator().manual_seed(0), pat.Linf(0.1)
    steps = {} if settings.threat.attack == "n_fgsm" else {"steps": 1}
    attack = functools.partial(
        ATTACKS.get(settings.threat.attack, ATTACKS["pgd"]), threat=threat, generator=generator, validate=False, **steps
    )
    given: dict[str, Any] = {
        "mix": 0.75, "average": pat.snapshot(model), "generator": generator, "threat": threat, "steps": 1,
        "targets": torch.full((ROWS, CLASSES), 1 / CLASSES), "margins": torch.zeros(ROWS),
        "table": torch.full((CLASSES, CLASSES), 1 / CLASSES),
        **{name: copy.deepcopy(model) for name in ("helper", "standard_teacher", "robust_teacher", "teacher")},
    }  # fmt: skip
    if isinstance(method.alpha, str):
        given["alpha"] = 0.5
    if method.source == "paper" and chosen.get("bound", True):
        given["reduced_attack"] = attack
    if method.smoothing or method.cutmix:
        labels, plain = pat.smooth_labels(labels, CLASSES, smoothing=0.1), labels.repeat(1 + two_views(method))
        if method.smoothing:  # the attack is given classes, and CutMix's labels
            attack = functools.partial(_on_plain_labels, attack, plain)
    given = {name: value for name, value in given.items() if name in known and name not in chosen}
    if "kappa" not in known:
        given.pop("steps", None)
    views = (x,) * (1 + two_views(method))
    objective_named(method.objective)(model, views, labels, attack, **chosen, **given)


def _on_plain_labels(attack: Any, plain: Tensor, model: nn.Module, x: Tensor, _: Tensor, **options: Any) -> Tensor:
    x_adv: Tensor = attack(model, x, plain, **options)
    return x_adv


def _culprit(settings: Settings, epoch: int, said: str) -> str:
    """The option that an objective's message is about."""
    method = settings.method
    words = [word for word in words_of(method) if (word.begins or 0) <= epoch]
    written = {name: option(name) for name in SPOKEN if getattr(method, name) is not None}
    written |= {word.name: word.written for word in words}
    if method.cutmix or method.smoothing:
        written["labels"] = "--cutmix" if method.cutmix else "--smoothing"
    if settings.threat.attack != "pgd":
        written["attack"] = f"--attack {settings.threat.attack}"
    named = [str(name) for name in re.findall(r"`(\w+)", said) if name in written]
    if named:
        return written[named[0]]
    begun = [word.written for word in words if word.begins == epoch]
    return " ".join(begun) or f"--objective {method.objective}" + (f" --base {method.base}" if method.base else "")
