"""What the RAAT family shares: who gets which perturbation, and the alignment term over the pairs in use."""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._shapes import per_sample
from perceptual_at.averaging import Weights
from perceptual_at.losses import dicar_loss
from perceptual_at.objectives.passes import Attack, attacked, predictions
from perceptual_at.partitions import boundary_partition
from perceptual_at.paths import interpolate

Boundary = Literal["release", "definition", "objective"]
Space = Literal["probabilities", "logits"]
AverageOver = Literal["selected", "selected_everywhere", "all"]


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
    """Misclassified on the clean input, `(B,)`; None where nobody asked and nothing else needed to know."""


def choose(
    function: str,
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    labels: Tensor,
    bound: bool,
    eta: float | Tensor | None,
    reduced_attack: Attack | None,
    boundary: Boundary,
    weights: Weights | None = None,
    as_is: bool = False,
    *,
    ask_wrong: bool = True,
) -> Choice:
    """Who is wrong already, and which input each sample is trained on."""
    if not bound and not ask_wrong:
        return Choice(x_adv, None)
    if not bound:
        (clean,) = predictions(model, x, weights=weights, as_is=as_is)
        return Choice(x_adv, clean.argmax(dim=1) != labels)
    if reduced_attack is None:
        reduced = interpolate(x, x_adv, _per_row(function, eta, x))
    else:
        reduced = attacked(function, reduced_attack, model, x, labels)
    if boundary == "objective" and not ask_wrong:
        (near,) = predictions(model, reduced, weights=weights, as_is=as_is)
        return Choice(torch.where(per_sample(near.argmax(dim=1) != labels, x), reduced, x_adv), None)
    inputs = (x, reduced, x_adv) if boundary == "release" else (x, reduced)
    clean, near, *far = predictions(model, *inputs, weights=weights, as_is=as_is)
    parts = boundary_partition(clean, near, labels, adv_logits=far[0] if far else None)
    smaller = near.argmax(dim=1) != labels if boundary == "objective" else parts.boundary
    supervised = torch.where(per_sample(smaller, x), reduced, x_adv)
    return Choice(supervised, parts.misclassified)


def _per_row(function: str, eta: float | Tensor | None, x: Tensor) -> float | Tensor:
    """One reduction for all, or one for each row; both views of an image share theirs."""
    if not isinstance(eta, Tensor):
        return 0.1 if eta is None else eta
    rows = x.shape[0]
    if eta.ndim != 1 or not eta.is_floating_point() or eta.shape[0] not in (rows, rows / 2):
        raise ValueError(
            f"{function}: `eta` must be one floating-point number per image, or one for each of the {rows} rows of all "
            f"views, got {eta.dtype} of shape {tuple(eta.shape)}."
        )
    _check.same_device(function, "eta", eta.device, "views[0]", x.device)
    return eta if eta.shape[0] == rows else eta.repeat(2)


def dicar_term(
    function: str,
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    wrong: Tensor | None,
    clean: Tensor | None,
    settings: Dicar,
) -> tuple[Tensor, Tensor | None]:
    """DICAR over the pairs of the mask, or else those with no view wrong, and the clean logits it used."""
    mix, mask = settings.mix, settings.mask
    assert mix is not None
    _check.choice(function, "average_over", settings.average_over, ("selected", "selected_everywhere", "all"))
    adv_1, adv_2 = x_adv.chunk(2)
    if mask is None:
        assert wrong is not None
        mask = ~torch.stack(wrong.chunk(2)).any(dim=0)
    _check.mask(function, "mask", mask, **{"views[0]": adv_1})
    pairs = mask.nonzero().squeeze(1)
    share = _share(settings.average_over, mask)
    if not pairs.shape[0]:
        return x.new_zeros(()), clean
    # Only these pairs enter the mixed pass, so that batch norm does not see the others (as released).
    mixed = model(interpolate(adv_2, adv_1, mix)[pairs])
    clean = model(x) if clean is None else clean
    clean_1, clean_2 = (half[pairs] for half in clean.chunk(2))
    term = dicar_loss(mixed, clean_1, clean_2, mix=mix, space=settings.space, temperature=settings.temperature)
    return share * term, clean


def _share(average_over: AverageOver, mask: Tensor) -> Tensor | float:
    """What the mean over this process's selected pairs counts for, where the mean runs over more than those.

    Every process of a distributed run takes part in the count, also one without a pair. Their gradients are averaged
    afterwards, so the mean over all pairs of W processes weighs a process by W times its part of the pairs.
    """
    if average_over == "all":
        return mask.float().mean()
    if average_over == "selected" or not (dist.is_available() and dist.is_initialized()):
        return 1.0
    counted = mask.sum()
    everywhere = counted.clone()
    dist.all_reduce(everywhere)
    return dist.get_world_size() * counted / everywhere.clamp(min=1)


def check_options(
    function: str,
    mix: float | None,
    weight: float,
    bound: bool,
    eta: float | Tensor | None,
    reduced_attack: Attack | None,
    boundary: str,
) -> None:
    """Refuse options that are out of range or would have no effect."""
    _check.number(function, "weight", weight, at_least=0.0)
    if weight > 0 and mix is None:
        raise TypeError(
            f"{function}: `mix` is needed for DICAR; draw it once per batch, for example draw_beta(fold='max')."
        )
    _check.choice(function, "boundary", boundary, ("release", "definition", "objective"))
    if eta is not None and not isinstance(eta, Tensor):
        _check.number(function, "eta", eta, above=0.0, at_most=1.0)
    if eta is not None and reduced_attack is not None:
        shown = f" of shape {tuple(eta.shape)}" if isinstance(eta, Tensor) else f"={eta!r}"
        raise ValueError(f"{function}: `eta`{shown} has no effect together with `reduced_attack`.")
    if not bound and (eta is not None or reduced_attack is not None):
        raise ValueError(f"{function}: `eta` and `reduced_attack` have no effect with bound=False.")
