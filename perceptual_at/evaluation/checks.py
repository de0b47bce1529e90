"""Is the number to be trusted? Checks of inputs and model, each with what a failure suggests."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from perceptual_at._binomial import rare
from perceptual_at._rounding import accumulator
from perceptual_at._values import tensors_of
from perceptual_at.threats import Threat
from perceptual_at.victims import Model
from perceptual_at.victims.finding import bare
from perceptual_at.victims.inspection import gives_probabilities, lost_gradients

MASKING = "gradient masking: the attack fails for want of a useful gradient, not because the model is robust"
_BY_HAND = "call `sanity_checks` by itself with a threat and a black-box attack of your own to find out why"


@dataclasses.dataclass(frozen=True)
class Check:
    """What one check found.

    Examples:
        >>> print(check_inputs(torch.tensor([[-2.0, 0.5]]), Linf(0.25)))
        inputs FAILED: values from -2 to 0.5, bounds 0 to 1. Suggests inputs that were normalised. Keep images inside the bounds and put the normalisation into the model (`models.Normalize`).
    """  # noqa: E501

    name: str
    passed: bool
    value: float
    """The number that decided; the function of the check says which."""
    found: str
    """The same in words."""
    suggests: str = ""
    """What a failure points to."""
    advice: str = ""
    """What to do about it."""
    applies: bool = True
    """Whether what the check takes for granted holds; where it does not, the check says so and decides nothing."""

    def __post_init__(self) -> None:
        for name, kind in (("name", str), ("passed", bool), ("found", str), ("suggests", str), ("advice", str)):
            if not isinstance(getattr(self, name), kind):
                got = type(getattr(self, name)).__name__
                raise TypeError(f"Check: `{name}` must be a {kind.__name__}, got {got}.")
        if not self.passed and not self.applies:
            raise ValueError("Check: `passed` must be True for a check that does not apply, got False.")

    @classmethod
    def without_premise(cls, name: str, reason: str) -> "Check":
        """A check that has nothing to say here."""
        return cls(name, True, 0.0, reason, applies=False)

    @classmethod
    def stopped(cls, name: str, error: Exception) -> "Check":
        """A check that an error ended: failed, because it could not show what it should."""
        found = f"the check ended with {type(error).__name__}: {error}".rstrip(".")
        return cls(name, False, math.nan, found, "a model, threat or attack that the check cannot work with", _BY_HAND)

    def __str__(self) -> str:
        if not self.applies:
            return f"{self.name} not run: {self.found}."
        if self.passed:
            return f"{self.name} passed: {self.found}."
        return (
            f"{self.name} FAILED: {self.found}. Suggests {self.suggests}. {self.advice[:1].upper()}{self.advice[1:]}."
        )


def check_modes(model: Model) -> Check:
    """The model is in eval mode, and no batch norm takes its statistics from the batch.

    Args:
        model: a module; any other callable passes, because its modes cannot be seen.

    Returns:
        A `Check`; its value counts the modules in the wrong mode.

    Examples:
        >>> check_modes(nn.BatchNorm1d(2).eval()).passed, check_modes(nn.BatchNorm1d(2)).passed
        (True, False)
        >>> check_modes(nn.BatchNorm1d(2, track_running_stats=False).eval()).passed
        False
    """
    parts = list(bare(model).named_modules()) if isinstance(model, nn.Module) else []
    exports = [part for _, part in parts if isinstance(part, fx.GraphModule) and "train" in vars(part)]
    fixed = {id(inner) for export in exports for inner in export.modules()}  # they compute what their graphs say
    names = [
        name or type(part).__name__
        for name, part in parts
        if (part.training and id(part) not in fixed) or _uses_batch(part)
    ]
    return Check(
        "modes", not names, float(len(names)),
        f"{len(names)} of {len(parts)} modules in train mode or with statistics of the batch"
        + (f": {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""),
        "" if not names else "dropout or batch norm in train mode: predictions depend on chance and on the batch",
        "" if not names else "call `model.eval()`; give batch norm running statistics",
    )  # fmt: skip


def check_inputs(x: Tensor, threat: Threat) -> Check:
    """Inputs are finite and inside the bounds of the threat model.

    Args:
        x: clean inputs.
        threat: a threat model; one without `bounds` takes all finite inputs.

    Returns:
        A `Check`; its value is the furthest distance outside.

    Examples:
        >>> check_inputs(torch.tensor([[0.0, 255.0]]), Linf(0.25)).suggests
        'images in [0, 255]'
    """
    low, high = (
        torch.as_tensor(bound, dtype=x.dtype, device=x.device)
        for bound in getattr(threat, "bounds", (-math.inf, math.inf))
    )
    smallest, largest = float(x.min()), float(x.max())
    beyond = max(float((low - x).max()), float((x - high).max()), 0.0)
    passed = bool(x.isfinite().all()) and beyond <= rounding(x)
    normalised = bool((x < low).any())
    return Check(
        "inputs", passed, beyond,
        f"values from {smallest:.4g} to {largest:.4g}, bounds {float(low.min()):g} to {float(high.max()):g}",
        "" if passed else "inputs that were normalised" if normalised else f"images in [0, {largest:g}]",
        "" if passed else
        "keep images inside the bounds and put the normalisation into the model (`models.Normalize`)"
        if normalised else "divide them by their largest value, 255 for 8-bit images",
    )  # fmt: skip


def check_normalization(model: Model, x: Tensor, *, threat: Threat | None = None) -> Check:
    """Inputs are normalised once at most: not by the loader and the model, and not twice by the model.

    Layers are recognised by a class name with "Normaliz", normalised inputs by values below zero.

    Args:
        model: a module; of any other callable the layers cannot be seen.
        x: clean inputs.
        threat: whose bounds say whether values below zero belong to the inputs; None is a box that starts at zero.

    Returns:
        A `Check`; its value counts how often inputs are normalised.

    Examples:
        >>> from perceptual_at.models import Normalize
        >>> model = nn.Sequential(Normalize((0.5,), (0.25,)), nn.Flatten(), nn.Linear(4, 2))
        >>> images = torch.rand(3, 1, 2, 2)
        >>> check_normalization(model, images).passed, check_normalization(model, model[0](images - 0.5)).passed
        (True, False)
    """
    parts = bare(model).modules() if isinstance(model, nn.Module) else ()
    layers = [part for part in parts if "normaliz" in type(part).__name__.lower()]
    low = torch.as_tensor(getattr(threat, "bounds", (0.0,))[0], dtype=x.dtype, device=x.device)
    times = len(layers) + int(bool((x < low.clamp_max(0)).any()))
    passed = times <= 1
    return Check(
        "normalization", passed, float(times),
        f"{len(layers)} normalising layers, inputs from {float(x.min()):.4g} to {float(x.max()):.4g}",
        "" if passed else "double normalisation",
        "" if passed else "normalise in one place, the first layer of the model, and feed images in [0, 1]",
    )  # fmt: skip


def check_deterministic(model: Model, x: Tensor) -> Check:
    """Two passes give the same logits, within rounding.

    Args:
        model: maps inputs to logits.
        x: inputs.

    Returns:
        A `Check`; its value is the largest difference of a logit, 0 within rounding.

    Examples:
        >>> check_deterministic(lambda x: x, torch.rand(2, 3)).passed
        True
        >>> check_deterministic(torch.rand_like, torch.rand(2, 3)).passed
        False
    """
    with torch.no_grad():
        value = outputs_differ(model(x.clone()), model(x.clone()))
    return Check(
        "deterministic", value == 0, value, f"two passes differ by {value:.3g}",
        "" if value == 0 else "a random layer: single verdicts are luck, and gradients of one pass mislead attacks",
        "" if value == 0 else
        "average the attack's gradient over passes (EOT), use `version='rand'` of AutoAttack and `repeats` of evaluate",
    )  # fmt: skip


def check_batches(model: Model, x: Tensor) -> Check:
    """Logits of a sample do not depend on the size and order of its batch, within rounding.

    Compared are the batch as it is, reversed, and in two unequal parts.

    Args:
        model: maps inputs to logits.
        x: inputs.

    Returns:
        A `Check`; its value is the largest difference of a logit, 0 within rounding.

    Examples:
        >>> check_batches(lambda x: x, torch.rand(4, 3)).passed
        True
        >>> check_batches(lambda x: x - x.mean(dim=0), torch.rand(4, 3)).passed
        False
    """
    cut = (len(x) + 2) // 3
    with torch.no_grad():
        whole = model(x.clone())
        apart = torch.cat([model(x[:cut].clone()), model(x[cut:].clone())]) if cut < len(x) else model(x.clone())
        value = max(largest_difference(whole, model(x.flip(0)).flip(0)), largest_difference(whole, apart))
    return Check(
        "batches", value == 0, value, f"logits differ by {value:.3g} in another batch",
        "" if value == 0 else "batch norm in train mode: samples are judged by who shares their batch",
        "" if value == 0 else "put batch norm into eval mode (`model.eval()`) with its running statistics",
    )  # fmt: skip


def check_probabilities(model: Model, x: Tensor) -> Check:
    """The model gives logits, not probabilities.

    A softmax at the end of the model leaves no digits for the classes that lose, and what an attack then climbs is the
    rounding of the gradient. The check fails when the outputs of every sample are in [0, 1] and sum to 1.

    Args:
        model: maps inputs to logits.
        x: inputs.

    Returns:
        A `Check`; its value is 1 for probabilities, 0 for logits.

    Examples:
        >>> logits = torch.tensor([[1.0, 2.0], [0.5, 0.25]])
        >>> check_probabilities(lambda x: x, logits).passed
        True
        >>> check_probabilities(lambda x: x.softmax(dim=1), logits).passed
        False
    """
    with torch.no_grad():
        given = gives_probabilities(model(x.clone()))
    return Check(
        "probabilities", not given, float(given),
        "every output is a probability distribution" if given else "outputs are logits",
        "a softmax in the model: gradients vanish or are rounding" if given else "",
        "drop the softmax and attack the logits" if given else "",
    )  # fmt: skip


def check_gradients(
    model: Model, x: Tensor, labels: Tensor, *, threat: Threat | None = None, level: float = 0.01
) -> Check:
    """Samples have a gradient to follow: that of the cross entropy is neither zero nor NaN.

    Where no point of the ball lowers the lead of the right class there is nothing to follow and nothing to find: such
    samples do not count, with a threat. One sample in a hundred may lack a gradient; the check fails when as many do
    as would with a chance below `level` if each did with a probability of 1 %.

    Args:
        model: maps inputs to logits.
        x: inputs.
        labels: class indices.
        threat: the ball to look for smaller leads in; None counts every sample without a gradient.
        level: largest probability with which a model fails that lacks gradients for 1 % of the samples.

    Returns:
        A `Check`; its value is the share of samples whose gradient is zero or not finite.

    Examples:
        >>> model = lambda x: torch.cat([x, -x], dim=1)
        >>> x, labels = torch.tensor([[0.625], [0.875]]), torch.tensor([0, 0])
        >>> check_gradients(model, x, labels).passed
        True
        >>> check_gradients(lambda x: 1000 * model(x), x, labels).value  # softmax is 1 to the last digit
        1.0
        >>> check_gradients(lambda x: model(x.round()), x, labels).passed
        False
        >>> check_gradients(lambda x: model(x.round()), x, labels, threat=Linf(0.2)).value  # 1 in all of 0.875's ball
        0.5
    """
    zero, _ = lost_gradients(model, x, labels, threat)
    count = int(zero.sum())
    passed = not rare(count, len(x), level=level)
    where = "" if threat is None or not count else ", although some point of the ball lowers their lead"
    return Check(
        "gradients", passed, count / len(x), f"{count} of {len(x)} samples have a zero or NaN gradient{where}",
        "" if passed else
        f"{MASKING}: a step without derivative (rounding, argmax, detach), or logits so large that softmax saturates",
        "" if passed else
        "attack with `margin` or `dlr` as loss, replace the step by a differentiable one in the backward pass (BPDA), "
        "and add a black-box attack",
    )  # fmt: skip


def check_ties(model: Model, x: Tensor, *, level: float = 0.01) -> Check:
    """The largest logit is larger than the others: a prediction is not a matter of which class comes first.

    Logits that differ by no more than their rounding count as equal. The check fails when more samples tie than would
    with a chance of `level` if each did with a probability of 1 %.

    Args:
        model: maps inputs to logits.
        x: inputs.
        level: largest probability with which a model fails that ties on 1 % of the samples.

    Returns:
        A `Check`; its value is the share of samples that tie.

    Examples:
        >>> x = torch.tensor([[0.25, 0.5], [0.75, 0.5]])
        >>> check_ties(lambda x: x, x).passed, check_ties(lambda x: x + 1e9, x).passed
        (True, False)
    """
    with torch.no_grad():
        logits = model(x.clone())
    top = logits.topk(2, dim=1).values
    tied = (top[:, 0] - top[:, 1] <= torch.finfo(logits.dtype).eps * top[:, 0].abs()).reshape(len(x), -1)
    share = tied.double().mean(dim=1)  # of the places of a sample, if it has several
    count = int((share > 0.5).sum())
    passed = not rare(count, len(x), level=level)
    return Check(
        "ties", passed, count / len(x), f"the two largest logits of {count} of {len(x)} samples cannot be told apart",
        "" if passed else "logits that are too coarse: half precision, or a large constant added to them",
        "" if passed else "compute logits in float32 and subtract what they have in common",
    )  # fmt: skip


def with_gradient(model: Model) -> Model:
    """The model, with a gradient of zero where it has none, so that attacks run and fail."""
    return lambda x: model(x) + 0 * x.reshape(len(x), -1).sum(dim=1, keepdim=True)


def rounding(values: Tensor) -> float:
    """Differences below this are put down to rounding: half of the digits, on the scale of the values."""
    # On GPUs, convolutions of float32 have the ten binary digits of TF32 unless told otherwise.
    digits = 2.0**-10 if values.is_cuda and values.dtype == torch.float32 else torch.finfo(values.dtype).eps
    return math.sqrt(digits) * max(1.0, float(values.detach().abs().max()))


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two results for the same inputs; 0 if it is within rounding, infinite with NaN."""
    exact = accumulator(a)
    away = (a.to(exact) - b.to(exact)).abs()
    apart = torch.where(a == b, torch.zeros_like(away), away)  # two infinities are equal, their difference is NaN
    difference = float(apart.nan_to_num(nan=math.inf).max())
    return difference if difference > rounding(a.nan_to_num(0.0, 0.0, 0.0)) else 0.0


def outputs_differ(first: Any, second: Any) -> float:
    """Largest difference of two outputs of a model, also of dictionaries and sequences; 0 within rounding."""
    pairs = zip(tensors_of(first), tensors_of(second), strict=True)
    return max((largest_difference(a, b) for a, b in pairs if a.is_floating_point() and a.numel()), default=0.0)


def _uses_batch(part: nn.Module) -> bool:
    """Whether a batch norm has no running statistics to use in eval mode."""
    return isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None
