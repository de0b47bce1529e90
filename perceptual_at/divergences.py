"""Per-sample distances between two perceptions: the alphabet of the losses.

Each takes two tensors `(B, K)` and gives one value per sample, `(B,)`, in the dtype of its inputs. Tensors with
more dimensions, `(B, K, *S)`, have places S with a vector of length K at each, and the value of a sample is the mean
over its places: dense logits, or the feature maps of an inner layer. For other readings reshape first:
`.flatten(1)` makes one vector of a sample.

Sixteen-bit inputs are widened to float32 inside. The two that compare distributions take logits, and
work on their logarithms throughout: no constant is added to anything. A logit of minus infinity is a class without
probability: 0 log 0 is 0. Where both have it, the other distances count the entry as equal.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional

from perceptual_at import _check
from perceptual_at._places import known, labelled, over_places
from perceptual_at._rounding import common, wide

Divergence = Callable[[Tensor, Tensor], Tensor]
"""`(a, b) -> (B,)`: a distance of each sample."""

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]
"""`(logits, labels) -> (B,)`: what an attack ascends, and what a loss sums."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross entropy of each sample, $-\log p_y$.

    Args:
        logits: shape `(B, K)`, or dense `(B, K, *S)`.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label; or class probabilities of the shape of the
            logits (mixed images).

    Returns:
        Shape `(B,)`, in nats; of dense logits the mean over the labelled places, 0 where there is none.

    Raises:
        TypeError: if logits or labels are of another kind.
        ValueError: if shapes or devices differ, or a label on the CPU is out of range.

    Source:
        Madry et al. 2018, Eq. 2.1.

    Examples:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))  # log 2
        tensor([0.6931])
        >>> cross_entropy(torch.tensor([[0.0, 100.0]]), torch.tensor([0]))  # surely wrong: the logits' difference
        tensor([100.])
    """
    usual = (  # what every step of an attack asks for: right at a glance
        isinstance(logits, Tensor)
        and isinstance(labels, Tensor)
        and labels.dtype == torch.int64
        and labels.ndim == 1
        and logits.ndim == 2
        and logits.shape[1] > 1
        and logits.shape[0] == labels.shape[0]
        and labels.device == logits.device
    )
    if usual:
        try:
            return functional.cross_entropy(logits, labels, reduction="none")
        except (IndexError, RuntimeError):
            _check.logits("cross_entropy", logits=logits)
            _check.indices("cross_entropy", labels, logits=logits)
            raise
    _check.logits("cross_entropy", logits=logits)
    labels = _check.soft_labels("cross_entropy", labels, read=False, logits=logits)
    if labels.is_floating_point():
        wider = logits.to(wide(logits))
        places = -times_log(labels.to(wider.dtype), functional.log_softmax(wider, dim=1)).sum(dim=1)
        return over_places(places).to(logits.dtype)
    try:
        return over_places(functional.cross_entropy(logits, labels, reduction="none"), labelled(labels))
    except (IndexError, RuntimeError):
        _check.indices("cross_entropy", labels, logits=logits)
        raise


@_check.names_labels
def soft_logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Log-sum-exp of the wrong logits minus the right one: a smooth margin, never below the hard one.

    $$ \log \sum_{k \ne y} e^{z_k} - z_y $$

    Negative exactly where the right class has more than half of the probability, which is stricter than being the
    prediction. MMA attacks with it and calls a sample right where it is negative.

    Args:
        logits: shape `(B, K)`, or dense `(B, K, *S)`.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label.

    Returns:
        Shape `(B,)`; of dense logits the mean over the labelled places.

    Raises:
        TypeError: if `labels` are no class indices.
        ValueError: if shapes do not fit or devices differ.

    Source:
        Ding et al. 2020 (MMA), Eq. 10.

    Examples:
        >>> soft_logit_margin(torch.zeros(1, 3), torch.tensor([0]))  # log 2
        tensor([0.6931])
        >>> soft_logit_margin(torch.tensor([[1.0, 3.0]]), torch.tensor([1]))
        tensor([-2.])
    """
    _check.logits("soft_logit_margin", logits=logits)
    labels = _check.indices("soft_logit_margin", labels, read=False, logits=logits)
    index = known(labels).unsqueeze(1)
    wider = logits.to(wide(logits))
    margins = wider.scatter(1, index, -math.inf).logsumexp(dim=1) - wider.gather(1, index).squeeze(1)
    return over_places(margins, labelled(labels)).to(logits.dtype)


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    r"""Mean squared difference of the entries of a sample, as `torch.nn.MSELoss` counts it.

    $$ \tfrac1K \sum_k (a_k - b_k)^2 $$

    Args:
        a: shape `(B, ...)`.
        b: the same shape.

    Returns:
        Shape `(B,)`.

    Raises:
        TypeError: if an input is no floating-point tensor.
        ValueError: if shapes or devices differ.

    Source:
        RPAT, Eq. 3; its released code averages over batch and classes, so a sample's weight does not grow
        with their number.

    Examples:
        >>> squared_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([2.])
        >>> squared_error(torch.ones(1, 5), torch.ones(1, 5))
        tensor([0.])
    """
    _check.same_shape("squared_error", a=a, b=b)
    a, b, dtype = _widen(a, b)
    (a, b), _ = without_absent(a, b)
    return reduce((a - b).square(), "b ... -> b", "mean").to(dtype)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    r"""One minus the cosine of the angle between two perceptions.

    $$ 1 - \cos(a, b) = \tfrac12 \Big\| \frac{a}{\|a\|} - \frac{b}{\|b\|} \Big\|^2 $$

    Computed in the second form, which loses no digits for nearly parallel vectors; it is 0 between two
    zero vectors and 1/2 between a zero vector and any other, without a gradient in the zero vector. Vectors shorter
    than 1e-8 are divided by 1e-8 instead of their length, as in torch's `cosine_similarity`: scale them first.

    Args:
        a: shape `(B, ...)`.
        b: the same shape.

    Returns:
        Shape `(B,)`, in [0, 2].

    Raises:
        TypeError: if an input is no floating-point tensor.
        ValueError: if shapes or devices differ.

    Source:
        RPAT, Fig. 4a (the paper gives no formula).

    Examples:
        >>> cosine_distance(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
        tensor([1.])
        >>> cosine_distance(torch.tensor([[2.0, 0.0]]), torch.tensor([[9.0, 0.0]]))
        tensor([0.])
    """
    _check.same_shape("cosine_distance", a=a, b=b)
    a, b, dtype = _widen(a, b)
    (a, b), _ = without_absent(a, b)
    return over_places((directions(a) - directions(b)).square().sum(dim=1) / 2).to(dtype)


def kl_divergence(
    p_logits: Tensor, q_logits: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    r"""Information lost when the distribution of `p_logits` is described by that of `q_logits`.

    $$ \mathrm{KL}(p \,\|\, q) = \sum_k p_k (\log p_k - \log q_k), \qquad p = \mathrm{softmax}(z_p / T) $$

    Zero exactly when the logits differ by a constant, and infinite where $q$ gives no probability to something that
    $p$ does.

    Args:
        p_logits: logits of the reference distribution, shape `(B, K)` or `(B, K, *S)`.
        q_logits: logits of its description, the same shape.
        temperature: divides both logits.
        mask: boolean `(B,)`, or `(B, *S)`: the places that count, e.g. those with a label; None counts all.

    Returns:
        Shape `(B,)`, in nats; 0 for a sample where nothing counts.

    Raises:
        TypeError: if an input is no floating-point tensor.
        ValueError: if shapes or devices differ, `temperature` is not positive, or `mask` is no boolean mask.

    Source:
        TRADES (Zhang et al. 2019), Eq. 5; `p_logits` are the clean ones there.

    Examples:
        >>> kl_divergence(torch.tensor([[0.0, 100.0]]), torch.tensor([[0.0, 0.0]]))  # log 2
        tensor([0.6931])
        >>> kl_divergence(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 6.0]]))
        tensor([0.])
    """
    _check.same_shape("kl_divergence", p_logits=p_logits, q_logits=q_logits)
    _check.number("kl_divergence", "temperature", temperature, above=0.0)
    if mask is not None:
        _check.mask("kl_divergence", "mask", mask, places=p_logits.shape[2:], p_logits=p_logits)
    p, q, dtype = _widen(p_logits, q_logits)
    apart = kl_of_logs(log_distribution(p, temperature), log_distribution(q, temperature))
    return over_places(apart, mask).to(dtype)


def js_divergence(a_logits: Tensor, b_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Jensen-Shannon divergence: how far two distributions are from their mean, symmetrically.

    $$ \mathrm{JS}(p, q) = \tfrac12 \mathrm{KL}(p \,\|\, m) + \tfrac12 \mathrm{KL}(q \,\|\, m), \qquad
       m = \tfrac12 (p + q), \quad p = \mathrm{softmax}(z_a / T) $$

    Between 0 (equal) and log 2 (disjoint). $\log m$ is `logaddexp(log p, log q) - log 2`; the released
    codes clamp $m$ at 1e-8 before the logarithm instead, which lowers their value by at most
    $K \cdot 10^{-8} / e$ for K classes.

    Args:
        a_logits: shape `(B, K)` or `(B, K, *S)`.
        b_logits: the same shape.
        temperature: divides both logits; below 1 it sharpens. There is no factor $T^2$.

    Returns:
        Shape `(B,)`, in nats.

    Raises:
        TypeError: if an input is no floating-point tensor.
        ValueError: if shapes or devices differ, or `temperature` is not positive.

    Source:
        Consistency-AT (Tack et al. 2022), Eq. 4; RAAT, Eq. 15 and 16.

    Examples:
        >>> js_divergence(torch.tensor([[0.0, 100.0]]), torch.tensor([[100.0, 0.0]]))  # log 2
        tensor([0.6931])
        >>> js_divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
        tensor([0.])
    """
    _check.same_shape("js_divergence", a_logits=a_logits, b_logits=b_logits)
    _check.number("js_divergence", "temperature", temperature, above=0.0)
    a, b, dtype = _widen(a_logits, b_logits)
    return over_places(js_of_logs(log_distribution(a, temperature), log_distribution(b, temperature))).to(dtype)


def prediction_squared_error(a_logits: Tensor, b_logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Squared distance of two predictions, as a sum over classes.

    $$ \sum_k (p_k - q_k)^2, \qquad p = \mathrm{softmax}(z_a) $$

    Args:
        a_logits: shape `(B, ...)`.
        b_logits: the same shape.
        mask: boolean `(B,)`, or `(B, *S)`: the places that count, e.g. those with a label; None counts all.

    Returns:
        Shape `(B,)`, in [0, 2]; 0 for a sample where nothing counts.

    Raises:
        TypeError: if an input is no floating-point tensor.
        ValueError: if shapes or devices differ, or `mask` is no boolean mask.

    Source:
        SCORE (Pang et al. 2022), in place of the KL; the pairing of probabilities in MART (Wang et al. 2020), Table 1.

    Examples:
        >>> prediction_squared_error(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]]))
        tensor([2.])
        >>> prediction_squared_error(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 6.0]]))
        tensor([0.])
    """
    _check.same_shape("prediction_squared_error", a_logits=a_logits, b_logits=b_logits)
    if mask is not None:
        _check.mask("prediction_squared_error", "mask", mask, places=a_logits.shape[2:], a_logits=a_logits)
    a, b, dtype = _widen(a_logits, b_logits)
    return over_places(square_of_logs(log_distribution(a), log_distribution(b)), mask).to(dtype)


def log_distribution(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `(B, K, *S)` over the classes; -inf for a class without probability."""
    return functional.log_softmax(_vectors(logits) / temperature, dim=1)


def kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) at each place, `(B, *S)`, from log-probabilities `(B, K, *S)`."""
    return times_log(log_p.exp(), log_p - log_q).sum(dim=1)


def js_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JS(p, q) at each place, `(B, *S)`, from log-probabilities `(B, K, *S)`."""
    # The smallest number instead of -inf: its exponential is 0 too, and its difference to itself is 0 and not NaN.
    log_p, log_q = (value.clamp_min(torch.finfo(value.dtype).min) for value in (log_p, log_q))
    log_mean = log_sum(log_p, log_q) - math.log(2.0)
    return (kl_of_logs(log_p, log_mean) + kl_of_logs(log_q, log_mean)) / 2


def log_sum(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(p + q) from finite logarithms, as `logaddexp`, but with second derivatives however far apart the two are."""
    # logaddexp's backward divides by 1 + exp(difference), whose own derivative is NaN once the exponential overflows.
    # A summand of e^-80 of the other is lost in the sum in any case.
    least_p, least_q = (value.detach() - 80.0 for value in (log_q, log_p))
    return torch.logaddexp(log_p.maximum(least_p), log_q.maximum(least_q))


def square_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Squared distance of two distributions at each place, `(B, *S)`, from log-probabilities `(B, K, *S)`."""
    return (log_p.exp() - log_q.exp()).square().sum(dim=1)


def directions(value: Tensor) -> Tensor:
    """Vectors `(B, K, *S)` of length one at each place; zero vectors stay, without a gradient."""
    vectors = _vectors(value)
    none = torch.linalg.vector_norm(vectors.detach(), dim=1, keepdim=True) == 0
    some = functional.normalize(torch.where(none, 1.0, vectors), dim=1, eps=1e-8)
    return torch.where(none, 0.0, some)


def without_absent(*logits: Tensor) -> tuple[list[Tensor], Tensor]:
    """The logits with 0 for a class that has minus infinity in all of them, and where these are."""
    absent = functools.reduce(torch.logical_and, (value.isneginf() for value in logits))
    return [value.masked_fill(absent, 0.0) for value in logits], absent


def times_log(shares: Tensor, logs: Tensor) -> Tensor:
    """Shares times logarithms, with 0 log 0 = 0, in the gradient too."""
    return shares * torch.where(shares == 0, torch.zeros_like(logs), logs)


def _vectors(value: Tensor) -> Tensor:
    """What is compared at a place along dimension 1: a sample that is one number has a vector of one."""
    return value if value.ndim > 1 else value[:, None]


Criterion = Literal["mse", "kl", "reverse_kl", "js", "cosine"]
"""What can be called by its name (RPAT, Fig. 4a)."""

DISTRIBUTIONS: tuple[Criterion, ...] = ("kl", "reverse_kl", "js")
"""Those that compare distributions: they have a temperature, and classes may be without probability."""


def named(function: str, criterion: str | Divergence, temperature: float) -> Divergence:
    """Resolve a criterion into `(a, b) -> (B,)`; `"kl"` is KL(b || a), `"reverse_kl"` is KL(a || b)."""
    if callable(criterion):
        chosen: Divergence = criterion
    else:
        _check.choice(function, "criterion", criterion, get_args(Criterion))
        if criterion == "kl":
            return lambda a, b: kl_divergence(b, a, temperature=temperature)
        if criterion == "reverse_kl":
            return functools.partial(kl_divergence, temperature=temperature)
        if criterion == "js":
            return functools.partial(js_divergence, temperature=temperature)
        chosen = squared_error if criterion == "mse" else cosine_distance
    if temperature != 1.0:
        raise ValueError(
            f"{function}: `temperature`={temperature} has no effect with `criterion`={criterion!r}; only "
            "'kl', 'reverse_kl' and 'js' compare distributions."
        )
    return chosen


def _widen(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both in float32 or wider, and the dtype to give the result in."""
    dtype = wide(a, b)
    return a.to(dtype), b.to(dtype), common(a, b)
