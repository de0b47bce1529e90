"""Which samples sit next to the decision boundary."""

from typing import NamedTuple

from torch import Tensor

from perceptual_at import _check


class Partition(NamedTuple):
    """Three boolean masks `(B,)`, disjoint and covering the batch.

    Examples:
        >>> parts = Partition(torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([False, False]))
        >>> torch.where(parts.boundary, 0.1, 1.0)  # a smaller perturbation at the boundary
        tensor([1.0000, 0.1000])
    """

    misclassified: Tensor
    """Wrong already on the clean input."""
    boundary: Tensor
    """Right on the clean input, wrong after the reduced perturbation."""
    interior: Tensor
    """All others: right on the clean input and not at the boundary."""


def boundary_partition(
    clean_logits: Tensor, reduced_logits: Tensor, labels: Tensor, *, adv_logits: Tensor | None = None
) -> Partition:
    r"""Who is misclassified, who sits at the boundary, who is inside.

    With predictions $h(\cdot) = \arg\max f(\cdot)$ and a reduced perturbation $x''$ (`eta` times as large),

    - misclassified: $h(x) \ne y$;
    - boundary: $h(x) = y$ and $h(x'') \ne y$ (and, when `adv_logits` are given, $h(x_{\mathrm{adv}}) \ne y$);
    - interior: the rest, also samples that only the full perturbation breaks.

    The masks stay on the device; use them with `torch.where` instead of index sets. Take the logits from
    one fixed model in eval mode.

    Args:
        clean_logits: $f(x)$, shape `(B, K)`.
        reduced_logits: $f(x'')$, the same shape.
        labels: class indices, shape `(B,)`.
        adv_logits: $f(x_{\mathrm{adv}})$; given, a boundary sample must be wrong there too, as in the released
            code of RAAT. For $x'' = x + \eta (x_{\mathrm{adv}} - x)$ this removes samples that are wrong
            part-way and right again at the end.

    Returns:
        `Partition(misclassified, boundary, interior)`.

    Raises:
        TypeError: if `labels` are no integers or logits no floating-point tensors.
        ValueError: if shapes or devices differ, or labels in CPU memory are outside `[0, K)`.

    Source:
        RAAT, Sec. 4.2 and Eq. 8; `adv_logits`: its released code.

    Examples:
        >>> clean = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
        >>> reduced = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        >>> parts = boundary_partition(clean, reduced, torch.tensor([0, 0, 0]))
        >>> parts.misclassified.tolist(), parts.boundary.tolist(), parts.interior.tolist()
        ([True, False, False], [False, True, False], [False, False, True])
        >>> boundary_partition(clean, reduced, torch.tensor([0, 0, 0]), adv_logits=clean).boundary.any().item()
        False
    """
    _check.logits("boundary_partition", clean_logits=clean_logits, reduced_logits=reduced_logits)
    _check.labels("boundary_partition", labels, classes=clean_logits.shape[1], clean_logits=clean_logits)
    right = clean_logits.argmax(dim=1) == labels
    boundary = right & (reduced_logits.argmax(dim=1) != labels)
    if adv_logits is not None:
        _check.same_shape("boundary_partition", clean_logits=clean_logits, adv_logits=adv_logits)
        boundary = boundary & (adv_logits.argmax(dim=1) != labels)
    return Partition(~right, boundary, right & ~boundary)
