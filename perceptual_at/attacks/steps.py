"""One ascent step inside a threat model."""

from torch import Tensor

from perceptual_at._shapes import per_sample
from perceptual_at.threats import Threat


def ascended(threat: Threat, x_adv: Tensor, x: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
    """The allowed point one step up from `x_adv`: by the threat's own step, or along its steepest direction."""
    own = getattr(threat, "step", None)
    if own is not None:
        point: Tensor = own(x_adv, x, grad, step_size)
        return point
    length = per_sample(step_size.to(x), x) if isinstance(step_size, Tensor) else step_size
    return threat.project(x_adv + length * threat.steepest(grad), x)
