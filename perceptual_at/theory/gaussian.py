r"""The Gaussian model of RAAT's Theorem 1: two classes, a linear classifier, errors in closed form.

$y$ is $\pm 1$ with equal odds and $x \mid y \sim \mathcal{N}(y\,\theta, \sigma^2 I_d)$; a classifier is the
sign of $w \cdot x$. The interesting regime is $\theta = (1, \dots, 1)$ and $\sigma = c\, d^{1/4}$: standard
learning is easy from one sample, robust learning is not.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at.theory._shared import torch_generator


def _phi(t: float) -> float:
    """The standard normal distribution function, accurate in its lower tail."""
    return math.erfc(-t / math.sqrt(2)) / 2


def standard_error(w: Tensor, theta: Tensor, sigma: float) -> Tensor:
    r"""How often a linear classifier is wrong on clean data.

    $$ \Pr[\operatorname{sign}(w \cdot x) \ne y] = \Phi\!\left(-\frac{w \cdot \theta}{\sigma \|w\|_2}\right) $$

    Independent of the length of `w`, and at least $\Phi(-\|\theta\|_2 / \sigma)$, the error of $w = \theta$.

    Args:
        w: classifiers, shape `(..., d)`.
        theta: mean of the positive class, shape `(d,)`.
        sigma: standard deviation of each coordinate (RAAT's Definition 2 calls it a variance parameter).

    Returns:
        Probabilities, shape `(...)`.

    Raises:
        ValueError: if `sigma` is not positive or the last dimensions differ.

    Source:
        Schmidt et al., 2018; RAAT, Definition 2.

    Examples:
        >>> import torch
        >>> standard_error(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1.0)  # looks the wrong way
        tensor(0.5000)
        >>> standard_error(torch.tensor([5.0, 0.0]), torch.tensor([1.0, 0.0]), 1.0)  # Phi(-1)
        tensor(0.1587)
    """
    return _linear_error("standard_error", w, theta, sigma, 0.0, "linf")


def robust_error(
    w: Tensor, theta: Tensor, sigma: float, *, eps: float, norm: Literal["linf", "l2", "l1"] = "linf"
) -> Tensor:
    r"""How often a linear classifier is wrong under the worst perturbation.

    $$ \Pr\big[\exists \|\delta\|_p \le \epsilon:\ \operatorname{sign}(w \cdot (x + \delta)) \ne y\big]
       = \Phi\!\left(-\frac{w \cdot \theta - \epsilon\,\|w\|_{p^*}}{\sigma\|w\|_2}\right) $$

    with the dual norm $p^*$: $\ell_1$ for $\ell_\infty$, $\ell_2$ for $\ell_2$, $\ell_\infty$ for $\ell_1$.

    Args:
        w: classifiers, shape `(..., d)`.
        theta: mean of the positive class, shape `(d,)`.
        sigma: standard deviation of each coordinate.
        eps: budget, in units of `x`.
        norm: norm of the perturbation.

    Returns:
        Probabilities, shape `(...)`; never below the standard error.

    Raises:
        ValueError: if `sigma` is not positive, `eps` is negative, `norm` is unknown or the last dimensions
            differ.

    Source:
        Schmidt et al., 2018; RAAT, Definition 2.

    Examples:
        >>> import torch
        >>> w = torch.tensor([1.0, 1.0])
        >>> robust_error(w, w, 1.0, eps=1.0)  # the attack removes the mean
        tensor(0.5000)
        >>> robust_error(w, w, 2**0.5, eps=0.0) == standard_error(w, w, 2**0.5)
        tensor(True)
    """
    return _linear_error("robust_error", w, theta, sigma, eps, norm)


def _linear_error(name: str, w: Tensor, theta: Tensor, sigma: float, eps: float, norm: str) -> Tensor:
    _check.floating(name, w=w, theta=theta)
    _check.number(name, "sigma", sigma, above=0)
    _check.number(name, "eps", eps, at_least=0)
    _check.choice(name, "norm", norm, ("linf", "l2", "l1"))
    if theta.ndim != 1 or w.shape[-1] != theta.shape[0]:
        raise ValueError(
            f"{name}: `w` must have shape (..., d) and `theta` shape (d,), got {tuple(w.shape)} and "
            f"{tuple(theta.shape)}."
        )
    dual = {"linf": 1.0, "l2": 2.0, "l1": math.inf}[norm]
    margin = w @ theta - eps * torch.linalg.vector_norm(w, ord=dual, dim=-1)
    probability: Tensor = torch.special.ndtr(-margin / (sigma * torch.linalg.vector_norm(w, dim=-1)))
    return probability


def folded_mean(s: float) -> float:
    r"""The mean size of a noisy one, $M(s) = \mathbb{E}\,|1 + s g|$ for a standard normal $g$.

    $$ M(s) = 1 - 2\,\Phi(-1/s) + 2 s\, \varphi(1/s) $$

    It is the $\ell_1$ length, per coordinate, of an estimate of $(1, \dots, 1)$ with noise $s$: what an
    $\ell_\infty$ attack gets hold of.

    Args:
        s: noise, at least 0.

    Returns:
        $M(s)$, between 1 and $1 + s\sqrt{2/\pi}$.

    Raises:
        ValueError: if `s` is negative.

    Examples:
        >>> folded_mean(0.0)
        1.0
        >>> round(folded_mean(1.0), 4)
        1.1666
    """
    _check.number("folded_mean", "s", s, at_least=0)
    if s == 0:
        return 1.0
    density = math.exp(-0.5 / s / s) / math.sqrt(2 * math.pi)
    return 1 - 2 * _phi(-1 / s) + 2 * s * density


def critical_noise(eps: float) -> float:
    r"""The noise at which an $\ell_\infty$ attack cancels the signal: $\epsilon\, M(s_c) = 1$.

    Estimates of $(1, \dots, 1)$ noisier than this have a robust error above one half.

    Args:
        eps: budget, between 0 and 1 (at 1 the attack cancels even a perfect estimate).

    Returns:
        $s_c$.

    Raises:
        ValueError: if `eps` is not inside (0, 1).

    Examples:
        >>> round(critical_noise(0.9), 4)
        0.8771
        >>> round(0.8 * folded_mean(critical_noise(0.8)), 9)
        1.0
    """
    _check.number("critical_noise", "eps", eps, above=0, below=1)
    low, high = 0.0, 2 * math.sqrt(math.pi / 2) / eps  # M(s) > s sqrt(2 / pi), so M(high) > 2 / eps
    for _ in range(200):
        middle = (low + high) / 2
        if folded_mean(middle) * eps < 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def predicted_error(d: int, sigma: float, *, eps: float = 0.0, unlabeled: float | None = None) -> float:
    r"""The error one has to expect in high dimension, standard or robust.

    $$ \Phi\!\left(-\frac{\sqrt d\,\big(1 - \epsilon M(s)\big)}{\sigma\sqrt{1 + s^2}}\right), \qquad
       s = \begin{cases} \sigma & \text{one labelled sample, } w = y x \\
       \sigma / \big(\sqrt m\,(1 - 2p)\big) & m \text{ samples labelled by that classifier} \end{cases} $$

    for $\theta = (1, \dots, 1)$, with $p$ the standard error of the one-sample classifier. It is the value at
    the mean direction: right within 0.03 for robust errors from $d = 10^3$ on. Both errors are probabilities,
    so their difference cannot grow like $\sqrt d / \log d$ as RAAT's Theorem 1 has it; with $\sigma =
    c\,d^{1/4}$ it tends to $1 - \Phi(-1/c^2)$. What grows is the number of samples needed.

    Args:
        d: dimension.
        sigma: standard deviation of each coordinate; $c\,d^{1/4}$ in the theorem.
        eps: $\ell_\infty$ budget; 0 gives the standard error.
        unlabeled: $m$, samples with labels from the one-sample classifier (the consistency estimator); none
            if not given.

    Returns:
        A probability.

    Raises:
        ValueError: if `d` is below 1, `sigma` is not positive, `eps` is negative or `unlabeled` is not
            positive.

    Source:
        RAAT, Theorem 1 and Corollary 1.

    Examples:
        >>> round(predicted_error(10_000, 6.0, eps=0.5), 5)  # sigma = 0.6 d^(1/4): one sample is not robust
        0.99995
        >>> round(predicted_error(10_000, 6.0), 5)  # but accurate
        0.00307
    """
    name = "predicted_error"
    _check.count(name, "d", d)
    _check.number(name, "sigma", sigma, above=0)
    _check.number(name, "eps", eps, at_least=0)
    noise = sigma
    if unlabeled is not None:
        _check.number(name, "unlabeled", unlabeled, above=0)
        noise = sigma / (math.sqrt(unlabeled) * _lead(d, sigma))
    return _phi(-math.sqrt(d) * (1 - eps * folded_mean(noise)) / (sigma * math.hypot(1, noise)))


def _lead(d: int, sigma: float) -> float:
    """$1 - 2p$ of the one-sample classifier, with all digits where $p$ is near one half."""
    return math.erf(math.sqrt(d / 2) / (sigma * math.hypot(1, sigma)))


def half_error_threshold(d: int, c: float, eps: float) -> float:
    r"""How many unlabelled samples bring the robust error down to one half.

    $$ m_{1/2} = \frac{c^2 \sqrt d}{s_c^2\,(1 - 2p)^2}, \qquad \epsilon\, M(s_c) = 1, \quad \sigma = c\, d^{1/4} $$

    This is the $O(\sqrt d)$ of RAAT's Corollary 2, in the form that a simulation can check: the total number
    $m$, for one labelled sample and fixed `eps`. For small budgets it is $(2/\pi)\,\epsilon^2 c^2 \sqrt d$.
    At a fixed small target error such as 1 % the exponent 1/2 shows only beyond $d = 10^8$. Augmented copies
    of the labelled samples do not count as unlabelled samples: they are a random function of the same data,
    and the lower bound for labelled samples still holds.

    Args:
        d: dimension.
        c: noise level, $\sigma / d^{1/4}$.
        eps: $\ell_\infty$ budget in (0, 1).

    Returns:
        $m_{1/2}$, a real number.

    Raises:
        ValueError: if `d` is below 1, `c` is not positive or `eps` is not inside (0, 1).

    Source:
        RAAT, Corollary 2 and Equation 3.

    Examples:
        >>> round(half_error_threshold(100_000, 0.6, 0.9), 1)
        149.7
        >>> round(half_error_threshold(100_000, 0.6, 0.9) / half_error_threshold(1_000, 0.6, 0.9), 1)  # sqrt(100)
        10.0
    """
    name = "half_error_threshold"
    _check.count(name, "d", d)
    _check.number(name, "c", c, above=0)
    _check.number(name, "eps", eps, above=0, below=1)
    noise: float = c * d**0.25 / (critical_noise(eps) * _lead(d, c * d**0.25))
    return noise * noise


def consistency_estimator(x: Tensor, labels: Tensor, unlabeled: Tensor) -> Tensor:
    r"""The classifier that learns from its own labels: RAAT's Gaussian CR estimator.

    $$ w = \sum_{i \le n} y_i x_i, \qquad
       \tilde\theta = \sum_{i \le m} \operatorname{sign}(w \cdot \tilde x_i)\, \tilde x_i $$

    Sums, not means: a linear classifier does not depend on the length.

    Args:
        x: labelled samples, shape `(n, d)`.
        labels: -1 or 1, shape `(n,)`.
        unlabeled: other samples, shape `(m, d)`.

    Returns:
        $\tilde\theta$, shape `(d,)`.

    Raises:
        ValueError: if the shapes do not fit.

    Cost:
        `O((n + m) d)`. To simulate it, `sample_estimators` needs only `O(d + m)`.

    Source:
        RAAT, Definition 3.

    Examples:
        >>> import torch
        >>> x, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
        >>> consistency_estimator(x, labels, torch.tensor([[2.0, 1.0], [-1.0, 1.0]]))  # (2, 1) - (-1, 1)
        tensor([3., 0.])
        >>> consistency_estimator(x, -labels, torch.tensor([[2.0, 1.0], [-1.0, 1.0]]))
        tensor([-3.,  0.])
    """
    name = "consistency_estimator"
    _check.floating(name, x=x, unlabeled=unlabeled)
    _check.tensor(name, "labels", labels)
    if x.ndim != 2 or unlabeled.ndim != 2 or x.shape[1] != unlabeled.shape[1] or labels.shape != x.shape[:1]:
        raise ValueError(
            f"{name}: `x` must have shape (n, d), `labels` (n,) and `unlabeled` (m, d), got {tuple(x.shape)}, "
            f"{tuple(labels.shape)} and {tuple(unlabeled.shape)}."
        )
    w = labels.to(x) @ x
    return torch.where(unlabeled @ w >= 0, 1.0, -1.0).to(x) @ unlabeled


class Estimators(NamedTuple):
    """Classifiers learned in repeated runs of the Gaussian model."""

    supervised: Tensor
    """From the labelled samples alone, shape `(runs, d)`."""
    consistency: Tensor
    """From the unlabelled samples with the labels of `supervised`, shape `(runs, d)`."""


def sample_estimators(
    theta: Tensor,
    sigma: float,
    *,
    unlabeled: int,
    labeled: int = 1,
    runs: int = 1,
    generator: torch.Generator | None = None,
) -> Estimators:
    r"""Draw the supervised and the consistency estimator without drawing the data.

    The label that $w$ gives to $\tilde x_i = y_i\theta + \sigma z_i$ depends on $z_i$ only through
    $a_i = z_i \cdot w / \|w\|$. Everything orthogonal to $w$ can be summed before it is drawn:

    $$ \tilde\theta = \Big(\sum_i \tilde y_i y_i\Big)\theta + \sigma\Big(\sum_i \tilde y_i a_i\Big)\frac{w}{\|w\|}
       + \sigma\sqrt m\; g_\perp, \qquad g_\perp \sim \mathcal{N}\Big(0, I - \frac{w w^\top}{\|w\|^2}\Big) $$

    The result has exactly the distribution of `consistency_estimator` on fresh data.

    Args:
        theta: mean of the positive class, shape `(d,)`.
        sigma: standard deviation of each coordinate.
        unlabeled: $m$, unlabelled samples.
        labeled: $n$, labelled samples.
        runs: independent repetitions.
        generator: on the device of `theta`; torch's own if not given.

    Returns:
        `Estimators(supervised, consistency)`, each of shape `(runs, d)`.

    Raises:
        ValueError: if `theta` is not a vector, `sigma` is not positive or a count is below 1.

    Cost:
        `O(d + m)` per run instead of `O(d m)`: some 20 ms for `d = 1e5`, `m = 1e3` on a CPU.

    Source:
        RAAT, Definition 3.

    Examples:
        >>> import torch
        >>> theta, generator = torch.ones(10_000), torch.Generator().manual_seed(0)
        >>> w, better = sample_estimators(theta, 6.0, unlabeled=1000, generator=generator)
        >>> robust_error(w, theta, 6.0, eps=0.5).item() > 0.99  # one labelled sample
        True
        >>> robust_error(better, theta, 6.0, eps=0.5).item() < 1e-9  # and a thousand unlabelled ones
        True
    """
    name = "sample_estimators"
    _check.floating(name, theta=theta)
    if theta.ndim != 1:
        raise ValueError(f"{name}: `theta` must have shape (d,), got {tuple(theta.shape)}.")
    _check.number(name, "sigma", sigma, above=0)
    for argument, value in (("unlabeled", unlabeled), ("labeled", labeled), ("runs", runs)):
        _check.count(name, argument, value)
    _random.of_torch(name, generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=theta.dtype, device=theta.device)

    # n signed samples sum to n theta plus noise of standard deviation sigma sqrt(n).
    w = labeled * theta + sigma * math.sqrt(labeled) * normal(runs, theta.shape[0])
    unit = w / torch.linalg.vector_norm(w, dim=1, keepdim=True)
    y = torch.where(normal(runs, unlabeled) >= 0, 1.0, -1.0).to(theta)
    a = normal(runs, unlabeled)
    guess = torch.where(y * (unit @ theta)[:, None] + sigma * a >= 0, 1.0, -1.0).to(theta)
    noise = normal(runs, theta.shape[0])
    orthogonal = noise - (noise * unit).sum(1, keepdim=True) * unit
    consistency = (
        (guess * y).sum(1, keepdim=True) * theta
        + sigma * (guess * a).sum(1, keepdim=True) * unit
        + sigma * math.sqrt(unlabeled) * orthogonal
    )
    return Estimators(w, consistency)


def simulated_half_error_threshold(
    d: int, c: float, eps: float, *, runs: int = 21, generator: torch.Generator | None = None
) -> int:
    r"""The half-error threshold by simulation: the smallest $m$ whose median robust error is at most one half.

    Args:
        d: dimension.
        c: noise level; $\sigma = c\, d^{1/4}$.
        eps: $\ell_\infty$ budget in (0, 1).
        runs: repetitions for each $m$ tried.
        generator: a CPU generator; a fixed seed if not given.

    Returns:
        The number of unlabelled samples, by bisection; within 10 % of `half_error_threshold` for $d \ge 10^3$
        and within 3 % for $d \ge 10^4$ and $m \ge 40$.

    Raises:
        ValueError: if `d` or `runs` is below 1, `c` is not positive or `eps` is not inside (0, 1).

    Cost:
        Some ten draws of `sample_estimators`: 2 seconds for `d = 1e5`.

    Examples:
        >>> simulated_half_error_threshold(1000, 0.6, 0.9) in range(14, 18)  # predicted: 15
        True
        >>> simulated_half_error_threshold(1000, 0.3, 0.9) in range(3, 6)  # a quarter
        True
    """
    name = "simulated_half_error_threshold"
    _check.count(name, "d", d)
    _check.number(name, "c", c, above=0)
    _check.number(name, "eps", eps, above=0, below=1)
    _check.count(name, "runs", runs)
    guess = half_error_threshold(d, c, eps)
    sigma = c * d**0.25
    generator = torch_generator(name, generator)
    theta = torch.ones(d, device=generator.device)

    def robust(unlabeled: int) -> bool:
        drawn = sample_estimators(theta, sigma, unlabeled=unlabeled, runs=runs, generator=generator)
        return bool(robust_error(drawn.consistency, theta, sigma, eps=eps).median() <= 0.5)

    low, high = 0, max(1, math.ceil(2 * guess))
    while not robust(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if robust(middle) else (middle, high)
    return high
