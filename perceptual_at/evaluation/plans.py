"""The attacks of an evaluation: what they take, what they return, what they are called with."""

import contextlib
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._random import SampleGenerator
from perceptual_at._shapes import rows
from perceptual_at.attacks.targets import loss_of
from perceptual_at.attacks.verdict import Verdict
from perceptual_at.evaluation.fingerprints.descriptions import describe_or_reason
from perceptual_at.objectives.passes import Attack
from perceptual_at.threats import Threat, is_threat, projected, select
from perceptual_at.victims import Model
from perceptual_at.victims.terms import OWN

_OF_SAMPLES = ("targets", "start", "step_size")
"""Options of attacks that may hold one entry per sample."""
_GIVES_BACK = ("apgd", "fab", "square", "auto_attack")
"""Attacks that return what they could not break as it came."""


class Plan:
    """An attack and how to call it."""

    def __init__(self, number: int, name: str, attack: Attack) -> None:
        self.number, self.name, self.attack = number, name, attack
        self.call, self.opaque = describe_or_reason(attack)
        options = _options(attack)
        self.takes_generator = options.get("generator", ...) is None
        self.generator = options.get("generator")
        self.takes_index = options.get("index", ...) is None
        self.point = {"last": "final iterate", "best": "any iterate"}.get(options.get("keep", ""), "returned point")
        threat = options.get("threat")
        self.threat = threat if is_threat(threat) else None
        self.of_samples = {name: options[name] for name in _OF_SAMPLES if _is_of_samples(options.get(name))}
        self.losses = {name: options[name] for name in ("loss", "version") if _holds_rows(options.get(name))}
        self.kind = getattr(_innermost(attack), "__name__", "")
        self.moves = self.kind not in _GIVES_BACK
        run: Any = attack.func if type(attack) is functools.partial else attack  # not what wraps one, of any kind
        home = getattr(run, "__globals__", {}).get("__name__", "")
        self.rehearses = home.startswith(OWN) and "validate" in options  # those make no pass for no samples

    def threat_of(self, index: Tensor) -> Threat | None:
        """The threat for some samples of the data."""
        return None if self.threat is None else _taken(self.name, "threat", index, lambda: select(self.threat, index))

    def can_move(self, x: Tensor, index: Tensor) -> Tensor:
        """Which samples the threat lets move at all, `(B,)`: none with a budget of 0, all where no threat is known."""
        free = torch.ones(len(x), dtype=torch.bool, device=x.device)
        with contextlib.suppress(Exception):  # only a diagnosis asks
            if (threat := self.threat_of(index)) is not None:
                ways = (rows(threat.project(x + way, x) != x).any(dim=1) for way in (1.0, -1.0))
                free = torch.stack(list(ways)).any(dim=0)
        return free

    def outside(self, x_adv: Tensor, x: Tensor, index: Tensor) -> Tensor:
        """Which inputs are beyond the threat by more than roundings, `(B,)`.

        Where no threat is known, those that leave [0, 1] although all clean ones are in it.
        """
        found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        with contextlib.suppress(Exception):  # only a diagnosis asks
            if (threat := self.threat_of(index)) is not None:
                allowed = projected(threat, x_adv.clone(), x)
            else:
                allowed = x_adv.clamp(0, 1) if bool(((x >= 0) & (x <= 1)).all()) else x_adv
            few = 4 * torch.finfo(x.dtype).eps * x.abs().amax().clamp_min(1)
            found = rows((allowed - x_adv).abs() > few).any(dim=1)
        return found

    def rehearse(self, model: Model, x: Tensor, labels: Tensor, index: Tensor) -> None:
        """Have an attack of the library look at its options, also at those for the samples, without a pass."""
        self._given(index, x, 0)
        if self.rehearses:
            given = {"generator": _undrawn(self.generator)} if self.generator is not None else {}
            self.attack(model, x[:0], labels[:0], **given, **self._given(index[:0], x, 0))

    def run(self, model: Model, x: Tensor, labels: Tensor, index: Tensor, seed: int) -> tuple[Tensor, Verdict | None]:
        """The adversarial inputs, checked, and the verdict if there is one."""
        given = self._given(index, x, seed)
        try:
            found: Any = self.attack(model, x.clone(), labels.clone(), **given)  # which an attack may write to
        except TypeError as error:
            if not (self.takes_generator and SampleGenerator.__name__ in str(error)):
                raise
            raise TypeError(
                f"evaluate: attack {self.name!r} was given a `SampleGenerator` as its `generator`, one stream per "
                "sample, which torch's own functions do not take; draw by its methods, or bind a torch.Generator: "
                "functools.partial(attack, generator=torch.Generator())."
            ) from error
        verdict = found if isinstance(found, Verdict) else None
        x_adv = found if verdict is None else verdict.x_adv
        _check.same_shape("evaluate", x=x, **{f"attacks[{self.name!r}]": x_adv})
        if x_adv.dtype != x.dtype:
            raise ValueError(
                f"evaluate: attack {self.name!r} must return inputs of {x.dtype}, as it was given, got {x_adv.dtype}; "
                "the model is judged on exactly what it returns: end it with `x_adv.to(x.dtype)`."
            )
        undefined = int(rows(~x_adv.isfinite()).any(dim=1).sum())
        if undefined:
            raise ValueError(f"evaluate: attack {self.name!r} returned NaN or infinite inputs for {undefined} samples.")
        return x_adv.detach(), verdict

    def _given(self, index: Tensor, x: Tensor, seed: int) -> dict[str, Any]:
        """The options that belong to some samples of the data."""
        given: dict[str, Any] = {}
        if self.takes_generator:
            given["generator"] = SampleGenerator(seed, index).fork(self.number)
        if self.takes_index:
            given["index"] = index.to(x.device)
        threat = self.threat_of(index)
        if threat is not self.threat:
            given["threat"] = threat
        for name, values in self.of_samples.items():
            given[name] = _taken(self.name, name, index, functools.partial(_rows_of, values, index))
        for name, loss in self.losses.items():
            given[name] = _taken(self.name, "loss", index, functools.partial(_loss_rows, loss, index))
        return given


def first_threat(plans: Sequence[Plan]) -> Plan | None:
    """The first attack that was given a threat model."""
    return next((plan for plan in plans if plan.threat is not None), None)


def _undrawn(generator: Any) -> Any:
    """A generator of the same kind, for no samples, from which drawing leaves the given one as it is."""
    if isinstance(generator, torch.Generator):
        return torch.Generator(generator.device)
    return generator.take(generator.index[:0]) if isinstance(generator, SampleGenerator) else generator


def _rows_of(values: Tensor, index: Tensor) -> Tensor:
    return values[index.to(values.device)]


def _holds_rows(loss: Any) -> bool:
    """Whether a loss, or one among the attacks of an ensemble, holds something for each sample."""
    if isinstance(loss, list | tuple):
        return any(_holds_rows(part) for part in loss)
    return _holds_rows(loss.get("loss")) if isinstance(loss, Mapping) else callable(getattr(loss, "select", None))


def _loss_rows(loss: Any, index: Tensor) -> Any:
    """The same for some samples of the data."""
    if isinstance(loss, list | tuple):
        return type(loss)(_loss_rows(part, index) for part in loss)
    if isinstance(loss, Mapping):
        return {name: _loss_rows(value, index) if name == "loss" else value for name, value in loss.items()}
    return loss_of(loss, index)


def _taken(attack: str, name: str, index: Tensor, take: Any) -> Any:
    """The entries that belong to some samples."""
    try:
        return take()
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"evaluate: `{name}` of attack {attack!r} has one entry per sample, and none for sample "
            f"{int(index.max())}: it must hold one for every sample of the data, in the order of their indices."
        ) from error


def _is_of_samples(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _innermost(attack: Any) -> Any:
    while isinstance(attack, functools.partial):
        attack = attack.func
    return attack


def _options(attack: Attack) -> Mapping[str, Any]:
    """The keywords an attack takes, with their defaults."""
    try:
        parameters = inspect.signature(attack).parameters.values()
    except (TypeError, ValueError):  # of a callable that has none
        return {}
    return {one.name: one.default for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)}
