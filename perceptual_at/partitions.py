"""Which samples sit next to the decision boundary."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._places import right, wrong
from perceptual_at._values import same


class Partition(NamedTuple):
    """Three boolean masks `(B,)`, disjoint and covering the batch; of dense labels `(B, *S)`, what is labelled.

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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partition) and all(same(a, b) for a, b in zip(self, other, strict=True))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple(mask.shape for mask in self))


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
        clean_logits: $f(x)$, shape `(B, K)`, or dense `(B, K, *S)`. Logits with NaN are wrong.
        reduced_logits: $f(x'')$, the same shape.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label: such a place is in none of the masks.
        adv_logits: $f(x_{\mathrm{adv}})$; given, a boundary sample must be wrong there too, as in the released
            code of RAAT. For $x'' = x + \eta (x_{\mathrm{adv}} - x)$ this removes samples that are wrong
            part-way and right again at the end.

    Returns:
        `Partition(misclassified, boundary, interior)`.

    Raises:
        TypeError: if `labels` are no integers or logits no floating-point tensors.
        ValueError: if shapes or devices differ, or labels in CPU memory are outside `[0, K)`.

    Source:
        RAAT, Sec. C.1 and Eq. 8; `adv_logits`: its released code.

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
    labels = _check.indices("boundary_partition", labels, clean_logits=clean_logits)
    clean_right = right(clean_logits, labels)
    boundary = clean_right & ~right(reduced_logits, labels)
    if adv_logits is not None:
        _check.same_shape("boundary_partition", clean_logits=clean_logits, adv_logits=adv_logits)
        boundary = boundary & ~right(adv_logits, labels)
    return Partition(wrong(clean_logits, labels), boundary, clean_right & ~boundary)


def adaptive_eta(path_logits: Tensor, labels: Tensor, *, etas: Sequence[float]) -> Tensor:
    r"""For each sample the smallest of some reductions at which it is still misclassified.

    $$ \eta_i = \min \{ \eta : h(x_i + \eta (x_i^{\mathrm{adv}} - x_i)) \ne y_i \} $$

    and 1 where there is none.

    Our own proposal, in place of RAAT's one $\eta$ for all: pass it to the objectives as `eta`, one per sample. Every
    sample that the attack breaks is then trained on just beyond its boundary, and what withstands it on the full
    perturbation. A sample that is wrong on $x$ itself mostly gets the smallest one.

    Args:
        path_logits: logits at each of the reductions, shape `(E, B, K)`, from one fixed model in eval mode. Logits with
            NaN are wrong.
        labels: class indices `(B,)`.
        etas: the reductions, E numbers in (0, 1], growing.

    Returns:
        One of `etas`, or 1, for each sample, shape `(B,)`, in the dtype of the logits.

    Raises:
        TypeError: if `labels` are no integers or logits no floating-point tensor.
        ValueError: if shapes do not fit, or `etas` are out of range or not growing.

    Source:
        Our own. On digits it did not help; the page on combining methods has the numbers.

    Examples:
        >>> right, wrong = [1.0, 0.0], [0.0, 1.0]
        >>> path = torch.tensor([[right, right, wrong], [wrong, right, right]])  # at 0.25 and at 0.5
        >>> adaptive_eta(path, torch.tensor([0, 0, 0]), etas=(0.25, 0.5))
        tensor([0.5000, 1.0000, 0.2500])
    """
    name = "adaptive_eta"
    _check.floating(name, path_logits=path_logits)
    if not _check.is_sequence(etas):
        raise TypeError(f"{name}: `etas` must be a sequence of numbers, got {type(etas).__name__}.")
    if path_logits.ndim != 3 or path_logits.shape[0] != len(etas) or not len(etas):
        raise ValueError(
            f"{name}: `path_logits` must be of shape (E, B, K) with one entry for each of the {len(etas)} `etas`, got "
            f"{tuple(path_logits.shape)}."
        )
    for eta in etas:
        _check.number(name, "etas", eta, above=0.0, at_most=1.0)
    if any(later <= earlier for earlier, later in itertools.pairwise(etas)):
        raise ValueError(f"{name}: `etas` must grow, got {tuple(etas)}.")
    labels = _check.labels(name, labels, classes=path_logits.shape[2], path_logits=path_logits[0])
    withstood = right(path_logits.movedim(2, 1), labels)
    choices = torch.tensor(tuple(etas), dtype=path_logits.dtype, device=path_logits.device)[:, None]
    return torch.where(~withstood, choices, torch.ones_like(choices)).amin(dim=0)
