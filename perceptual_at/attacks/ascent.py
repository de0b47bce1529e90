"""Loss values and input gradients of the model under attack."""

from typing import Any

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._rounding import wide
from perceptual_at.attacks.freeze import Model
from perceptual_at.attacks.targets import AttackLoss


class Ascent:
    """What an attack asks of a model; what model and loss return is checked at the first call.

    Args:
        function: the name that errors speak of.
        model: maps inputs to logits.
        labels: class indices or probabilities.
        loss: per-sample function of logits and labels.
        label_range: smallest and largest label where known, to compare with the number of classes.
    """

    def __init__(
        self, function: str, model: Model, labels: Tensor, loss: AttackLoss, label_range: tuple[int, int] | None
    ) -> None:
        self.function, self.model, self.labels, self.loss = function, model, labels, loss
        self.label_range, self.checked = label_range, False

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each sample, and the gradient of their sum: one forward and one input-gradient pass."""
        x = x.detach().requires_grad_()
        values = self._values(x)
        grad = torch.autograd.grad(values.sum(), x, allow_unused=True)[0] if values.requires_grad else None
        if grad is None:
            raise ValueError(
                f"{self.function}: the model's output has no gradient with respect to its input; it must be computed "
                "from `x` by differentiable operations, outside torch.no_grad()."
            )
        # A sample whose gradient is undefined stays where it is instead of becoming NaN.
        return values.detach(), grad.nan_to_num(nan=0.0)

    def value(self, x: Tensor) -> Tensor:
        """Loss of each sample: one forward pass."""
        with torch.no_grad():
            return self._values(x)

    def _values(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        if not self.checked:
            self._check_logits(logits, x.shape[0])
        values = self.loss(logits.to(wide(logits)), self.labels)
        if not self.checked:
            self._check_values(values, x.shape[0])
            self.checked = True
        return values

    def _check_logits(self, logits: Any, batch: int) -> None:
        if not isinstance(logits, Tensor):
            raise TypeError(f"{self.function}: `model` must return a tensor of logits, got {type(logits).__name__}.")
        if logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
            raise ValueError(
                f"{self.function}: `model` must return logits of shape ({batch}, K) with K >= 2 classes, got shape "
                f"{tuple(logits.shape)}."
            )
        if self.labels.ndim == 2 and self.labels.shape != logits.shape:
            raise ValueError(
                f"{self.function}: `labels` are class probabilities of shape {tuple(self.labels.shape)} but `model` "
                f"returns logits of shape {tuple(logits.shape)}; the two must be equal."
            )
        if self.label_range is not None:
            _check.label_range(self.function, *self.label_range, logits.shape[1])

    def _check_values(self, values: Any, batch: int) -> None:
        if not isinstance(values, Tensor) or values.shape != (batch,):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"{self.function}: `loss` must return one value per sample, shape ({batch},), got {got}; with torch's "
                "losses pass reduction='none'."
            )
