"""Networks that take batches of one size only, as networks that take any."""

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at.models._parts import check_logits, in_mode_of


class WholeBatches(nn.Module):
    """A network that is only ever called with batches of one size; made by `whole_batches`."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for the samples of `x` alone."""
        if not len(x):
            raise ValueError("whole_batches: `x` holds no sample.")
        return torch.cat([self._whole(part) for part in torch.split(x, self.size)])

    def _whole(self, part: Tensor) -> Tensor:
        missing = self.size - len(part)
        if not missing:
            return check_logits("whole_batches", self.model(part))
        filled = torch.cat([part, part[-1:].detach().expand(missing, *part.shape[1:])])
        return check_logits("whole_batches", self.model(filled))[: len(part)]

    def extra_repr(self) -> str:
        """Show the size when the model is printed."""
        return f"size={self.size}"


def whole_batches(model: nn.Module, size: int) -> nn.Module:
    """A network that is only called with batches of `size`, made around one that takes no other.

    Exported programs, engines and captured graphs have a fixed batch size, while attacks and `evaluate` go on with
    those samples that are still in play. Smaller batches are filled up with copies of their last sample, whose outputs
    are dropped; larger ones are cut. Gradients are those of the given samples. It is not for samples that look at each
    other, such as the nodes of a graph, which are the places of one sample.

    Args:
        model: a network; modes, weights and devices are shared with it.
        size: of the batches it takes.

    Returns:
        A module, in the mode the model is in.

    Raises:
        TypeError: if `model` is no module or `size` no integer; at the call, if the model returns no tensor.
        ValueError: if `size` is below 1; at the call, if there is no sample.

    Examples:
        >>> class OnlyFour(nn.Module):
        ...     def forward(self, x):
        ...         assert len(x) == 4
        ...         return 2 * x
        >>> whole_batches(OnlyFour(), 4)(torch.ones(6, 2)).shape
        torch.Size([6, 2])
    """
    _check.module("whole_batches", model)
    _check.count("whole_batches", "size", size)
    return in_mode_of(model, WholeBatches(model, int(size)))
