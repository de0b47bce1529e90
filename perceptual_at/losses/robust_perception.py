"""RPAT's terms: perception should change evenly along the straight path from clean to adversarial."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import common, divisor, wide
from perceptual_at.divergences import DISTRIBUTIONS, Criterion, Divergence, kl_divergence, named, without_absent
from perceptual_at.paths import fraction


def robust_perception_loss(
    clean_logits: Tensor,
    mid_logits: Tensor,
    adv_logits: Tensor,
    *,
    alpha: float | Tensor = 0.5,
    criterion: Criterion | Divergence = "mse",
    form: Literal["quotient", "interpolation", "relative"] = "quotient",
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How unevenly perception moves along the straight path from clean to adversarial.

    With $x_\alpha = x + \alpha (x_{\mathrm{adv}} - x)$, the form `"quotient"` compares the speed before
    $x_\alpha$ with the speed after it,

    $$ \ell = D\Big( \frac{f(x_\alpha) - f(x)}{\alpha},\ \frac{f(x_{\mathrm{adv}}) - f(x_\alpha)}{1 - \alpha} \Big), $$

    and the form `"interpolation"` compares the middle with the chord between the ends,

    $$ \ell = D\big( f(x_\alpha),\ (1 - \alpha) f(x) + \alpha f(x_{\mathrm{adv}}) \big). $$

    The form `"relative"`, our own, measures the distance from the chord in units of the chord's length,

    $$ \ell = \frac{r^2}{r^2 + c^2}, \qquad r^2 = \| f(x_\alpha) - (1 - \alpha) f(x) - \alpha f(x_{\mathrm{adv}}) \|^2,
       \quad c^2 = \| f(x_{\mathrm{adv}}) - f(x) \|^2, $$

    so that it does not shrink with the logits: 0 on the chord, 1/2 as far from it as it is long, at most 1, where
    the ends are equal and the middle is not, and 0 with zero gradient where nothing moves at all. It takes no other
    criterion.

    Under MSE the first two are zero exactly when $f(x_\alpha)$ lies on the chord, and quotient = interpolation
    / $(\alpha (1 - \alpha))^2$: 16 times as much at `alpha=0.5`. Gradients flow into all three arguments;
    detach what you hold fixed.

    Args:
        clean_logits: $f(x)$, shape `(B, K)` or dense `(B, K, *S)`, or any perception tensor `(B, ...)` such as an
            inner layer's. A class whose logit is minus infinity in all three does not count.
        mid_logits: $f(x_\alpha)$ for the same `alpha`, the same shape.
        adv_logits: $f(x_{\mathrm{adv}})$, the same shape.
        alpha: place on the path; 0 is clean, 1 is adversarial. Open interval (0, 1) for `"quotient"`. A tensor
            of shape `(B,)` gives each sample its own; its values are not checked.
        criterion: $D(a, b)$: `"mse"` (mean over entries), `"kl"` for $\mathrm{KL}(b \,\|\, a)$, `"reverse_kl"` for
            $\mathrm{KL}(a \,\|\, b)$ as Eq. 3 orders them, `"js"`, `"cosine"`, or a function `(a, b) -> (B,)`. With
            places, see `perceptual_at.divergences`.
        form: `"quotient"` (the paper's Eq. 3), `"interpolation"` (the released code) or `"relative"` (our own).
        temperature: divides what `"kl"`, `"reverse_kl"` and `"js"` compare; refused for the other criteria.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if shapes or devices differ, a number is out of range, a word is unknown, or an option would have no
            effect.

    Source:
        RPAT, Definition 1 and Eq. 3; criteria: Fig. 4a; perception tensors: Table 5.

    Examples:
        >>> clean, adv = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> robust_perception_loss(clean, torch.tensor([[1.0, 1.0]]), adv)  # on the chord
        tensor(0.)
        >>> robust_perception_loss(clean, clean, adv)  # all movement in the second half: speeds 0 and 4
        tensor(16.)
        >>> robust_perception_loss(clean, clean, adv, form="interpolation")
        tensor(1.)
        >>> robust_perception_loss(clean, clean, adv, form="relative")  # 2 / (2 + 8)
        tensor(0.2000)
    """
    name = "robust_perception_loss"
    _check.same_shape(name, clean_logits=clean_logits, mid_logits=mid_logits, adv_logits=adv_logits)
    divergence = comparison(name, alpha, criterion, form, temperature)
    given = clean_logits, mid_logits, adv_logits
    (clean, mid, adv), absent = without_absent(*(logits.to(wide(*given)) for logits in given))
    weight = fraction(name, "alpha", alpha, clean)
    if form == "quotient":
        a, b = (mid - clean) / weight, (adv - mid) / (1 - weight)
    else:
        a, b = mid, torch.lerp(clean, adv, weight)
    if criterion in DISTRIBUTIONS:
        a, b = (value.masked_fill(absent, -math.inf) for value in (a, b))
    per_sample = divergence(a, b)
    if form == "relative":
        per_sample = _share(per_sample, divergence(clean, adv))
    _check_per_sample(name, per_sample, clean.shape[0])
    return reduce(name, per_sample.to(common(*given)), reduction)


def robust_perception_kl_loss(
    clean_logits: Tensor,
    mid_logits: Tensor,
    adv_logits: Tensor,
    *,
    alpha: float = 0.5,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How far the adversarial prediction is from the one that the first part of the path announces.

    $$ \ell = \mathrm{KL}\big( \mathrm{softmax}(f(x_\alpha) - (1 - \alpha) f(x)) \,\big\|\,
              \mathrm{softmax}(\alpha f(x_{\mathrm{adv}})) \big) $$

    The chord condition of `robust_perception_loss`, solved for the adversarial end. Zero on the chord, and
    wherever the two sides differ by a constant. In RPAT++ the first two logits come from the averaged model
    under `no_grad`, so that only the third gets a gradient.

    Args:
        clean_logits: $f(x)$ (of the averaged model), shape `(B, K)` or dense `(B, K, *S)`.
        mid_logits: $f(x_\alpha)$ (of the averaged model), the same shape.
        adv_logits: $f(x_{\mathrm{adv}})$ of the model in training, the same shape.
        alpha: place on the path, in (0, 1].
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss in nats, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if shapes or devices differ, or `alpha` is outside (0, 1].

    Source:
        RPAT, Sec. 5.3; the formula is that of the released code, the paper prints none.

    Examples:
        >>> clean, adv = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> robust_perception_kl_loss(clean, torch.tensor([[1.0, 1.0]]), adv)  # on the chord
        tensor(0.)
        >>> robust_perception_kl_loss(clean, torch.tensor([[81.0, 0.0]]), torch.zeros(1, 2))  # log 2
        tensor(0.6931)
    """
    name = "robust_perception_kl_loss"
    _check.logits(name, clean_logits=clean_logits, mid_logits=mid_logits, adv_logits=adv_logits)
    _check.number(name, "alpha", alpha, above=0.0, at_most=1.0)
    given = clean_logits, mid_logits, adv_logits
    clean, mid, adv = (logits.to(wide(*given)) for logits in given)
    (clean, mid), absent = without_absent(clean, mid)
    per_sample = kl_divergence((mid - (1 - alpha) * clean).masked_fill(absent, -math.inf), alpha * adv)
    return reduce(name, per_sample.to(common(*given)), reduction)


def comparison(
    function: str, alpha: float | Tensor, criterion: Criterion | Divergence, form: str, temperature: float
) -> Divergence:
    """Check what does not depend on logits, and give the distance that they are compared by."""
    _check.choice(function, "form", form, ("quotient", "interpolation", "relative"))
    _check.number(function, "temperature", temperature, above=0.0)
    if form == "quotient" and not isinstance(alpha, Tensor):
        _check.number(function, "alpha", alpha, above=0.0, below=1.0)
    elif not isinstance(alpha, Tensor):
        _check.number(function, "alpha", alpha, at_least=0.0, at_most=1.0)
    divergence = named(function, criterion, temperature)
    if form == "relative" and criterion != "mse":
        raise ValueError(f"{function}: `criterion`={criterion!r} has no effect with form='relative', which is a ratio.")
    return divergence


def _share(part: Tensor, rest: Tensor) -> Tensor:
    """The part of the sum of both; 0 where both are."""
    return part / divisor(part + rest)


def _check_per_sample(function: str, per_sample: Any, batch: int) -> None:
    if not isinstance(per_sample, Tensor) or per_sample.shape != (batch,):
        raise ValueError(
            f"{function}: `criterion` must return one value per sample, a tensor of shape ({batch},), got "
            f"{_check.came(per_sample)}."
        )
