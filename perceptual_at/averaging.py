"""Averaged weights as plain dicts: state in, state out."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._wrappers import bare

Weights = dict[str, Tensor]


def snapshot(model: nn.Module) -> Weights:
    """Copy of a model's parameters and buffers, detached.

    Args:
        model: any module; the names carry no prefix of `torch.compile` or of distributed wrappers.

    Returns:
        Name to tensor, as in `state_dict()`.

    Raises:
        TypeError: if `model` is no module.

    Examples:
        >>> sorted(snapshot(nn.Linear(2, 1)))
        ['bias', 'weight']
        >>> snapshot(nn.Linear(2, 1))["weight"].requires_grad
        False
    """
    _check.module("snapshot", model)
    return {name: value.detach().clone() for name, value in bare(model).state_dict().items()}


def ema_update(average: Weights, model: nn.Module, *, decay: float) -> Weights:
    r"""Move averaged weights a little towards a model's: an exponential moving average.

    $$ \bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta $$

    for parameters and for batch norm's running mean and variance; integer buffers are copied. Call it after
    the optimiser's step.

    Args:
        average: weights from `snapshot` or the last update; left untouched.
        model: the model in training.
        decay: $d$ in [0, 1]; 0 copies the model, 0.999 is usual.

    Returns:
        New averaged weights.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if names or shapes differ, or `decay` is outside [0, 1].

    Source:
        ReBAT (Wang et al. 2023), released code: running statistics are averaged like parameters.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> average = {name: torch.zeros_like(value) for name, value in snapshot(model).items()}
        >>> _ = nn.init.ones_(model.weight)
        >>> ema_update(average, model, decay=0.75)["weight"]
        tensor([[0.2500]])
        >>> torch.equal(ema_update(average, model, decay=0.0)["weight"], model.weight)
        True
    """
    _check.module("ema_update", model)
    _check.number("ema_update", "decay", decay, at_least=0.0, at_most=1.0)
    current = bare(model).state_dict()
    _check_names("ema_update", average, current)
    updated = {}
    with torch.no_grad():
        for name, value in current.items():
            if average[name].shape != value.shape:
                raise ValueError(
                    f"ema_update: `average` has {name!r} of shape {tuple(average[name].shape)} but the model's is of "
                    f"shape {tuple(value.shape)}; they must come from the same model."
                )
            if value.is_floating_point():
                updated[name] = torch.lerp(average[name], value, 1.0 - decay)
            else:
                updated[name] = value.clone()
    return updated


def call_with(model: nn.Module, weights: Weights, *args: Tensor) -> Tensor:
    """Output of a model run with other weights; the model itself is not touched.

    The model's present mode counts: with batch norm in train mode the call uses batch statistics and moves the
    running statistics *in the dict*. Call an averaged model in eval mode, for example inside `frozen(model)`.

    Args:
        model: any module.
        weights: parameters and buffers by name, as from `snapshot`.
        *args: what the model takes.

    Returns:
        What the model returns.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if names are missing or unknown.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> call_with(model, {"weight": torch.tensor([[3.0]])}, torch.tensor([[2.0]]))
        tensor([[6.]])
        >>> with frozen(model) as f:
        ...     call_with(f, {"weight": torch.tensor([[3.0]])}, torch.tensor([[0.5]]))
        tensor([[1.5000]])
    """
    _check.module("call_with", model)
    _check_names("call_with", weights, bare(model).state_dict())
    output: Tensor = torch.func.functional_call(bare(model), weights, args)
    return output


def _check_names(function: str, weights: Weights, own: dict[str, Tensor]) -> None:
    if not isinstance(weights, Mapping):
        raise TypeError(f"{function}: weights must be a dict of tensors by name, got {type(weights).__name__}.")
    missing, unknown = own.keys() - weights.keys(), weights.keys() - own.keys()
    if missing or unknown:
        raise ValueError(
            f"{function}: the weights do not belong to this model: missing {sorted(missing)[:5]}, unknown "
            f"{sorted(unknown)[:5]}."
        )
