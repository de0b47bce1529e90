"""The attacks of an evaluation: what they take, what they return, what they are called with."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from perceptual_at import _check
from perceptual_at._random import SampleGenerator
from perceptual_at.attacks.freeze import Model
from perceptual_at.attacks.verdict import Verdict
from perceptual_at.evaluation.fingerprints import describe
from perceptual_at.objectives.passes import Attack
from perceptual_at.threats import Threat


class Plan:
    """An attack and how to call it."""

    def __init__(self, number: int, name: str, attack: Attack) -> None:
        self.number, self.name, self.attack = number, name, attack
        self.call = describe(attack)
        options = _options(attack)
        self.takes_generator = options.get("generator", ...) is None
        self.point = {"last": "final iterate", "best": "any iterate"}.get(options.get("keep", ""), "returned point")

    def run(self, model: Model, x: Tensor, labels: Tensor, noise: SampleGenerator) -> tuple[Tensor, Verdict | None]:
        """The adversarial inputs, checked, and the verdict if there is one."""
        given = {"generator": noise.fork(self.number)} if self.takes_generator else {}
        found: Any = self.attack(model, x, labels, **given)
        verdict = found if isinstance(found, Verdict) else None
        x_adv = found if verdict is None else verdict.x_adv
        _check.same_shape("evaluate", x=x, **{f"attacks[{self.name!r}]": x_adv})
        undefined = int((~x_adv.isfinite()).reshape(len(x), -1).any(dim=1).sum())
        if undefined:
            raise ValueError(f"evaluate: attack {self.name!r} returned NaN or infinite inputs for {undefined} samples.")
        return x_adv.detach(), verdict


def _options(attack: Attack) -> dict[str, Any]:
    """The keywords an attack takes, with their defaults."""
    try:
        parameters = inspect.signature(attack).parameters.values()
    except (TypeError, ValueError):  # of a callable that has none
        return {}
    return {one.name: one.default for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)}


def threat_of(attacks: Mapping[str, Attack]) -> Threat:
    """The threat of the first attack that was given one."""
    for attack in attacks.values():
        threat = _options(attack).get("threat")
        if isinstance(threat, Threat) and not isinstance(threat, type):
            return threat
    raise ValueError(
        "evaluate: `checks` need a threat model: give one attack as functools.partial(pgd, threat=...), or call "
        "sanity_checks."
    )
