"""What attacks that are made for norm balls ask of a threat model."""

from typing import Any

from torch import Tensor

from perceptual_at._rounding import wide
from perceptual_at.threats import L1, L2, Linf


def check_ball(function: str, threat: Any) -> None:
    """Require `Linf`, `L2` or `L1` itself."""
    if type(threat) not in (Linf, L2, L1):
        raise TypeError(f"{function}: `threat` must be Linf, L2 or L1, got {threat!r}; there is no form for others.")


def budgets(function: str, threat: Linf | L2 | L1, x: Tensor) -> Tensor:
    """The `eps` of each sample, shape `(B,)`, in the dtype to compute in."""
    if not isinstance(threat.eps, Tensor):
        return x.new_full((x.shape[0],), threat.eps, dtype=wide(x))
    if len(threat.eps) != x.shape[0]:
        raise ValueError(
            f"{function}: `threat` has {len(threat.eps)} values of `eps` but `x` has {x.shape[0]} samples; there must "
            "be one for each, or one number for all."
        )
    return threat.eps.to(x.device, wide(x))
