"""Per-sample distances between two perceptions: the alphabet of the losses.

Each takes two tensors `(B, ...)` and gives one value per sample, `(B,)`, in the dtype of its inputs.
Sixteen-bit inputs are widened to float32 inside. The two that compare distributions take logits, and
work on their logarithms throughout: no constant is added to anything.
"""

import functools
import math
from collections.abc import Callable

import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional

from perceptual_at import _check
from perceptual_at._rounding import common, wide
from perceptual_at._shapes import rows

Divergence = Callable[[Tensor, Tensor], Tensor]
"""`(a, b) -> (B,)`: a distance of each sample."""

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]
"""`(logits, labels) -> (B,)`: what an attack ascends, and what a loss sums."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross entropy of each sample, $-\log p_y$.

    Args:
        logits: shape `(B, K)`.
        labels: class indices `(B,)`, or class probabilities `(B, K)` (mixed images).

    Returns:
        Shape `(B,)`, in nats.

    Raises:
        IndexError: if a label is out of range (by torch, on the CPU).

    Source:
        Madry et al. 2018, Eq. 2.1.

    Examples:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))  # log 2
        tensor([0.6931])
        >>> cross_entropy(torch.tensor([[0.0, 100.0]]), torch.tensor([0]))  # surely wrong: the logits' difference
        tensor([100.])
    """
    target = labels.to(logits.dtype) if labels.is_floating_point() else labels.long()
    return functional.cross_entropy(logits, target, reduction="none")


def soft_logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Log-sum-exp of the wrong logits minus the right one: a smooth margin, never below the hard one.

    $$ \log \sum_{k \ne y} e^{z_k} - z_y $$

    Negative exactly where the right class has more than half of the probability, which is stricter than being the
    prediction. MMA attacks with it and calls a sample right where it is negative.

    Args:
        logits: shape `(B, K)`.
        labels: class indices `(B,)`.

    Returns:
        Shape `(B,)`.

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
    _check.labels("soft_logit_margin", labels, logits=logits)
    index = labels.long()[:, None]
    return logits.scatter(1, index, -math.inf).logsumexp(dim=1) - logits.gather(1, index).squeeze(1)


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
    return reduce((a - b).square(), "b ... -> b", "mean").to(dtype)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    r"""One minus the cosine of the angle between two perceptions, each flattened to a vector.

    $$ 1 - \cos(a, b) = \tfrac12 \Big\| \frac{a}{\|a\|} - \frac{b}{\|b\|} \Big\|^2 $$

    Computed in the second form, which loses no digits for nearly parallel vectors; it is 0 between two
    zero vectors and 1/2 between a zero vector and any other.

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
    a, b = (functional.normalize(rows(v), dim=1, eps=1e-8) for v in (a, b))
    return ((a - b).square().sum(dim=1) / 2).to(dtype)


def kl_divergence(p_logits: Tensor, q_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Information lost when the distribution of `p_logits` is described by that of `q_logits`.

    $$ \mathrm{KL}(p \,\|\, q) = \sum_k p_k (\log p_k - \log q_k), \qquad p = \mathrm{softmax}(z_p / T) $$

    Zero exactly when the logits differ by a constant. All entries of a sample form one distribution.

    Args:
        p_logits: logits of the reference distribution, shape `(B, ...)`.
        q_logits: logits of its description, the same shape.
        temperature: divides both logits.

    Returns:
        Shape `(B,)`, in nats.

    Raises:
        TypeError: if an input is no floating-point tensor.
        ValueError: if shapes or devices differ, or `temperature` is not positive.

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
    p, q, dtype = _widen(p_logits, q_logits)
    return kl_of_logs(log_distribution(p, temperature), log_distribution(q, temperature)).to(dtype)


def js_divergence(a_logits: Tensor, b_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Jensen-Shannon divergence: how far two distributions are from their mean, symmetrically.

    $$ \mathrm{JS}(p, q) = \tfrac12 \mathrm{KL}(p \,\|\, m) + \tfrac12 \mathrm{KL}(q \,\|\, m), \qquad
       m = \tfrac12 (p + q), \quad p = \mathrm{softmax}(z_a / T) $$

    Between 0 (equal) and log 2 (disjoint). $\log m$ is `logaddexp(log p, log q) - log 2`; the released
    codes clamp $m$ at 1e-8 before the logarithm instead, which lowers their value by at most
    $K \cdot 10^{-8} / e$ for K classes.

    Args:
        a_logits: shape `(B, ...)`.
        b_logits: the same shape.
        temperature: divides both logits; below 1 it sharpens. There is no factor $T^2$.

    Returns:
        Shape `(B,)`, in nats.

    Raises:
        TypeError: if an input is no floating-point tensor.
        ValueError: if shapes or devices differ, or `temperature` is not positive.

    Source:
        Consistency-AT (Tack et al. 2022), Eq. 4; RAAT, Eq. 15.

    Examples:
        >>> js_divergence(torch.tensor([[0.0, 100.0]]), torch.tensor([[100.0, 0.0]]))  # log 2
        tensor([0.6931])
        >>> js_divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
        tensor([0.])
    """
    _check.same_shape("js_divergence", a_logits=a_logits, b_logits=b_logits)
    _check.number("js_divergence", "temperature", temperature, above=0.0)
    a, b, dtype = _widen(a_logits, b_logits)
    return js_of_logs(log_distribution(a, temperature), log_distribution(b, temperature)).to(dtype)


def prediction_squared_error(a_logits: Tensor, b_logits: Tensor) -> Tensor:
    r"""Squared distance of two predictions, as a sum over classes.

    $$ \sum_k (p_k - q_k)^2, \qquad p = \mathrm{softmax}(z_a) $$

    Args:
        a_logits: shape `(B, ...)`.
        b_logits: the same shape.

    Returns:
        Shape `(B,)`, in [0, 2].

    Raises:
        TypeError: if an input is no floating-point tensor.
        ValueError: if shapes or devices differ.

    Source:
        SCORE (Pang et al. 2022), in place of the KL; the pairing of probabilities in MART (Wang et al. 2020), Table 1.

    Examples:
        >>> prediction_squared_error(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]]))
        tensor([2.])
        >>> prediction_squared_error(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 6.0]]))
        tensor([0.])
    """
    _check.same_shape("prediction_squared_error", a_logits=a_logits, b_logits=b_logits)
    a, b, dtype = _widen(a_logits, b_logits)
    return (log_distribution(a).exp() - log_distribution(b).exp()).square().sum(dim=1).to(dtype)


def log_distribution(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `(B, N)` of all entries of a sample."""
    return functional.log_softmax(rows(logits) / temperature, dim=1)


def kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per sample from log-probabilities `(B, N)`."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def js_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JS(p, q) per sample from log-probabilities `(B, N)`."""
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return (kl_of_logs(log_p, log_mean) + kl_of_logs(log_q, log_mean)) / 2


CRITERIA = ("mse", "kl", "js", "cosine")


def named(function: str, criterion: str | Divergence, temperature: float) -> Divergence:
    """Resolve a criterion (RPAT, Fig. 4a) into `(value, target) -> (B,)`; KL is KL(target || value)."""
    if callable(criterion):
        chosen: Divergence = criterion
    else:
        _check.choice(function, "criterion", criterion, CRITERIA)
        if criterion == "kl":
            return lambda value, target: kl_divergence(target, value, temperature=temperature)
        if criterion == "js":
            return functools.partial(js_divergence, temperature=temperature)
        chosen = squared_error if criterion == "mse" else cosine_distance
    if temperature != 1.0:
        raise ValueError(
            f"{function}: `temperature`={temperature} has no effect with `criterion`={criterion!r}; only 'kl' and "
            "'js' compare distributions."
        )
    return chosen


def _widen(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both in float32 or wider, and the dtype to give the result in."""
    dtype = wide(a, b)
    return a.to(dtype), b.to(dtype), common(a, b)
