"""What the RAAT family shares: who gets which perturbation, and the alignment term over the pairs in use."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from perceptual_at import _check
from perceptual_at._places import labelled, over_places, wrong
from perceptual_at._shapes import lacks_variance, per_sample, rows
from perceptual_at.averaging import Weights
from perceptual_at.losses import dicar_loss
from perceptual_at.objectives.passes import Attack, attacked, forward, predictions
from perceptual_at.partitions import boundary_partition
from perceptual_at.paths import interpolate

Boundary = Literal["release", "definition", "objective"]
ReducePer = Literal["sample", "place"]
Space = Literal["probabilities", "logits"]
AverageOver = Literal["selected", "selected_everywhere", "all"]


class Bound(NamedTuple):
    """The rule for smaller perturbations at the boundary."""

    used: bool
    eta: float | Tensor | None
    reduced_attack: Attack | None
    boundary: Boundary
    reduce_per: ReducePer


class Dicar(NamedTuple):
    """The settings of the alignment term."""

    mix: float | None
    mask: Tensor | None
    space: Space
    temperature: float
    average_over: AverageOver


class Choice(NamedTuple):
    """What the partition decides."""

    supervised: Tensor
    """Inputs of the supervised term."""
    wrong: Tensor | None
    """Misclassified on the clean input, `(B, *S)`; None where nobody asked and nothing else needed to know."""


def choose(
    function: str,
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    labels: Tensor,
    bound: Bound,
    weights: Weights | None = None,
    as_is: bool = False,
    *,
    ask_wrong: bool = True,
) -> Choice:
    """Who is wrong already, and which input each sample is trained on."""
    if not bound.used and not ask_wrong:
        return Choice(x_adv, None)
    if not bound.used:
        (clean,) = predictions(model, x, weights=weights, as_is=as_is)
        return Choice(x_adv, _wrong(function, clean, labels))
    if bound.reduced_attack is None:
        reduced = interpolate(x, x_adv, 0.1 if bound.eta is None else bound.eta)
    else:
        reduced = attacked(function, bound.reduced_attack, model, x, labels)
    if bound.boundary == "objective" and not ask_wrong:
        (near,) = predictions(model, reduced, weights=weights, as_is=as_is)
        smaller = _wrong(function, near, labels)
        return Choice(composed(function, smaller, reduced, x_adv, labels, bound.reduce_per), None)
    inputs = (x, reduced, x_adv) if bound.boundary == "release" else (x, reduced)
    clean, near, *far = predictions(model, *inputs, weights=weights, as_is=as_is)
    _check.indices(function, labels, clean_logits=clean)
    parts = boundary_partition(clean, near, labels, adv_logits=far[0] if far else None)
    smaller = _wrong(function, near, labels) if bound.boundary == "objective" else parts.boundary
    return Choice(composed(function, smaller, reduced, x_adv, labels, bound.reduce_per), parts.misclassified)


def composed(
    function: str, where: Tensor, a: Tensor, b: Tensor, labels: Tensor, reduce_per: ReducePer = "sample"
) -> Tensor:
    """Inputs from `a` where the mask of samples or places holds and from `b` elsewhere.

    A sample whose places disagree is, per sample, as far on the way from `b` to `a` as the share of its labelled
    places says; per place it takes the entries around each place from one or the other.
    """
    if where.ndim == 1:
        return torch.where(per_sample(where, a), a, b)
    if reduce_per == "sample":
        return interpolate(b, a, over_places(where.to(a.dtype), labelled(labels)))
    if where.ndim != a.ndim - 1:
        raise ValueError(
            f"{function}: `reduce_per`='place' needs inputs (B, C, *S) with as many dimensions of places as labels, "
            f"got shapes {tuple(a.shape)} and {tuple(labels.shape)}; take 'sample'."
        )
    chosen = where.unsqueeze(1)
    if chosen.shape[2:] != a.shape[2:]:  # coarser or finer than the inputs: the nearest place decides
        chosen = functional.interpolate(chosen.to(a.dtype), size=a.shape[2:], mode="nearest").bool()
    return torch.where(chosen, a, b)


def _wrong(function: str, logits: Tensor, labels: Tensor) -> Tensor:
    return wrong(logits, _check.indices(function, labels, logits=logits))


def per_row(function: str, eta: float | Tensor | None, views: Sequence[Tensor]) -> float | Tensor | None:
    """One reduction for all, or one for each row of views that are attacked together; an image's views share theirs."""
    if not isinstance(eta, Tensor):
        return eta
    images, rows = len(views[0]), len(views) * len(views[0])
    if eta.ndim != 1 or not eta.is_floating_point() or len(eta) not in (images, rows):
        of_views = f", or one for each of the {rows} rows of all views" if rows > images else ""
        raise ValueError(
            f"{function}: `eta` must be one floating-point number for each of the {images} images{of_views}, got "
            f"{eta.dtype} of shape {tuple(eta.shape)}."
        )
    _check.same_device(function, "eta", eta.device, "views[0]", views[0].device)
    return eta if len(eta) == rows else eta.repeat(len(views))


def check_mask(function: str, mask: Tensor | None, view: Tensor, labels: Tensor) -> None:
    """Require a mask of the pairs, or of their places, that belongs to these images; or none."""
    if mask is not None:
        places = labels.shape[2 if labels.is_floating_point() else 1 :]
        _check.mask(function, "mask", mask, places=places, **{"views[0]": view})


def dicar_term(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    labels: Tensor,
    wrong: Tensor | None,
    clean: Tensor | None,
    settings: Dicar,
) -> tuple[Tensor, Tensor | None]:
    """DICAR over the pairs, or places, of the mask or else where no view is wrong, and the clean logits it used."""
    mix, mask = settings.mix, settings.mask
    assert mix is not None
    adv_1, adv_2 = x_adv.chunk(2)
    if mask is None:
        assert wrong is not None
        counted = labelled(labels)
        right = ~wrong if counted is None else counted & ~wrong
        mask = torch.stack(right.chunk(2)).all(dim=0)
    used = rows(mask).any(dim=1)
    pairs = used.nonzero().squeeze(1)
    share = _share(settings.average_over, used)
    if not pairs.shape[0]:
        return x.new_zeros(()), clean
    # Only these pairs enter the mixed pass, so that batch norm does not see the others (as released).
    try:
        mixed = forward(model, interpolate(adv_2, adv_1, mix)[pairs])
    except (ValueError, RuntimeError) as error:
        if len(pairs) > 1 or not lacks_variance(error):
            raise
        return x.new_zeros(()), clean  # a single pair where batch norm has nothing to take a variance of
    clean = forward(model, x) if clean is None else clean
    clean_1, clean_2 = (half[pairs] for half in clean.chunk(2))
    term = dicar_loss(
        mixed, clean_1, clean_2, mix=mix, space=settings.space, temperature=settings.temperature,
        mask=mask[pairs] if mask.ndim > 1 else None,
    )  # fmt: skip
    return share * term, clean


def _share(average_over: AverageOver, used: Tensor) -> Tensor | float:
    """What the mean over this process's selected pairs counts for, where the mean runs over more than those.

    Every process of a distributed run takes part in the count, also one without a pair. Their gradients are averaged
    afterwards, so the mean over all pairs of W processes weighs a process by W times its part of the pairs.
    """
    if average_over == "all":
        return used.float().mean()
    if average_over == "selected" or not (dist.is_available() and dist.is_initialized()):
        return 1.0
    counted = used.sum()
    everywhere = counted.clone()
    dist.all_reduce(everywhere)
    return dist.get_world_size() * counted / everywhere.clamp(min=1)


def check_options(function: str, weight: float, labels: Tensor, bound: Bound | None, dicar: Dicar) -> None:
    """Refuse options that are out of range or would have no effect, whatever the batch holds."""
    _check.number(function, "weight", weight, at_least=0.0)
    if dicar.mix is None and (weight > 0 or bound is None):
        raise TypeError(
            f"{function}: `mix` is needed for DICAR; draw it once per batch, for example draw_beta(fold='max')."
        )
    if dicar.mix is not None:
        _check.number(function, "mix", dicar.mix, at_least=0.0, at_most=1.0)
    _check.choice(function, "space", dicar.space, ("probabilities", "logits"))
    _check.number(function, "temperature", dicar.temperature, above=0.0)
    _check.choice(function, "average_over", dicar.average_over, ("selected", "selected_everywhere", "all"))
    if bound is None:
        return
    _check.flag(function, bound=bound.used)
    _check.choice(function, "boundary", bound.boundary, ("release", "definition", "objective"))
    _check.choice(function, "reduce_per", bound.reduce_per, ("sample", "place"))
    eta, reduced_attack = bound.eta, bound.reduced_attack
    if reduced_attack is not None:
        _check.attack(function, "`reduced_attack`", reduced_attack)
    if eta is not None and not isinstance(eta, Tensor):
        _check.number(function, "eta", eta, above=0.0, at_most=1.0)
    if eta is not None and reduced_attack is not None:
        shown = f" of shape {tuple(eta.shape)}" if isinstance(eta, Tensor) else f"={eta!r}"
        raise ValueError(f"{function}: `eta`{shown} has no effect together with `reduced_attack`.")
    if not bound.used and (eta is not None or reduced_attack is not None):
        raise ValueError(f"{function}: `eta` and `reduced_attack` have no effect with bound=False.")
    if bound.reduce_per == "place" and isinstance(labels, Tensor) and labels.ndim == 1:
        raise ValueError(f"{function}: `reduce_per`='place' has no effect with labels of shape {tuple(labels.shape)}.")
