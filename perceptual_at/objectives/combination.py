"""How a regulariser is added to any objective: the base runs as it is, and what it ran is noted."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from einops import repeat
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at.objectives.passes import Attack, Perceive, Result, check_views, forward

BaseName = Literal[
    "adr", "alp", "clp", "consistency_at", "cure", "dicar", "ducat", "ewat", "gairat", "grad_align", "hat",
    "hypersphere", "ikl", "kd", "lbgat", "mail", "mart", "pgd_at", "piat", "raat", "raat_plus_plus", "raat_sharp",
    "rebat", "rpat", "rpat_plus_plus", "rpat_raat", "score", "sovr", "te", "trades",
]  # fmt: skip
"""Objectives that attack every sample once, which a regulariser can be added to."""
Base = BaseName | Callable[..., Result]


class Passes(NamedTuple):
    """What a base objective ran, for a regulariser to add to."""

    x: Tensor
    """The clean inputs, all views joined."""
    x_adv: Tensor
    labels: Tensor
    clean: tuple[Tensor, Tensor] | None
    """Logits and perception of the clean inputs, where the base ran them by themselves."""
    adv: tuple[Tensor, Tensor] | None
    """The same of the adversarial inputs."""
    loss: Tensor
    terms: dict[str, Tensor]


class _Noted(nn.Module):
    """A model that notes what it is run on with gradients.

    It is named as torch.compile names what it wraps, so averaged weights and attacks look through it.
    """

    copies = True
    """It hands on copies itself, and has to see the tensor that it was given."""

    def __init__(self, model: nn.Module, perceive: Perceive | None) -> None:
        super().__init__()
        self._orig_mod = model
        self.training = model.training
        self.perceive = perceive
        self.calls: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def forward(self, x: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return forward(self._orig_mod, x)
        if self.perceive is None:
            logits = forward(self._orig_mod, x)
            self.calls.append((x, (logits, logits)))
            return logits
        seen = self.perceive(x.clone())
        self.calls.append((x, seen))
        return seen[0]

    def seen_at(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """What it gave for this very tensor, the last time."""
        return next((seen for given, seen in reversed(self.calls) if given is x), None)


def run_base(
    function: str,
    base: Base,
    options: dict[str, Any],
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    perceive: Perceive | None = None,
    *,
    term: str,
) -> Passes:
    """Run a base objective and tell what it ran; `term` is what will be added to it."""
    _check.module(function, model)
    check_views(function, model, views, labels, expected=(1, 2))
    objective = resolved(function, base, options)
    if all(_check.unbound(attack, *given) for given in ((), ("start",), ("loss", "start"))):
        _check.attack(function, "`attack`", attack)  # no base could call it
    noted = _Noted(model, perceive)
    attacks: list[tuple[Tensor, Tensor]] = []
    name = _name(objective)
    loss, terms = _checked(function, name, objective(noted, views, labels, _watched(attack, model, attacks), **options))
    rows = sum(x.shape[0] for x, _ in attacks)
    if term in terms:
        raise ValueError(f"{function}: `base`={name!r} has the term {term!r} already.")
    if rows != len(views) * labels.shape[0]:
        raise ValueError(
            f"{function}: `base`={name!r} attacked {rows} rows of {len(views) * labels.shape[0]}; the term is "
            "defined on bases that attack every sample once."
        )
    x, x_adv = attacks[0] if len(attacks) == 1 else (torch.cat(parts) for parts in zip(*attacks, strict=True))
    rows_labels = repeat(labels if labels.is_floating_point() else labels.long(), "b ... -> (v b) ...", v=len(views))
    return Passes(x, x_adv, rows_labels, noted.seen_at(x), noted.seen_at(x_adv), loss, terms)


def _checked(function: str, name: str, result: Any) -> Result:
    """Require a loss and its terms."""
    parts = list(result) if isinstance(result, tuple | list) else [result]
    if len(parts) != 2 or not isinstance(parts[0], Tensor) or not isinstance(parts[1], Mapping):
        raise TypeError(
            f"{function}: `base`={name!r} must return (loss, terms), a tensor and a dict of detached scalars by name, "
            f"got {', '.join(type(part).__name__ for part in parts)}."
        )
    loss, terms = parts
    for term, value in terms.items():
        _check.tensor(function, f"{name}'s term {term!r}", value)
    return loss, dict(terms)


def logits_as_perception(model: nn.Module) -> Perceive:
    """Perception as the papers take it by default: the logits."""

    def perceive(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = forward(model, x)
        return logits, logits

    return perceive


def _watched(attack: Attack, model: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> Attack:
    """The attack, on the model itself, with a note of where it began and ended."""
    inner: Any = attack.func if isinstance(attack, functools.partial) else attack
    if not callable(inner):
        return attack  # for the base to refuse

    @functools.wraps(inner)
    def call(_: nn.Module, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        x_adv: Tensor = inner(model, x, *arguments, **options)
        if torch.is_tensor(x_adv):
            # A tensor of its own, so that what the base runs on it can be told from what it runs on x.
            x_adv = x_adv.detach() if x_adv.requires_grad or x_adv is x else x_adv
            calls.append((x, x_adv))
        return x_adv

    # Objectives may look at the keywords of a partial, so it stays one.
    return functools.partial(call, *attack.args, **attack.keywords) if isinstance(attack, functools.partial) else call


def resolved(function: str, base: Base, options: dict[str, Any]) -> Callable[..., Result]:
    """The base as a function, with its options known to it."""
    objective: Callable[..., Result]
    if callable(base):
        objective = base
    else:
        from perceptual_at import objectives  # the names of this package are complete only now

        _check.choice(function, "base", base, BASES)
        objective = getattr(objectives, base)
    parameters = inspect.signature(objective).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for option in options:
        if option not in known and not open_ended:
            takes = f"takes {', '.join(known)}" if known else "takes no options"
            raise TypeError(f"{function}: `{option}` has no effect with base={_name(objective)!r}, which {takes}.")
    return objective


def _name(objective: Callable[..., Result]) -> str:
    inner = objective.func if isinstance(objective, functools.partial) else objective
    return getattr(inner, "__name__", type(inner).__name__)


BASES: tuple[str, ...] = get_args(BaseName)
