"""What logits say of a sample: right, wrong, or nothing at all."""

from torch import Tensor


def undefined(logits: Tensor) -> Tensor:
    """Logits with NaN, boolean `(B,)`: no prediction, so neither right nor wrong."""
    return logits.flatten(1).isnan().any(dim=1)


def misclassified(logits: Tensor, labels: Tensor, unknown: Tensor | None = None) -> Tensor:
    """Taken for another class than the label, boolean `(B,)`; logits with NaN (`unknown`, if known) are no verdict."""
    return (logits.argmax(dim=1) != labels) & ~(undefined(logits) if unknown is None else unknown)


def classified(logits: Tensor, labels: Tensor, unknown: Tensor | None = None) -> Tensor:
    """Taken for the class of the label, boolean `(B,)`; logits with NaN (`unknown`, if known) are no verdict."""
    return (logits.argmax(dim=1) == labels) & ~(undefined(logits) if unknown is None else unknown)
