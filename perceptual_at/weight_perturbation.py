"""Adversarial weight perturbation: a step is taken where the weights are at their worst nearby.

A training step has two halves: `ascend` moves the weights to where the loss is larger, the objective is called
again there, and `restore` moves them back. Between the two the model is perturbed; nothing else is kept.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from perceptual_at import _check
from perceptual_at._differentiation import by_grad
from perceptual_at._rounding import wide
from perceptual_at.averaging import Weights
from perceptual_at.victims.finding import bare

Selection = Literal["weights", "matrices", "all"] | Callable[[str, Tensor], bool]


class WeightPerturbation(NamedTuple):
    """How far `ascend` moved which parameters, and where they were; by name, plain tensors.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> moved = ascend(layer, lambda: layer(torch.ones(1, 2)).sum(), size=0.1)
        >>> torch.equal(moved.before["weight"] + moved.move["weight"], layer.weight.detach())
        True
        >>> list(moved.move)
        ['weight']
    """

    move: Weights
    before: Weights


def ascend(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    size: float = 0.005,
    steps: int = 1,
    parameters: Selection = "weights",
    buffers: Literal["keep", "move"] = "keep",
) -> WeightPerturbation:
    r"""Move a model's weights to where a loss is larger, each tensor by `size` times its own length.

    $$ W \leftarrow W + \gamma\, \frac{\|W\|}{\|\nabla_W \ell\|}\, \nabla_W \ell $$

    Lengths are Euclidean and of whole tensors, so that layers of any scale are perturbed alike. The gradient is
    taken of what `loss` computes with the model as it stands; no `.grad` is read or written. Under
    `DistributedDataParallel` it is averaged over the processes, which therefore stay equal. A tensor with a
    gradient of zero, or one that is not finite, stays where it is.

    Passes: those of `loss`, with gradients, per step.

    Args:
        model: its parameters are moved in place; a wrapper for training is looked through.
        loss: computes the loss, a scalar, with the model as it is when called. Call the attack before, or through
            `once`, so that it meets unperturbed weights and is not paid twice.
        size: $\gamma$, the length of the move relative to the tensor's; 0.01 (PGD-AT) and 0.005 (TRADES) in AWP's
            code.
        steps: number of steps of `size / steps`, each with a gradient of its own; the lengths are those of the
            unperturbed weights.
        parameters: which tensors move: `"weights"` those with more than one dimension and "weight" in their name,
            `"matrices"` those with more than one dimension, `"all"` biases and batch norm's too, or a function
            `(name, parameter) -> bool`. Frozen parameters never move.
        buffers: `"keep"` puts running statistics back as they were before `loss` was called, as AWP's code, which
            takes the gradient on a copy of the model; `"move"` leaves what the calls made of them, as ADR's code.

    Returns:
        The move, to be given to `restore`.

    Raises:
        TypeError: if `model` is no module, or `loss` no function that gives a tensor.
        ValueError: if `loss` gives no scalar with a gradient, no parameter is selected, or a number is out of range.

    Source:
        Wu et al. 2020 (AWP), Eq. 9 and 10, and its released code; `parameters="matrices"` with `steps` is the code's
        second version, `parameters="all"` with `buffers="move"` that of ADR's code.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 3.0)
        >>> moved = ascend(layer, lambda: layer(torch.tensor([[1.0, 0.0]])).sum(), size=0.5)
        >>> moved.move["weight"]  # half of the length of (3, 3), in the direction of the gradient
        tensor([[2.1213, 0.0000]])
        >>> restore(layer, moved, form="sam")
        >>> layer.weight.tolist()
        [[3.0, 3.0]]
    """
    _check.module("ascend", model)
    if not callable(loss):
        raise TypeError(
            f"ascend: `loss` must be a function that computes the loss anew, such as `lambda: criterion(model(x), "
            f"labels)`, got {type(loss).__name__}."
        )
    _check.number("ascend", "size", size, at_least=0.0)
    _check.count("ascend", "steps", steps)
    _check.choice("ascend", "buffers", buffers, ("keep", "move"))
    chosen = dict(_selected(model, parameters))
    if not chosen:
        raise ValueError(f"ascend: `parameters`={parameters!r} selects no parameter of the model that requires one.")
    kept = {name: value.detach().clone() for name, value in bare(model).named_buffers() if buffers == "keep"}
    before = {name: value.detach().clone() for name, value in chosen.items()}
    try:
        for _ in range(steps):
            gradients = _gradients(model, loss, list(chosen.values()))
            with torch.no_grad():
                for (name, value), gradient in zip(chosen.items(), gradients, strict=True):
                    value.add_(_towards(gradient, before[name], size / steps))
    except BaseException:  # an interrupt too: half a step is nobody's weights
        _put_back(chosen, before)
        raise
    finally:
        _put_back(dict(bare(model).named_buffers()), kept)
    return WeightPerturbation({name: chosen[name].detach() - before[name] for name in chosen}, before)


def restore(model: nn.Module, perturbation: WeightPerturbation, *, form: Literal["awp", "sam"]) -> None:
    """Take a perturbation of the weights back, in one of two forms that differ in when they are called.

    `"awp"` comes after the optimiser's step and subtracts the move: the step was taken at the perturbed point, so
    momentum and weight decay saw the perturbed weights, and it stays. `"sam"` comes before the optimiser's step and
    puts the weights back, to the last bit: only the gradients come from the perturbed point.

    Args:
        model: the model that was perturbed.
        perturbation: what `ascend` returned.
        form: `"awp"` as AWP's code, `"sam"` as sharpness-aware minimisation and ADR's code.

    Returns:
        Nothing; the model's parameters are changed in place.

    Raises:
        TypeError: if `model` is no module or `perturbation` not what `ascend` returns.
        ValueError: if the perturbation is of another model, or `form` is unknown.

    Source:
        AWP (Wu et al. 2020), released code; Foret et al. 2021 (SAM), Algorithm 1.

    Examples:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 2.0)
        >>> moved = ascend(layer, lambda: layer(torch.ones(1, 1)).sum(), size=0.25)  # to 2.5
        >>> with torch.no_grad():
        ...     _ = layer.weight.sub_(1.0)  # the optimiser's step
        >>> restore(layer, moved, form="awp")
        >>> layer.weight.item()
        1.0
    """
    _check.module("restore", model)
    _check.choice("restore", "form", form, ("awp", "sam"))
    if not isinstance(perturbation, WeightPerturbation):
        raise TypeError(f"restore: `perturbation` must be what `ascend` returns, got {type(perturbation).__name__}.")
    own = dict(bare(model).named_parameters())
    for name, move in perturbation.move.items():
        if name not in own or own[name].shape != move.shape:
            raise ValueError(
                f"restore: `perturbation` moved {name!r} of shape {tuple(move.shape)}, which is not in this model."
            )
    if form == "sam":
        _put_back(own, perturbation.before)
        return
    with torch.no_grad():
        for name, move in perturbation.move.items():
            own[name].sub_(move)


def once(attack: Callable[..., Tensor], *, calls: int = 1) -> Callable[..., Tensor]:
    """An attack that is made once and then answers as before: for a step that calls its objective again.

    Make a new one for every batch. Objectives that attack each view by itself (`raat_sharp`), or with a reduced
    attack beside, call more than once: the answers are repeated in their order.

    Args:
        attack: `(model, x, labels) -> x_adv`.
        calls: how often the objective calls it.

    Returns:
        A function like `attack`.

    Raises:
        TypeError: if `attack` is no function; when it is called, if it gives no tensor.
        ValueError: if `calls` is not positive; when it is called, if the inputs have another shape than those that
            its answer was made for.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = once(functools.partial(pgd, threat=Linf(0.1)))
        >>> first = attack(model, x, labels)
        >>> attack(model, x, labels) is first
        True

        A step of TRADES-AWP:

        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> attack = once(functools.partial(pgd, threat=Linf(0.1)))
        >>> trades = functools.partial(objectives.trades, model, (x,), labels, attack)
        >>> moved = ascend(model, lambda: trades()[0], size=0.005)
        >>> loss, terms = trades()
        >>> loss.backward()
        >>> optimizer.step()
        >>> restore(model, moved, form="awp")
    """
    if not callable(attack):
        raise TypeError(f"once: `attack` must be a function (model, x, labels) -> x_adv, got {type(attack).__name__}.")
    _check.count("once", "calls", calls)
    answers: list[Tensor] = []
    asked = 0

    def answer(model: Any, x: Tensor, labels: Tensor, **options: Any) -> Tensor:
        nonlocal asked
        place = asked % calls
        if place == len(answers):
            made = attack(model, x, labels, **options)
            if not isinstance(made, Tensor):
                raise TypeError(f"once: `attack` must give x_adv, a tensor, got {type(made).__name__}.")
            answers.append(made)
            answer.loss = options.get("loss")  # type: ignore[attr-defined]  # what it counted is counted (GAIRAT)
            answer.answered = len(answers) == calls  # type: ignore[attr-defined]  # objectives need not prepare one
        if answers[place].shape != x.shape:
            raise ValueError(
                f"once: the answer was made for inputs of shape {tuple(answers[place].shape)} and is asked for inputs "
                f"of shape {tuple(x.shape)}; make a new attack for every batch, and say how many `calls` an objective "
                "makes."
            )
        asked += 1  # only now: an attack that failed is asked again
        return answers[place]

    return answer


def _selected(model: nn.Module, which: Selection) -> Iterator[tuple[str, Tensor]]:
    """The parameters that move, by name."""
    if not callable(which):
        _check.choice("ascend", "parameters", which, ("weights", "matrices", "all"))
    for name, value in bare(model).named_parameters():
        if callable(which):
            wanted = which(name, value)
        else:
            wanted = which == "all" or (value.ndim > 1 and (which == "matrices" or "weight" in name))
        if wanted and value.requires_grad:
            yield name, value


def _gradients(model: nn.Module, loss: Callable[[], Tensor], chosen: list[Tensor]) -> list[Tensor | None]:
    """The gradients of the loss, the same on every process of a distributed model."""
    with torch.enable_grad():
        value: Any = loss()
    if not torch.is_tensor(value):
        hint = " An objective returns (loss, terms): take its first." if isinstance(value, tuple) else ""
        raise TypeError(f"ascend: `loss` must give a scalar tensor, got {type(value).__name__}.{hint}")
    if value.ndim or not value.requires_grad:
        raise ValueError(
            f"ascend: `loss` must give a scalar that depends on the model's parameters, got shape {tuple(value.shape)}"
            f"{'' if value.requires_grad else ' without a gradient'}."
        )
    with by_grad("ascend", "parameters"):
        found = torch.autograd.grad(value, chosen, allow_unused=True)
    gradients: list[Tensor | None] = [one.to_dense() if one is not None and one.is_sparse else one for one in found]
    wrapper: Any = getattr(model, "_orig_mod", model)
    if not isinstance(wrapper, DistributedDataParallel):
        return gradients
    for place, gradient in enumerate(gradients):
        summed = torch.zeros_like(chosen[place]) if gradient is None else gradient.contiguous()
        distributed.all_reduce(summed, group=wrapper.process_group)
        gradients[place] = summed / distributed.get_world_size(wrapper.process_group)
    return gradients


def _towards(gradient: Tensor | None, weight: Tensor, size: float) -> Tensor:
    """A move along the gradient, of the weight's length times `size`."""
    if gradient is None or not gradient.numel():
        return torch.zeros_like(weight)
    dtype = wide(weight)
    largest = torch.linalg.vector_norm(gradient, ord=math.inf, dtype=dtype)
    far_out = (largest < 1e-15) | (largest > 1e15)  # squares would leave float32
    gradient = gradient.to(dtype) / torch.where(far_out, largest, 1.0)
    length = torch.linalg.vector_norm(gradient)
    usable = (length > 0) & length.isfinite()
    ratio = torch.where(usable, size * torch.linalg.vector_norm(weight, dtype=dtype) / length, 0.0)
    return torch.where(usable, ratio * gradient, 0.0).to(weight.dtype)


def _put_back(own: Mapping[str, Tensor], values: Weights) -> None:
    """Write values where they came from, in place."""
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
