"""Reading what a network computes on the way, by the names of its layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.fx.proxy import TraceError

from perceptual_at import _check
from perceptual_at._extras import extra


def tap(model: nn.Module, layers: Sequence[str] | Mapping[str, str]) -> nn.Module:
    """A network that returns the outputs of named layers, computed with the model's own weights.

    Built by torchvision's feature extraction; the model is not changed and its parameters are shared, so
    training either trains both. What lies behind the last named layer is not computed, and its weights are left
    out: to run the result with other weights, give those named in its `state_dict()`.

    Args:
        model: a network that torch.fx can trace, such as all of `perceptual_at.models`. Unwrap models in
            DistributedDataParallel or torch.compile first, and compile what this returns instead.
        layers: names of layers, as in `model.named_modules()` (a stage such as `"layer3"` means its last
            output), or a mapping from such names to the names wanted for them.

    Returns:
        A module that maps images `(B, C, H, W)` to a dict of tensors `(B, ...)`, in the order they are
        computed. It starts in the mode the model is in; switching the mode of either switches the shared
        layers.

    Raises:
        ImportError: if torchvision is not installed.
        TypeError: if `model` is no module or `layers` holds no names.
        ValueError: if a layer is unknown or the model cannot be traced.

    Examples:
        >>> import torch
        >>> from perceptual_at.models import DigitsCNN
        >>> outputs = tap(DigitsCNN(width=4), ["layer2", "pool"])(torch.rand(2, 1, 8, 8))
        >>> {name: tuple(value.shape) for name, value in outputs.items()}
        {'layer2': (2, 8, 4, 4), 'pool': (2, 8)}
    """
    _check.module("tap", model)
    _check_names("tap", "layers", layers, "layer3")
    names = dict(layers) if isinstance(layers, Mapping) else {name: name for name in layers}
    known = {name for name, _ in model.named_modules() if name}
    unknown = [name for name in names if name not in known]
    if unknown:
        children = ", ".join(repr(name) for name, _ in model.named_children())
        raise ValueError(
            f"tap: `layers` names {unknown[0]!r}, which the model does not have. Its outermost layers are "
            f"{children}; `model.named_modules()` lists all."
        )
    return _tapped("tap", model, names)


def _check_names(function: str, name: str, value: Any, example: str) -> None:
    """Require at least one name, and not a single one by itself."""
    if not isinstance(value, Sequence | Mapping) or isinstance(value, str) or not value:
        hint = value if isinstance(value, str) and value else example
        raise TypeError(f"{function}: `{name}` must hold at least one name, as in `[{hint!r}]`, got {value!r}.")
    _check.text(function, **{f"{name}[{place}]": one for place, one in enumerate(value)})


def _tapped(function: str, model: nn.Module, names: dict[str, str]) -> nn.Module:
    """The network that returns the outputs of layers it has, under their names."""
    extraction = extra(function, "torchvision.models.feature_extraction", why="to read inner layers")
    modes = {module: module.training for module in model.modules()}
    try:
        tapped = cast("nn.Module", extraction.create_feature_extractor(model, return_nodes=names))
        tapped.train(model.training)
    except (TraceError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{function}: torch.fx cannot trace `model` ({type(model).__name__}) up to {list(names)}: {error}. "
            "Models whose forward pass branches on values, or that are wrapped in DistributedDataParallel or "
            "torch.compile, cannot be traced; give the network inside."
        ) from error
    finally:
        for module, training in modes.items():  # tracing switches modes; put back each one, frozen layers too
            module.training = training
    return tapped


def perception_taps(
    model: nn.Module, proxies: Sequence[str] = ("logits", "second_to_last", "third_to_last")
) -> nn.Module:
    """A network that returns the proxies for a model's perception compared in Table 5 of the RPAT paper.

    The paper says no more than "the embeddings from the second-to-last layer and the third-to-last layer",
    and the released code holds none but logits. Our reading counts the linear layer as the last and each
    stage as one: the second-to-last is the pooled output of the last stage, `(B, C)`, the third-to-last the
    output of the stage before it, `(B, C, H, W)`. Other layers can be had by name from `tap`.

    Args:
        model: one of `perceptual_at.models`, or one around it (such as `normalized` gives).
        proxies: which of `"logits"`, `"second_to_last"`, `"third_to_last"`.

    Returns:
        A module that maps images to a dict from proxy to tensor, as `tap`.

    Raises:
        ImportError: if torchvision is not installed.
        TypeError: if `model` is no module or `proxies` holds no names.
        ValueError: if a proxy is unknown, or the model says nothing about its layers.

    Examples:
        >>> import torch
        >>> from perceptual_at.models import DigitsCNN
        >>> outputs = perception_taps(DigitsCNN(width=4))(torch.rand(2, 1, 8, 8))
        >>> {name: tuple(value.shape) for name, value in outputs.items()}
        {'third_to_last': (2, 8, 4, 4), 'second_to_last': (2, 8), 'logits': (2, 10)}
    """
    _check.module("perception_taps", model)
    _check_names("perception_taps", "proxies", proxies, "logits")
    return _perception("perception_taps", "proxies", model, proxies)


def _perception(function: str, name: str, model: nn.Module, proxies: Sequence[str]) -> nn.Module:
    """The network that returns these proxies; errors speak of `function` and of its argument `name`."""
    for path, module in model.named_modules():
        layers: dict[str, str] | None = getattr(module, "perception_layers", None)
        if layers is None:
            continue
        unknown = [proxy for proxy in proxies if proxy not in layers]
        if unknown:
            raise ValueError(f"{function}: `{name}` must be among {', '.join(map(repr, layers))}, got {unknown[0]!r}.")
        prefix = f"{path}." if path else ""
        return _tapped(function, model, {prefix + layers[proxy]: proxy for proxy in proxies})
    raise ValueError(
        f"{function}: nothing in `model` ({type(model).__name__}) names its perception layers; choose "
        'layers by name, as in `tap(model, {"fc": "logits", "avgpool": "second_to_last"})`, or give the '
        "class a dict `perception_layers`."
    )


def perceive_at(model: nn.Module, proxy: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function that runs a model and gives its logits together with an inner perception.

    It is what `objectives.rpat(perceive=...)` and `diagnostics.perception_gap(perceive=...)` take.

    Args:
        model: one of `perceptual_at.models`, or one around it.
        proxy: `"second_to_last"`, the pooled output of the last stage, or `"third_to_last"`, the output of the stage
            before it.

    Returns:
        A function `x -> (logits, perception)` that shares the model's weights and modes.

    Raises:
        ImportError: if torchvision is not installed.
        TypeError: if `model` is no module or `proxy` no word.
        ValueError: if the proxy is unknown, or the model says nothing about its layers.

    Source:
        RPAT, Table 5.

    Examples:
        >>> import torch
        >>> from perceptual_at.models import DigitsCNN
        >>> logits, perception = perceive_at(DigitsCNN(width=4), "second_to_last")(torch.rand(2, 1, 8, 8))
        >>> logits.shape, perception.shape
        (torch.Size([2, 10]), torch.Size([2, 8]))
    """
    _check.module("perceive_at", model)
    _check.text("perceive_at", proxy=proxy)
    return _Perceive(_perception("perceive_at", "proxy", model, ("logits", proxy)), proxy)


class _Perceive:
    """Logits and a perception of a tapped network; an object, so that it can be copied and pickled."""

    def __init__(self, tapped: nn.Module, proxy: str) -> None:
        self.tapped, self.proxy = tapped, proxy

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs: dict[str, Tensor] = self.tapped(x)
        return outputs["logits"], outputs[self.proxy]
