"""Networks that return more than logits, as networks that return logits."""

from collections.abc import Mapping
from typing import Any

import torch.fx
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at.models._parts import in_mode_of


class LogitsOf(nn.Module):
    """A network and the place of the logits among what it returns; made by `logits_of`.

    The network is its layer `model`. Weights that were saved from the network itself load as they are.
    """

    def __init__(
        self, model: nn.Module, output: str | int, input_name: str | None, fixed_inputs: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.model, self.output, self.input_name = model, output, input_name
        self.fixed = {name: value for name, value in fixed_inputs.items() if not isinstance(value, Tensor)}
        self.names = tuple(name for name, value in fixed_inputs.items() if isinstance(value, Tensor))
        for name in self.names:  # buffers move with the model; they are no weights to save
            self.register_buffer(f"fixed_{name}", fixed_inputs[name], persistent=False)
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]  # torch's own

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        others = {**self.fixed, **{name: getattr(self, f"fixed_{name}") for name in self.names}}
        if self.input_name is None:
            return _pick(self.model(x, **others), self.output)
        return _pick(self.model(**{self.input_name: x}, **others), self.output)

    def extra_repr(self) -> str:
        """Show where the logits are when the model is printed."""
        return f"output={self.output!r}"


def logits_of(
    model: nn.Module,
    output: str | int,
    *,
    input_name: str | None = None,
    fixed_inputs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network that returns logits alone, made of one that returns them among other things.

    It is a module around the given one, not a copy: modes, weights and devices are shared, so that attacks and
    objectives can switch its mode and freeze it, which a `lambda` would hide from them. Where the model returns
    a tensor, that is taken as it is: GoogLeNet and Inception return named tuples in train mode only.

    Args:
        model: a network that returns a dict, a tuple or list, or an object with attributes, such as a `ModelOutput`
            of Transformers or the named tuples of torchvision.
        output: the key or attribute of the logits, or their index in a tuple; `"logits"` for classifiers of
            Transformers, `"out"` for torchvision's segmentation networks.
        input_name: the keyword that takes the images, e.g. `"pixel_values"`; None gives them as the first argument.
        fixed_inputs: what else the model is called with, by keyword, the same for every batch, e.g. the tokens of the
            class names for a pair of image and text encoder. Tensors move with the model.

    Returns:
        A module from inputs to logits, in the mode the model is in; the model is its layer `model`. Weights of the
        model itself load into it.

    Raises:
        TypeError: if `model` is no module, `output` neither a word nor an index, or `fixed_inputs` no dict by keyword;
            at the call, if what `output` names is no floating-point tensor.
        ValueError: if `fixed_inputs` gives what `input_name` takes; at the call, if the model's output has nothing
            under that name or index.

    Examples:
        >>> class Pair(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head = nn.Linear(2, 3)
        ...
        ...     def forward(self, x):
        ...         return {"features": x, "logits": self.head(x)}
        >>> model = logits_of(Pair(), "logits")
        >>> model(torch.rand(4, 2)).shape
        torch.Size([4, 3])
        >>> model.eval().model.training
        False
    """
    _check.module("logits_of", model)
    if isinstance(output, bool) or not isinstance(output, str | int):
        raise TypeError(
            f"logits_of: `output` must be the name or the index of the logits, got {type(output).__name__} {output!r}."
        )
    if input_name is not None and not isinstance(input_name, str):
        raise TypeError(f"logits_of: `input_name` must be a word or None, got {type(input_name).__name__}.")
    if fixed_inputs is not None and not isinstance(fixed_inputs, Mapping):
        raise TypeError(f"logits_of: `fixed_inputs` must be a dict by keyword, got {type(fixed_inputs).__name__}.")
    for name in fixed_inputs or {}:
        if not isinstance(name, str) or not name.isidentifier():
            raise TypeError(f"logits_of: `fixed_inputs` must be a dict by keyword, got the key {name!r}.")
        if name == input_name:
            raise ValueError(f"logits_of: `fixed_inputs` gives {name!r}, which `input_name` says the images go to.")
    return in_mode_of(model, LogitsOf(model, output, input_name, fixed_inputs or {}))


@torch.fx.wrap  # one node of a traced graph: while tracing, nobody knows what the output is
def _pick(given: Any, output: str | int) -> Tensor:
    """The logits among what a model returned."""
    found = _find(given, output)
    if isinstance(found, torch.fx.Proxy):
        return found  # type: ignore[return-value]  # stands for the tensor in a trace
    if not isinstance(found, Tensor) or not found.is_floating_point():
        got = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"logits_of: `output` {output!r} of the model must be a floating-point tensor, got {got}.")
    return found


def _find(given: Any, output: str | int) -> Any:
    if isinstance(given, Tensor):
        return given
    if isinstance(given, Mapping) and output in given:
        return given[output]
    if isinstance(output, str) and hasattr(given, output):
        return getattr(given, output)
    in_order = tuple(given.values()) if isinstance(given, Mapping) else given
    if isinstance(output, int) and isinstance(in_order, tuple | list) and -len(in_order) <= output < len(in_order):
        return in_order[output]
    raise ValueError(f"logits_of: the model's output has no {output!r}; it is {_described(given)}.")


def _described(given: Any) -> str:
    if isinstance(given, Mapping):
        return f"a {type(given).__name__} with the keys {', '.join(map(repr, given)) or 'none'}"
    if isinstance(given, tuple | list):
        names = getattr(given, "_fields", None)
        return f"a {type(given).__name__} of {len(given)}" + (f", {', '.join(names)}" if names else "")
    names = tuple(name for name in getattr(given, "__dict__", {}) if not name.startswith("_"))
    return f"a {type(given).__name__}" + (f" with the attributes {', '.join(names)}" if names else "")


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let weights of the network itself load: `fc.weight` as `model.fc.weight`."""
    own = f"{prefix}model."
    expected = {own + name for name in module.get_submodule("model").state_dict()}
    names = [name for name in state if name.startswith(prefix)]
    if expected.isdisjoint(names):
        for name in names:
            state[own + name.removeprefix(prefix)] = state.pop(name)
