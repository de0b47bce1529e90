"""What an attack asks of the model: logits, and losses with their input gradients."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._rounding import cast_toward, wide
from perceptual_at.attacks.freeze import Model
from perceptual_at.attacks.twins import FastModel
from perceptual_at.divergences import PerSampleLoss
from perceptual_at.threats import Threat


class Answer(NamedTuple):
    """Loss of each sample, the gradient of their sum, and the logits they came from."""

    values: Tensor
    grad: Tensor
    logits: Tensor


class Queries:
    """A model under attack; what model and loss return is checked at the first call.

    In a lane, gradients and losses are those of the lane, and logits those of the model itself.

    Args:
        function: the name that errors speak of.
        model: maps inputs to logits.
        label_range: smallest and largest label where known, to compare with the number of classes.
        eot: how many passes make one answer, the mean of theirs; for models that are random.
        labels_are: what errors call the labels.
    """

    def __init__(
        self,
        function: str,
        model: Model,
        label_range: tuple[int, int] | None,
        *,
        eot: int = 1,
        labels_are: str = "labels",
    ) -> None:
        self.function, self.model, self.label_range, self.eot = function, model, label_range, eot
        self.exact = model.exact if isinstance(model, FastModel) else model
        self.labels_are = labels_are
        self.logits_checked = self.values_checked = False

    def gradient(self, x: Tensor, labels: Tensor, loss: PerSampleLoss) -> Answer:
        """One forward and one input-gradient pass."""
        return Answer(*_mean([self._gradient(x, labels, loss) for _ in range(self.eot)]))

    def value(self, x: Tensor, labels: Tensor, loss: PerSampleLoss) -> tuple[Tensor, Tensor]:
        """Loss of each sample and the logits: one forward pass."""
        with torch.no_grad():
            passes = [self._logits(self.model, x, labels) for _ in range(self.eot)]
            values, logits = _mean([(self._values(logits, labels, loss), logits) for logits in passes])
            return values, logits

    def guess(self, x: Tensor, labels: Tensor) -> Tensor:
        """Logits by one forward pass, to search with; at least float32."""
        with torch.no_grad():
            return self._logits(self.model, x, labels)

    def logits(self, x: Tensor, labels: Tensor) -> Tensor:
        """Logits by one forward pass, to judge by; at least float32."""
        with torch.no_grad():
            (logits,) = _mean([(self._logits(self.exact, x, labels),) for _ in range(self.eot)])
            return logits

    @property
    def confirms(self) -> bool:
        """Whether what a search finds has yet to be confirmed by the model itself."""
        return self.exact is not self.model

    def logits_to_differentiate(self, x: Tensor, labels: Tensor) -> Tensor:
        """One forward pass that keeps its graph; `x` must require a gradient."""
        return self._logits(self.model, x, labels)

    def pull_back(
        self, total: Tensor, x: Tensor, *, weights: Tensor | None = None, retain_graph: bool = False
    ) -> Tensor:
        """Gradient of `total`, or of its inner product with `weights`: one input-gradient pass."""
        grad = None
        if total.requires_grad:
            grad = torch.autograd.grad(total, x, weights, allow_unused=True, retain_graph=retain_graph)[0]
        if grad is None:
            raise ValueError(
                f"{self.function}: the model's output has no gradient with respect to its input; it must be computed "
                "from `x` by differentiable operations, outside torch.no_grad()."
            )
        # A sample whose gradient is undefined stays where it is instead of becoming NaN.
        return grad.nan_to_num(nan=0.0)

    def _gradient(self, x: Tensor, labels: Tensor, loss: PerSampleLoss) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        raw = self._checked(self.model, x, labels)
        logits = raw.to(wide(raw))
        if raw.dtype != torch.float16:
            values = self._values(logits, labels, loss)
            return values.detach(), self.pull_back(values.sum(), x), logits.detach()
        logits = logits.detach().requires_grad_()
        values = self._values(logits, labels, loss)
        slope = leveled(self.pull_back(values.sum(), logits))
        return values.detach(), self.pull_back(raw, x, weights=slope.to(raw.dtype)), logits.detach()

    def _logits(self, model: Model, x: Tensor, labels: Tensor) -> Tensor:
        raw = self._checked(model, x, labels)
        return raw.to(wide(raw))

    def _checked(self, model: Model, x: Tensor, labels: Tensor) -> Tensor:
        """Logits as the model gives them."""
        logits = model(x)
        if not self.logits_checked:
            check_logits(self.function, logits, x.shape[0], labels)
            if self.label_range is not None:
                _check.label_range(self.function, *self.label_range, logits.shape[1], name=self.labels_are)
            self.logits_checked = True
        return logits

    def _values(self, logits: Tensor, labels: Tensor, loss: PerSampleLoss) -> Tensor:
        values = loss(logits, labels)
        if not self.values_checked:
            check_values(self.function, values, logits.shape[0])
            self.values_checked = True
        return values


def check_logits(function: str, logits: Any, batch: int, labels: Tensor) -> None:
    """Require logits `(B, K)` of as many samples as the batch has, and of the classes that labels have."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{function}: `model` must return a tensor of logits, got {type(logits).__name__}.")
    if logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
        raise ValueError(
            f"{function}: `model` must return logits of shape ({batch}, K) with K >= 2 classes, got shape "
            f"{tuple(logits.shape)}."
        )
    if labels.ndim == 2 and labels.shape != logits.shape:
        raise ValueError(
            f"{function}: `labels` are class probabilities of shape {tuple(labels.shape)} but `model` "
            f"returns logits of shape {tuple(logits.shape)}; the two must be equal."
        )


def check_values(function: str, values: Any, batch: int) -> None:
    """Require one loss per sample."""
    if not isinstance(values, Tensor) or values.shape != (batch,):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"{function}: `loss` must return one value per sample, shape ({batch},), got {got}; with torch's "
            "losses pass reduction='none'."
        )


def leveled(slope: Tensor) -> Tensor:
    """Slopes of logits `(B, K)`, scaled for each sample so that the largest entry is 1.

    In float16 the slope of a confident sample would vanish on its way to the input. Attacks follow a gradient's
    direction, so each sample may be given a slope of its own.
    """
    steepest = slope.abs().amax(dim=1, keepdim=True)
    return slope / torch.where(steepest > 0, steepest, torch.ones_like(steepest))


def _mean(passes: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    if len(passes) == 1:
        return passes[0]
    return tuple(torch.stack(parts).mean(dim=0) for parts in zip(*passes, strict=True))


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """Taken for another class than the label, boolean `(B,)`; logits with NaN are no verdict."""
    return (logits.argmax(dim=1) != labels) & ~logits.isnan().any(dim=1)


def classified(logits: Tensor, labels: Tensor) -> Tensor:
    """Taken for the class of the label, boolean `(B,)`; logits with NaN are no verdict."""
    return (logits.argmax(dim=1) == labels) & ~logits.isnan().any(dim=1)


def visible(point: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """The point in the dtype of the inputs: what the model sees and the caller gets."""
    return point if point.dtype == x.dtype else cast_toward(threat.project(point, x), x)
