"""On what terms a model is asked for, and what is refused: messages for what is not right at a glance."""

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, NoReturn

from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._shapes import lacks_variance
from perceptual_at.divergences import PerSampleLoss
from perceptual_at.threats import check_threat
from perceptual_at.victims.finding import modules_of
from perceptual_at.victims.lanes import Lane
from perceptual_at.victims.twins import FastModel

Model = Callable[..., Any]
ModelMode = Literal["eval", "as_is"]


class Terms(NamedTuple):
    """On what terms an attack asks for a model."""

    loss: PerSampleLoss | None = None
    """What is ascended; None where the attack needs no more than logits."""
    targets: Tensor | None = None
    start: str | Tensor = "random"
    model_mode: ModelMode = "eval"
    lane: Lane | None = None
    eot: int = 1
    """How many passes make one answer, the mean of theirs; for models that are random."""
    validate: bool = True
    judged: bool = True
    """Whether there is success and failure, which are matters of one class per sample."""
    even: bool = False
    """Whether the number of passes is the same whatever the samples are."""


def check_each(function: str, x: Tensor, labels: Tensor, threat: Any, terms: Terms) -> None:
    """Require arguments of the right kind, shape and device, one by one; reads no values."""
    _check.floating(function, x=x)
    check_threat(function, threat)
    given: tuple[Any, ...] = (labels,) if terms.targets is None else (labels, terms.targets)
    for name, one in zip(("labels", "targets"), given, strict=False):
        if terms.judged:
            _refuse_other_tasks(function, name, one, terms)
            _check.labels(function, one, name=name, x=x)
        else:
            _check.row_labels(function, one, classes=is_own(terms.loss), name=name, x=x)
    if isinstance(terms.start, Tensor):
        _check.same_shape(function, x=x, start=terms.start)
    else:
        _check.choice(function, "start", terms.start, ("random", "clean"))
    _check.choice(function, "model_mode", terms.model_mode, ("eval", "as_is"))
    _check.count(function, "eot", terms.eot)
    _check.flag(function, validate=terms.validate)


def _refuse_other_tasks(function: str, name: str, value: Any, terms: Terms) -> None:
    """Say why labels that a loss of the user's own takes will not do where success is judged."""
    own = terms.loss is None or is_own(terms.loss)
    if not own and isinstance(value, Tensor) and (value.is_floating_point() or value.ndim > 1):
        raise TypeError(
            f"{function}: `{name}` must be integer class indices of shape (B,), got {value.dtype} of shape "
            f"{tuple(value.shape)}: success is a matter of one class per sample. `pgd` and `fgsm` without `verdict` "
            "and `early_stop` take any labels that their `loss` takes."
        )


def check_lane(function: str, model: Model, model_mode: ModelMode, lane: Any) -> None:
    """Refuse a lane that cannot be had."""
    if isinstance(model, FastModel):
        if lane is not None:
            raise ValueError(f"{function}: `model` runs in {model.lane} already, so it cannot take `lane`={lane}.")
        if model_mode == "as_is":
            raise ValueError(
                f"{function}: `model` runs in a lane, which is always in eval mode, not model_mode='as_is'."
            )
    if lane is None:
        return
    if not isinstance(lane, Lane):
        raise TypeError(
            f"{function}: `lane` must be a Lane or None, got {lane!r}. One of bfloat16 is Lane(dtype=torch.bfloat16)."
        )
    if model_mode == "as_is":
        raise ValueError(f"{function}: a `lane` is always in eval mode; it cannot be had with model_mode='as_is'.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: `lane` needs a torch.nn.Module to copy, got {type(model).__name__}.")


def refuse_transforms(function: str) -> NoReturn:
    """Say what to do inside a transform of torch.func, where no model can be lent."""
    raise TypeError(
        f"{function}: an attack cannot be differentiated or mapped by torch.func (grad, vmap, ...); call it outside, "
        "or take `attacks.pure_pgd`, which can."
    )


def check_logits(function: str, logits: Any, batch: int, labels: Tensor, *, name: str = "labels") -> None:
    """Require logits `(B, K)`, or dense ones, of as many samples as the batch has, that fit the labels."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{function}: `model` must return a tensor of logits, got {type(logits).__name__}; take them out with "
            "perceptual_at.models.logits_of, or give a `loss` of such outputs."
        )
    if logits.ndim < 2 or logits.shape[0] != batch or logits.shape[1] < 2:
        one = logits.ndim >= 2 and logits.shape[1] == 1
        hint = " One logit z for two classes is the pair [0, z]." if one else ""
        raise ValueError(
            f"{function}: `model` must return logits of shape ({batch}, K), or ({batch}, K, *places), with K >= 2 "
            f"classes, got shape {tuple(logits.shape)}.{hint} Other outputs need a `loss` of your own."
        )
    _check.floating(function, **{"model(x)": logits})
    _check.same_device(function, name, labels.device, "model(x)", logits.device)
    places = (batch, *logits.shape[2:])
    if labels.is_floating_point() and labels.shape != logits.shape:
        mask = " A mask of class indices is cast by `.long()`." if labels.shape == places else ""
        raise ValueError(
            f"{function}: `{name}` of {labels.dtype} and shape {tuple(labels.shape)} must be class probabilities of "
            f"the shape of the logits, {tuple(logits.shape)}.{mask}"
        )
    if not labels.is_floating_point() and labels.shape != places:
        raise ValueError(
            f"{function}: `{name}` must be integer class indices of shape {places} for logits of "
            f"shape {tuple(logits.shape)}, got shape {tuple(labels.shape)}.{_check.way_to(places, labels, name)}"
        )


def check_values(function: str, values: Any, batch: int) -> None:
    """Require one loss per sample."""
    if not isinstance(values, Tensor) or values.shape != (batch,):
        each = isinstance(values, Tensor) and values.ndim > 1 and len(values) == batch
        torchs = "with torch's losses pass reduction='none'"
        raise ValueError(
            f"{function}: `loss` must return one value per sample, shape ({batch},), got {_check.came(values)}; "
            f"{'take the mean over the others, `.flatten(1).mean(dim=1)`' if each else torchs}."
        )


OWN = "perceptual_at."
"""How the modules of the library's own losses begin."""


def is_own(loss: Any) -> bool:
    """Whether a loss is one of the library's, which are about logits and classes."""
    return getattr(loss, "__module__", "").startswith(OWN)


def asked(function: str, model: Model, x: Tensor, *, name: str = "x") -> Any:
    """What a model gives for a copy of the inputs, which it may write to."""
    try:
        return model(x.clone())
    except (RuntimeError, ValueError) as error:
        explain_pass(function, modules_of(model), x, error, name=name)
        raise


FAILURES = (RuntimeError, ValueError, IndexError, AssertionError)
"""What models and losses raise for tensors that are not as they want them; exports and graph networks the last two."""


def explain_rows(function: str, name: str, those: str, error: Exception) -> None:
    """Say it where a pass failed because a part of the samples came, of whose whole batch another pass did not."""
    if isinstance(error, RuntimeError | ValueError) and not re.search(r"\b(sizes?|shape)\b", str(error), re.IGNORECASE):
        return
    advice = (
        "it needs a `select(rows)`, as `kl_to` has."
        if name == "loss"
        else "it needs to get it with `x` (models.from_joined); if it takes batches of one size only, "
        "models.whole_batches; if samples look at each other, as the nodes of a graph do, they are the places of one "
        "sample."
    )
    raise ValueError(
        f"{function}: `{name}` fails for {those}: {str(error).rstrip('.')}. If it holds something for each "
        f"sample, {advice}"
    ) from error


def explain_pass(function: str, modules: Iterable[nn.Module], x: Tensor, error: Exception, *, name: str = "x") -> None:
    """Say it where a pass failed because model and inputs are of two dtypes, or on two devices; or of a lone sample."""
    if lacks_variance(error):
        raise ValueError(
            f"{function}: a batch norm in train mode sees a single value per channel in a batch of shape "
            f"{tuple(x.shape)}, which has no variance. Leave out batches of one (`drop_last=True`), or run the model "
            f"in eval mode: {error}"
        ) from error
    if isinstance(error, ValueError):  # which says it already
        return
    weights = [parameter for module in modules for parameter in module.parameters()]
    for place, came, found, words in (
        ("", x.dtype, {weight.dtype for weight in weights}, r"\b(d?types?|float|double|half)\b"),
        ("on ", x.device, {weight.device for weight in weights}, r"\bdevices?\b"),
    ):
        own = found - {came}
        if own and re.search(words, str(error), re.IGNORECASE):
            held = " and ".join(sorted(map(str, own)))
            raise ValueError(
                f"{function}: `{name}` is {place}{came} but the model has weights {place or 'of '}{held}: {error}"
            ) from error
