"""GradAlign: two input gradients of one sample should point the same way."""

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._reduce import Reduction, masked, reduce
from perceptual_at._rounding import common, divisor, wide
from perceptual_at._shapes import rows
from perceptual_at.divergences import cosine_distance


def grad_align_loss(gradient_1: Tensor, gradient_2: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""How far apart the directions of two input gradients of the same samples are.

    $$ \ell = 1 - \cos\big( \nabla_x \mathrm{CE}(f(x), y),\ \nabla_x \mathrm{CE}(f(x + \eta), y) \big) $$

    A cross entropy that is linear there has none; single-step training that overfits catastrophically has much of it.
    The second gradient must have been taken with `create_graph=True`, or the loss has nothing to train. The length of a
    gradient does not count, so gradients of a summed and of a mean loss give the same value.

    Args:
        gradient_1: input gradients, shape `(B, ...)`; at `x` in the paper, without history in the released code.
        gradient_2: the same at a random point beside `x`, the same shape.
        reduction: `"none"` gives shape `(B,)`; `"sum"` and `"mean"` reduce over the batch. The mean runs over the
            samples whose two gradients are not zero, as released; it is 0 where there are none (nan there).

    Returns:
        The loss, in [0, 2], a scalar unless `reduction="none"`; 0 for samples with a zero gradient.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if shapes or devices differ.

    Source:
        Andriushchenko and Flammarion 2020 (GradAlign); the treatment of zero gradients is that of their code.

    Examples:
        >>> grad_align_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))  # a right angle
        tensor(1.)
        >>> grad_align_loss(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        tensor(2.)
    """
    name = "grad_align_loss"
    _check.same_shape(name, gradient_1=gradient_1, gradient_2=gradient_2)
    given = gradient_1, gradient_2
    directions = [_direction(gradient.to(wide(*given))) for gradient in given]
    counts = torch.stack([direction.detach().any(dim=1) for direction in directions]).all(dim=0)
    per_sample = masked(cosine_distance(*directions), counts)
    if reduction != "mean":
        return reduce(name, per_sample.to(common(*given)), reduction)
    return (per_sample.sum() / counts.sum().clamp_min(1)).to(common(*given))


def _direction(gradient: Tensor) -> Tensor:
    """The gradient of each sample over its largest entry: gradients of confident samples are tiny."""
    flat = rows(gradient)
    if not flat.shape[1]:
        return flat
    largest = flat.detach().abs().amax(dim=1, keepdim=True)
    return flat / divisor(largest)
