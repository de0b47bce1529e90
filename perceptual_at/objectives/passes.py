"""What the objectives share: their arguments, and the forward passes of a training step."""

import functools
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from perceptual_at import _check, _random
from perceptual_at._rounding import common
from perceptual_at.attacks import kl_to
from perceptual_at.averaging import Weights, call_with
from perceptual_at.victims import explain_pass, lent, modules_of

Attack = Callable[..., Tensor]
"""`(model, x, labels) -> x_adv`; some objectives also pass `start=` and `loss=`."""

Perceive = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Runs the model on inputs; gives its logits and the perception to regularise."""

Result = tuple[Tensor, dict[str, Tensor]]
"""The loss, and every term as a detached scalar."""


def one_batch(
    function: str, model: nn.Module, views: Sequence[Tensor], labels: Tensor, *, expected: tuple[int, ...] = (1, 2)
) -> tuple[Tensor, Tensor]:
    """The views as one batch, and the labels repeated once per view."""
    check_views(function, model, views, labels, expected=expected)
    if len(views) == 1:
        return views[0], labels
    return torch.cat(tuple(views)), repeat(labels, "b ... -> (v b) ...", v=len(views))


def check_views(function: str, model: Any, views: Any, labels: Any, *, expected: tuple[int, ...]) -> None:
    """Require something to call, and as many views as expected, of one shape, with fitting labels."""
    _check.model(function, model)
    if not isinstance(views, tuple | list) or len(views) not in expected:
        wanted = " or ".join({1: "(x,)", 2: "(x1, x2)"}[count] for count in expected)
        got = f"{len(views)} of them" if isinstance(views, tuple | list) else type(views).__name__
        raise (ValueError if isinstance(views, tuple | list) else TypeError)(
            f"{function}: `views` must be a tuple {wanted} of augmentations of the same images, got {got}."
        )
    _check.same_shape(function, **{f"views[{i}]": view for i, view in enumerate(views)})
    _check.row_labels(function, labels, **{"views[0]": views[0]})


def beta_on(function: str, base: str, beta: float | None, *, usual: float) -> float:
    """The weight of a base's KL, the usual one if left out; refused on PGD-AT, which has none."""
    if beta is not None and base != "trades":
        raise ValueError(f"{function}: `beta`={beta!r} has no effect with base={base!r}.")
    beta = usual if beta is None else beta
    _check.number(function, "beta", beta, at_least=0.0)
    return beta


def only_on(function: str, owner: str, base: str, **options: tuple[object, object]) -> None:
    """Refuse options, each with its value and its default, that only one base has; on another they have no effect."""
    for name, (value, usual) in options.items():
        if value != usual and base != owner:
            raise ValueError(f"{function}: `{name}`={value!r} has no effect with base={base!r}; only {owner!r} has it.")


def check_indices(function: str, labels: Tensor) -> None:
    """Refuse class probabilities where a single right class is needed."""
    if labels.is_floating_point():
        raise TypeError(
            f"{function}: `labels` must be class indices, got class probabilities of shape {tuple(labels.shape)}; "
            "mixed images (CutMix) have no single right class."
        )


def attacked(function: str, attack: Attack, model: nn.Module, x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Adversarial inputs from the caller's attack, checked and without history."""
    for option in options:
        if option in getattr(attack, "keywords", ()):
            raise TypeError(
                f"{function}: `attack` has a `{option}` of its own, which has no effect: {function} attacks with "
                "the one that belongs to it. Leave it out."
            )
    _check.attack(function, "`attack`", attack, *options)
    _check.readable_probabilities(function, labels)  # an attack with a loss of the user's own does not look at them
    x_adv = attack(model, x, labels, **options)
    _check.same_shape(function, x=x, **{"attack(model, x, labels)": x_adv})
    if x_adv.dtype != x.dtype:
        raise TypeError(
            f"{function}: `attack(model, x, labels)` must return inputs of {x.dtype}, as it was given, got "
            f"{x_adv.dtype}; end it with `x_adv.to(x.dtype)`."
        )
    return x_adv.detach() if x_adv.requires_grad else x_adv


def gaussian_start(function: str, x: Tensor, noise: float, generator: torch.Generator | None) -> Tensor:
    """The start of TRADES and MART: beside the clean input, where the KL has a gradient. Not clipped."""
    generator = source_of_noise(function, noise, generator, x)
    drawn = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
    return x + noise * drawn.to(x.device)


def source_of_noise(function: str, noise: float, generator: torch.Generator | None, x: Tensor) -> torch.Generator:
    """Where noise for these inputs comes from. Its size is checked, also by objectives that may draw none."""
    _check.number(function, "noise", noise, above=0.0)
    return _random.source(function, generator, x.device)


def kl_attacked(
    function: str,
    attack: Attack,
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    noise: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Adversarial inputs as TRADES makes them; an attack that has its answer already is asked for nothing."""
    if getattr(attack, "answered", False):
        return attacked(function, attack, model, x, labels)
    (reference,) = predictions(model, x)  # what the attack's own logits start from
    start = gaussian_start(function, x, noise, generator)
    return attacked(function, attack, model, x, labels, loss=kl_to(reference), start=start)


def predictions(
    model: nn.Module,
    *inputs: Tensor,
    weights: Weights | None = None,
    as_is: bool = False,
    name: str = "model",
) -> list[Tensor]:
    """Logits without gradients, in eval mode (or as the model stands), optionally with other weights."""
    with torch.no_grad(), lent("objectives", model, model_mode="as_is" if as_is else "eval") as f:
        run = f if weights is None else functools.partial(call_with, model, weights)
        return [_logits(run, x.clone(), name) for x in inputs]


def forward(model: Callable[[Tensor], Any], x: Tensor, *, name: str = "model") -> Tensor:
    """Logits at `x`. The model gets a copy, because it may write to its input, which other terms still need."""
    return _logits(model, x if getattr(model, "copies", False) else x.clone(), name)


def _logits(run: Callable[[Tensor], Any], x: Tensor, name: str) -> Tensor:
    """Logits at a copy of inputs. Only where there are none does it matter who was called."""
    try:
        output = run(x)
    except (RuntimeError, ValueError) as error:
        explain_pass(_called(), modules_of(run), x, error, name="views[0]")
        raise
    try:
        _check_logits("", name, output, x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_called()}{error}") from None
    return output  # type: ignore[no-any-return]


def _check_logits(function: str, name: str, output: Any, x: Tensor) -> None:
    """Require logits of each sample, as what the model of that name returned."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{function}: `{name}` must return a tensor of logits, got {type(output).__name__}; take them out with "
            "perceptual_at.models.logits_of."
        )
    _check.logits(function, **{f"{name}(x)": output})
    if output.shape[0] != x.shape[0]:
        raise ValueError(
            f"{function}: `{name}` must return a row of logits for each of {x.shape[0]} samples, got shape "
            f"{tuple(output.shape)}."
        )


def _called() -> str:
    """The objective that was called: of the functions of this package that are at work the outermost."""
    frames = [frame for frame, _ in traceback.walk_stack(None)]
    return [f.f_code.co_name for f in frames if str(f.f_globals.get("__name__")).startswith(f"{__package__}.")][-1]


def finish(loss: Tensor, **terms: Tensor) -> Result:
    """The loss, in the dtype of its terms whatever that of their weights, and the terms detached for logging."""
    return loss.to(common(*terms.values())), {name: value.detach() for name, value in terms.items()}
