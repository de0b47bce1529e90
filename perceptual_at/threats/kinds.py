"""What kind a threat model is, for attacks, records and checks that know some of them."""

import dataclasses
from typing import Any

from torch import Tensor

from perceptual_at.threats.ball import Ball
from perceptual_at.threats.l1 import L1
from perceptual_at.threats.l2 import L2
from perceptual_at.threats.linf import Linf
from perceptual_at.threats.threat import Threat


def is_ball(threat: Any) -> bool:
    """Whether a threat model is `Linf`, `L2` or `L1`, or one made of them."""
    return isinstance(threat, Ball)


def as_ball(function: str, threat: Any) -> Linf | L2 | L1:
    """Require `Linf`, `L2` or `L1`, whose geometry an attack is written for."""
    if not isinstance(threat, Linf | L2 | L1):
        raise TypeError(f"{function}: `threat` must be Linf, L2 or L1, got {threat!r}; there is no form for others.")
    return threat


def is_published(threat: Any) -> bool:
    """Whether a threat is one of the three balls itself, with one number for `eps` and the box [0, 1]."""
    return (
        type(threat) in (Linf, L2, L1)
        and not isinstance(threat.eps, Tensor)
        and not any(isinstance(bound, Tensor) for bound in threat.bounds)
        and threat.bounds == (0.0, 1.0)
    )


def as_released(threat: Linf | L2 | L1) -> Linf | L2 | L1:
    """The same set, projected onto in the order of AutoAttack's code."""
    return dataclasses.replace(threat, projection="ball_box") if isinstance(threat, L2) else threat


def norm_name(threat: Any) -> str:
    """`"Linf"`, `"L2"` or `"L1"`; of another threat model its class."""
    return type(threat).__name__


def settings(threat: Any) -> dict[str, Any]:
    """Norm, budget and bounds as numbers and lists, for records."""
    return {
        "norm": norm_name(threat),
        "eps": _listed(getattr(threat, "eps", None)),
        "bounds": [_listed(bound) for bound in getattr(threat, "bounds", ())],
    }


def whole_box(threat: Threat, x: Tensor) -> Threat:
    """The same kind of threat, large enough to reach everything; of a user's own with a hundred times the budget."""
    return threat.whole_box(x) if isinstance(threat, Ball) else threat.scaled(100.0)


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
