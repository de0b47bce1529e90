"""RAAT's alignment term: domain interpolation consistency adversarial regularisation (DICAR)."""

import math
from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._places import over_places
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import common, wide
from perceptual_at._shapes import rows
from perceptual_at.divergences import js_of_logs, log_distribution, log_sum
from perceptual_at.paths import fraction, mixture


def dicar_loss(
    mixed_logits: Tensor,
    clean_logits_1: Tensor,
    clean_logits_2: Tensor,
    *,
    mix: float | Tensor,
    space: Literal["probabilities", "logits"] = "probabilities",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    average_over: Literal["selected", "all"] = "selected",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How far the prediction of mixed adversarial views is from the mixture of the clean predictions.

    For two augmentations $x_1, x_2$ of an image and their adversarial versions,

    $$ \ell = \mathrm{JS}\big( p(\beta x_1^{\mathrm{adv}} + (1 - \beta) x_2^{\mathrm{adv}}),\
              \beta\, p(x_1) + (1 - \beta)\, p(x_2) \big), \qquad p = \mathrm{softmax}(f / T), $$

    where $\beta$ is `mix`. `space="logits"` mixes $f(x_1)$ and $f(x_2)$ before the softmax, as the
    released code does (with $T = 0.5$). The two have different zero sets: a model whose logits are affine
    on the path has zero loss in logit space only. Gradients flow into all three arguments.

    Args:
        mixed_logits: $f(\beta x_1^{\mathrm{adv}} + (1 - \beta) x_2^{\mathrm{adv}})$, shape `(B, K)`, or dense
            `(B, K, *S)`, for views that show the same at each place.
        clean_logits_1: $f(x_1)$, the same shape.
        clean_logits_2: $f(x_2)$, the same shape.
        mix: weight of view 1 in [0, 1], the one used for the inputs; a tensor `(B,)` is taken as it is.
        space: where the clean predictions are mixed: `"probabilities"` as in Eq. 15, or `"logits"` as in the released
            code.
        temperature: divides all logits that are compared; 0.5 in the released code.
        mask: boolean mask `(B,)` of the pairs that count, or `(B, *S)` of their places; the others give exactly 0, and
            a pair's value is the mean over those of its places that count.
        average_over: with `reduction="mean"`, divide by the number of `"selected"` pairs (the released code) or
            of `"all"` pairs (the paper's average over n samples).
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss in nats, in [0, log 2]; exactly 0 when no pair is kept.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if shapes or devices differ, `mix` is outside [0, 1], `temperature` is not positive, `mask`
            is no boolean mask, a word is unknown, or `average_over="all"` comes with another reduction.

    Source:
        RAAT, Eq. 15 and 16; `space="logits"`, `temperature=0.5`, `average_over="selected"`: its released code.

    Examples:
        >>> right, left = torch.tensor([[0.0, 100.0]]), torch.tensor([[100.0, 0.0]])
        >>> dicar_loss(torch.zeros(1, 2), right, left, mix=0.5)  # half and half, and predicted so
        tensor(0.)
        >>> dicar_loss(left, right, right, mix=0.5)  # disjoint: log 2
        tensor(0.6931)
    """
    name = "dicar_loss"
    _check.logits(name, mixed_logits=mixed_logits, clean_logits_1=clean_logits_1, clean_logits_2=clean_logits_2)
    _check.choice(name, "space", space, ("probabilities", "logits"))
    _check.choice(name, "average_over", average_over, ("selected", "all"))
    _check.number(name, "temperature", temperature, above=0.0)
    if average_over == "all" and reduction != "mean":
        raise ValueError(f"{name}: `average_over`='all' has no effect with `reduction`={reduction!r}.")
    if mask is not None:
        _check.mask(name, "mask", mask, places=mixed_logits.shape[2:], mixed_logits=mixed_logits)
    given = mixed_logits, clean_logits_1, clean_logits_2
    dtype = common(*given)
    mixed, clean_1, clean_2 = (logits.to(wide(*given)) for logits in given)
    weight = fraction(name, "mix", mix, mixed)
    if space == "logits":
        target = log_distribution(mixture(clean_1, clean_2, weight), temperature)
    else:
        lowest = torch.finfo(mixed.dtype).min  # the sum of two minus infinities has no gradient
        target = log_sum(
            (_log(weight) + log_distribution(clean_1, temperature)).clamp_min(lowest),
            (_log(1 - weight) + log_distribution(clean_2, temperature)).clamp_min(lowest),
        )
    per_sample = over_places(js_of_logs(log_distribution(mixed, temperature), target), mask)
    if mask is None or average_over == "all" or reduction != "mean":
        return reduce(name, per_sample.to(dtype), reduction)
    return (per_sample.sum() / rows(mask).any(dim=1).sum().clamp_min(1)).to(dtype)


def _log(weight: float | Tensor) -> float | Tensor:
    """Logarithm of a weight in [0, 1]; a weight of 0 removes its view."""
    if isinstance(weight, Tensor):
        return weight.log()
    return math.log(weight) if weight > 0 else -math.inf
