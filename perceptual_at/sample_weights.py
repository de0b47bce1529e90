"""How much each adversarial sample counts: the weights of GAIRAT, MAIL and EWAT, and SOVR's choice.

Tensors in, one number per sample out, without a gradient. Permuting the batch permutes the weights.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from perceptual_at import _check
from perceptual_at._places import known, labelled, margins, over_places, right
from perceptual_at._rounding import wide
from perceptual_at.divergences import PerSampleLoss, cross_entropy, times_log

__all__ = [
    "StepsWithstood",
    "entropy_weights",
    "geometric_weights",
    "margin_weights",
    "probability_margin",
    "smallest_margins",
]


def geometric_weights(
    kappa: Tensor,
    *,
    steps: int = 10,
    offset: float = -1.0,
    form: Literal["tanh", "sigmoid", "discrete"] = "tanh",
) -> Tensor:
    r"""GAIRAT's weights: a sample counts more the fewer steps of the attack it withstands.

    With $\kappa$ the number of iterates that are still classified correctly out of $K$, and
    $h = \lfloor K / 2 \rfloor$,

    $$ w \propto \frac{1 + \tanh(L + 5 (h - \kappa) / h)}{2}, \qquad
       w \propto \sigma(L + 5 (h - \kappa) / h), \qquad w \propto 1 - \frac{\kappa}{K + 1}, $$

    scaled to sum to the size of the batch.

    Args:
        kappa: $\kappa$ of each sample in [0, K], shape `(B,)`, integer or floating.
        steps: $K$, the number of steps of the attack; with one, $h$ is 1.
        offset: $L$; `math.inf` gives every sample the weight 1, GAIRAT's burn-in. Not used by `"discrete"`.
        form: `"tanh"` (GAIRAT's default), `"sigmoid"` or `"discrete"`.

    Returns:
        Shape `(B,)`, in the dtype of `kappa`, or the default one for integers; their mean is 1.

    Raises:
        TypeError: if `kappa` is no tensor of numbers.
        ValueError: if `kappa` is not of shape `(B,)`, a number is out of range, `form` unknown, or `offset` is given
            with `"discrete"`.

    Source:
        Zhang et al. 2021 (GAIRAT), Eq. 6, and its released code.

    Examples:
        >>> geometric_weights(torch.tensor([0, 10]), steps=10, form="discrete")  # 11/11 and 1/11
        tensor([1.8333, 0.1667])
        >>> geometric_weights(torch.tensor([0, 10]), steps=10, offset=math.inf)
        tensor([1., 1.])
    """
    name = "geometric_weights"
    _check.tensor(name, "kappa", kappa)
    if kappa.ndim != 1 or kappa.is_complex() or kappa.dtype == torch.bool:
        raise (TypeError if kappa.ndim == 1 else ValueError)(
            f"{name}: `kappa` must be numbers of shape (B,), got {kappa.dtype} of shape {tuple(kappa.shape)}."
        )
    check_geometry(name, steps, offset, form)
    dtype = kappa.dtype if kappa.is_floating_point() else torch.get_default_dtype()
    count = kappa.to(torch.promote_types(dtype, torch.float32))
    if form == "discrete":
        log = torch.log1p(-count / (steps + 1))
    else:
        half = max(1, steps // 2)  # the released code divides by 0 for one step
        argument = offset + 5 * (half - count) / half
        log = functional.logsigmoid(2 * argument if form == "tanh" else argument)
    return (log.softmax(dim=0) * count.shape[0]).detach().to(dtype)  # in logarithms: far offsets do not underflow


def probability_margin(logits: Tensor, labels: Tensor, *, wrong_logits: Tensor | None = None) -> Tensor:
    r"""MAIL's probabilistic margin: the right class's probability minus the largest of a wrong class.

    $$ p_y - \max_{k \ne y} p_k $$

    Of adversarial logits it is MAIL's $\mathrm{PM}^{\mathrm{adv}}$, of clean ones $\mathrm{PM}^{\mathrm{nat}}$. With
    `wrong_logits` the wrong class is looked for there: clean logits and adversarial `wrong_logits` give
    $\mathrm{PM}^{\mathrm{dif}}$, whose definition is inferred from the paper's abstract and checked against no source.

    Args:
        logits: shape `(B, K)`, or dense `(B, K, *S)`; a sample counts by the mean over its labelled places.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label.
        wrong_logits: where the wrong classes' probabilities are taken from; None takes `logits`.

    Returns:
        Shape `(B,)`, in [-1, 1]; without `wrong_logits` negative where the sample is misclassified. MAIL's code has the
        opposite sign.

    Raises:
        TypeError: if `labels` are no integers or logits no floating-point tensor.
        ValueError: if shapes or devices differ, or labels in CPU memory are out of range.

    Source:
        Wang et al. 2021 (MAIL), Eq. 5; the adversarial one as in its released code.

    Examples:
        >>> probability_margin(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([0.])
        >>> probability_margin(torch.tensor([[0.0, 100.0]]), torch.tensor([0]))
        tensor([-1.])
    """
    name = "probability_margin"
    _check.logits(name, logits=logits)
    labels = _check.indices(name, labels, logits=logits)
    if wrong_logits is not None:
        _check.same_shape(name, logits=logits, wrong_logits=wrong_logits)
    others = logits if wrong_logits is None else wrong_logits
    index = known(labels).unsqueeze(1)
    own = logits.to(wide(logits)).softmax(dim=1).gather(1, index).squeeze(1)
    rival = others.to(wide(others)).softmax(dim=1).scatter(1, index, -math.inf).amax(dim=1)
    return over_places(own - rival, labelled(labels)).to(logits.dtype)


def margin_weights(
    margins: Tensor,
    *,
    slope: float = 10.0,
    bias: float = -0.5,
    scale: Literal["code", "batch"] = "code",
) -> Tensor:
    r"""MAIL's weights: a sample counts more the smaller its probabilistic margin.

    $$ w = 3\,\sigma(\gamma (b - \mathrm{PM})) \quad\text{or}\quad w \propto \sigma(\gamma (b - \mathrm{PM})) $$

    Args:
        margins: probabilistic margins, shape `(B,)`, as from `probability_margin`.
        slope: $\gamma$, how fast weights fall with the margin: 10 on PGD-AT and 2 on TRADES are recommended; the code's
            script has 1.
        bias: $b$, the margin at which weights are half of the largest: -0.5 on PGD-AT, 0 on TRADES; the script has
            -1.5.
        scale: `"code"` multiplies by 3, whatever the batch; `"batch"` divides by the batch's mean, so that the
            weights sum to its size, as the paper is remembered to do (unverified).

    Returns:
        Shape `(B,)`, without a gradient.

    Raises:
        TypeError: if `margins` is no floating-point tensor.
        ValueError: if it is not of shape `(B,)`, a number is out of range, or `scale` is unknown.

    Source:
        Wang et al. 2021 (MAIL), Eq. 8 and its released code.

    Examples:
        >>> margin_weights(torch.tensor([-0.5, 1.0]), slope=10.0, bias=-0.5)
        tensor([1.5000e+00, 9.1771e-07])
        >>> margin_weights(torch.tensor([0.25, 0.25]), scale="batch")
        tensor([1., 1.])
    """
    name = "margin_weights"
    _check.floating(name, margins=margins)
    if margins.ndim != 1:
        raise ValueError(f"{name}: `margins` must be of shape (B,), got shape {tuple(margins.shape)}.")
    check_sigmoid(name, slope, bias, scale)
    argument = slope * (bias - margins.detach().to(wide(margins)))
    if scale == "code":
        return (3 * argument.sigmoid()).to(margins.dtype)
    return (functional.logsigmoid(argument).softmax(dim=0) * margins.shape[0]).to(margins.dtype)


def entropy_weights(adv_logits: Tensor, *, form: Literal["one_plus", "proportional"] = "one_plus") -> Tensor:
    r"""EWAT's weights: a sample counts more the less sure its adversarial prediction is. A documented variant.

    $$ w = 1 + H / \bar H \qquad\text{or}\qquad w = H / \bar H, \qquad H = -\sum_k p_k \log p_k, $$

    with $\bar H$ the batch's mean. No source of the formula could be read: the abstract says "in proportion to the
    entropy", and nobody has checked either form, the normalisation or that the weight has no gradient against the
    paper.

    Args:
        adv_logits: $f(x_{\mathrm{adv}})$, shape `(B, K)`, or dense `(B, K, *S)`.
        form: `"one_plus"`: one plus a sample's entropy as a share of the batch's mean; `"proportional"`: the share
            alone.

    Returns:
        Shape `(B,)`, without a gradient. Where nobody is unsure all have the same weight.

    Raises:
        TypeError: if logits are no floating-point tensor.
        ValueError: if they are no logits, or `form` is unknown.

    Source:
        Kim et al. 2021 (EWAT), abstract only.

    Examples:
        >>> entropy_weights(torch.tensor([[0.0, 0.0], [100.0, 0.0]]))  # H is log 2 and 0
        tensor([3., 1.])
        >>> entropy_weights(torch.zeros(2, 3), form="proportional")
        tensor([1., 1.])
    """
    _check.logits("entropy_weights", adv_logits=adv_logits)
    _check.choice("entropy_weights", "form", form, ("one_plus", "proportional"))
    log_p = functional.log_softmax(adv_logits.detach().to(wide(adv_logits)), dim=1)
    entropy = over_places(-times_log(log_p.exp(), log_p).sum(dim=1))
    mean = entropy.mean() if entropy.shape[0] else entropy.sum()
    share = torch.where(mean > 0, entropy / mean, torch.ones_like(entropy))
    return (share + 1 if form == "one_plus" else share).to(adv_logits.dtype)


def smallest_margins(adv_logits: Tensor, labels: Tensor, *, share: float) -> Tensor:
    r"""SOVR's choice: the share of the batch with the smallest logit margins. A documented variant.

    The margin is $z_y - \max_{k \ne y} z_k$ at the adversarial input; $\lfloor B \cdot \text{share} \rfloor$ samples
    are chosen, of equal ones those that stand first. No source of the rule could be read beyond the abstract; that the
    choice is made within the batch is from memory.

    Args:
        adv_logits: $f(x_{\mathrm{adv}})$, shape `(B, K)`, or dense `(B, K, *S)`.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label.
        share: of the batch that is selected, in [0, 1].

    Returns:
        A boolean mask `(B,)`.

    Raises:
        TypeError: if `labels` are no integers or logits no floating-point tensor.
        ValueError: if shapes or devices differ, or `share` is out of range.

    Source:
        Kanai et al. 2023 (SOVR), abstract only.

    Examples:
        >>> logits = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
        >>> smallest_margins(logits, torch.tensor([0, 0, 0]), share=0.5)
        tensor([False,  True, False])
        >>> bool(smallest_margins(logits, torch.tensor([0, 0, 0]), share=0.0).any())
        False
    """
    _check.logits("smallest_margins", adv_logits=adv_logits)
    labels = _check.indices("smallest_margins", labels, adv_logits=adv_logits)
    _check.number("smallest_margins", "share", share, at_least=0.0, at_most=1.0)
    leads = over_places(-margins(adv_logits.detach(), labels), labelled(labels))
    rank = leads.argsort(stable=True).argsort()
    return rank < int(len(leads) * share + 1e-9)  # 0.29 * 100 is 28.999...


class StepsWithstood:
    r"""A loss to attack with that counts how many iterates of each sample are still classified correctly.

    GAIRAT's $\kappa$: of the iterates $x_0, \dots, x_{K - 1}$, each looked at before its step, at no further pass. Make
    a new one for every attack.

    Args:
        loss: what the attack ascends, `(logits, labels) -> (B,)`.

    Raises:
        TypeError: if `loss` is no function; in the attack, if labels are class probabilities.
        ValueError: in the attack, if it does not keep the batch whole.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.5 - x], dim=1)  # class 0 above 0.25
        >>> x, labels, withstood = torch.tensor([[0.5], [1.0]]), torch.tensor([0, 0]), StepsWithstood()
        >>> _ = pgd(model, x, labels, Linf(0.375), steps=3, step_size=0.125, start="clean", loss=withstood)
        >>> withstood.kappa, withstood.steps  # 0.5, 0.375, 0.25: at the boundary class 0 comes first
        (tensor([3, 3]), 3)
        >>> geometric_weights(withstood.kappa, steps=withstood.steps)
        tensor([1., 1.])
    """

    def __init__(self, loss: PerSampleLoss = cross_entropy) -> None:
        if not callable(loss):
            raise TypeError(
                f"StepsWithstood: `loss` must be a function (logits, labels) -> (B,), got {type(loss).__name__}."
            )
        self.loss = loss
        self.steps = 0
        """How often the attack asked."""
        self.kappa: Tensor | None = None
        """Iterates withstood, integers `(B,)`; None before the attack."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss per sample, after counting who is right."""
        if labels.is_floating_point():
            raise TypeError(
                f"StepsWithstood: `labels` must be class indices, got class probabilities of shape "
                f"{tuple(labels.shape)}, of which none is right."
            )
        correct = right(logits.detach(), labels).long()
        if self.kappa is not None and self.kappa.shape != correct.shape:
            raise ValueError(
                f"StepsWithstood: the attack asks for {correct.shape[0]} samples after {self.kappa.shape[0]}; it must "
                "keep the batch whole, and each attack needs a counter of its own."
            )
        self.kappa = correct if self.kappa is None else self.kappa + correct
        self.steps += 1
        return self.loss(logits, labels)


def check_geometry(function: str, steps: int, offset: float, form: str) -> None:
    """Require options of `geometric_weights` in their ranges."""
    _check.count(function, "steps", steps)
    _check.choice(function, "form", form, ("tanh", "sigmoid", "discrete"))
    if not (isinstance(offset, float) and offset == math.inf):
        _check.number(function, "offset", offset)
    if form == "discrete" and offset != -1.0:
        raise ValueError(f"{function}: `offset`={offset!r} has no effect with form='discrete'.")


def check_sigmoid(function: str, slope: float, bias: float, scale: str) -> None:
    """Require options of `margin_weights` in their ranges."""
    _check.number(function, "slope", slope, at_least=0.0)
    _check.number(function, "bias", bias)
    _check.choice(function, "scale", scale, ("code", "batch"))
