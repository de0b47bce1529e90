"""What tells one model, one sample, one data set from another, as short texts and numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_at._values import tensors_of
from perceptual_at.evaluation.fingerprints.descriptions import bytes_of, describe_model, hashed


def model_fingerprint(model: Any) -> str:
    """Hash of a model: of its structure, code, weights, buffers and hooks if it is a module.

    Wrappers for distributed training and compilation are looked through. Of any other callable the code and
    what it holds is hashed. What changes while a model runs is not, counters, caches and loggers among its globals, nor
    are plain attributes of modules: what they decide shows in the outputs.

    Args:
        model: a module or any callable.

    Returns:
        `"sha256:"` and 16 hexadecimal digits.

    Examples:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> model_fingerprint(a) == model_fingerprint(b)
        False
        >>> _ = b.load_state_dict(a.state_dict())
        >>> model_fingerprint(a) == model_fingerprint(b)
        True
    """
    text = describe_model(model)
    return text if isinstance(model, nn.Module) else hashed(text.encode())


def sample_fingerprints(x: Tensor, labels: Tensor) -> list[str]:
    """Hash of each sample: of its input and its label.

    Args:
        x: inputs, shape `(B, ...)`.
        labels: what belongs to them, shape `(B, ...)`.

    Returns:
        `B` texts of 16 hexadecimal digits.

    Examples:
        >>> first, second, third = sample_fingerprints(torch.tensor([[0.5], [0.5], [0.5]]), torch.tensor([0, 1, 0]))
        >>> first == second, first == third
        (False, True)
    """
    own = x.detach().cpu()
    texts = (str(label).encode() for label in labels.tolist()) if labels.ndim == 1 else map(bytes_of, labels)
    return [hashed(bytes_of(one), text).removeprefix("sha256:") for one, text in zip(own, texts, strict=True)]


def witness(outputs: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Two numbers of each sample's outputs by which a model is known again, and how far rounding may move them.

    Args:
        outputs: what a model returned: a tensor, or a dictionary or sequence of them.
        batch: number of samples.

    Returns:
        Inner products with two fixed vectors and their tolerances, each `(batch, 2)` in float64 on the CPU.

    Examples:
        >>> found, tolerance = witness(torch.tensor([[1.0, 2.0]]), 1)
        >>> other, _ = witness(torch.tensor([[1.0, 2.1]]), 1)
        >>> bool(((found - other).abs() > tolerance).all())
        True
    """
    parts = tensors_of(outputs)
    rows = [one.detach().reshape(batch, -1).double().cpu() for one in parts if one.ndim and len(one) == batch]
    flat = torch.cat(rows, dim=1) if rows else torch.zeros(batch, 0, dtype=torch.float64, device="cpu")
    angles = torch.arange(1, flat.shape[1] + 1, dtype=torch.float64, device="cpu")
    kinds = [torch.finfo(one.dtype).eps for one in parts if one.is_floating_point()]
    size = flat.abs().sum(dim=1, keepdim=True).nan_to_num(nan=0.0)
    tolerance = math.sqrt(max(kinds, default=0.0)) * size.clamp_min(1e-30)
    return torch.stack([flat @ angles.cos(), flat @ angles.sin()], dim=1), tolerance.expand(-1, 2)


def probe(model: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of other inputs, mirrored ones, and of the gradient there, `(B, 4)`; NaN for what a model cannot do.

    Two models may agree on clean inputs, and attacks find different things.
    """
    numbers = torch.full((len(x), 4), math.nan, dtype=torch.float64, device="cpu")
    tolerances = torch.zeros_like(numbers)
    flat = x.detach().reshape(len(x), -1)
    mirrored = (flat.amin(dim=1, keepdim=True) + flat.amax(dim=1, keepdim=True) - flat).reshape(x.shape)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            own = mirrored.clone().requires_grad_()
            outputs = model(own.clone())
            numbers[:, :2], tolerances[:, :2] = witness(outputs, len(x))
            parts = [one for one in tensors_of(outputs) if one.requires_grad]
            slopes = [
                torch.arange(one[0].numel(), device=one.device).cos().reshape(one[:1].shape).expand_as(one).to(one)
                for one in parts
            ]
            (gradient,) = torch.autograd.grad(parts, own, slopes)
            numbers[:, 2:], tolerances[:, 2:] = witness(gradient, len(x))
    except Exception:
        return numbers, tolerances  # what it can do stays the same
    return numbers, tolerances


def data_fingerprint(samples: Sequence[str]) -> str:
    """Hash of a data set, from those of its samples in order; how it was cut into batches does not matter."""
    return hashed(*(sample.encode() for sample in samples))
