"""Twins: copies of models that give the same logits and input gradients for less."""

import collections
import copy
import operator
import re
import threading
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm

from perceptual_at._rounding import without_autocast
from perceptual_at.victims.finding import bare
from perceptual_at.victims.lanes import Lane
from perceptual_at.victims.rewriting import late_layers, write_in_place

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDABLE = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED}
_SAME = 1e-3  # of the largest logit: how far a graph may be from its model, in the model's own dtype


class FastModel(nn.Module):
    """What `frozen(model, lane=...)` gives: called, it runs the model's twin.

    Args:
        exact: the model itself, ready to be called.
        lane: how to run it.
        function: the name that errors speak of.
    """

    def __init__(self, exact: nn.Module, lane: Lane, function: str) -> None:
        super().__init__()
        self.exact, self.lane, self.function = exact, lane, function
        self.training = False
        self._twin: _Twin | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the twin, in the dtype of the lane."""
        if self._twin is None:
            try:
                self._twin = _twin(bare(self.exact), self.lane, x)
            except _NoCopy as error:
                raise ValueError(
                    f"{self.function}: `lane` needs a copy of the model, but it cannot be copied ({error}); attack it "
                    "without a lane."
                ) from error.__cause__
        try:
            return self._twin(x)
        except RuntimeError as error:
            if self.lane.dtype is None or not re.search(r"\b(d?type|not implemented for)\b", str(error)):
                raise
            raise ValueError(
                f"{self.function}: the model cannot run in {self.lane}: {error}. Take a lane without `dtype`."
            ) from error

    def release(self) -> None:
        """Give the twin back; the next call takes one anew."""
        twin, self._twin = self._twin, None
        if twin is not None:
            _free(bare(self.exact), twin)

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the lane could not be had or had no object, and why; empty before the first call."""
        return () if self._twin is None else (*self._twin.notes, *self._twin.remarks)


class _NoCopy(Exception):
    """A model that cannot be copied, and why."""


class _Fold(NamedTuple):
    """A layer and the batch norm behind it, by their names."""

    layer: str
    norm: str


class _Twin:
    """The copy of a model. It does not hold the model, which may go when nobody else needs it."""

    def __init__(self, model: nn.Module, lane: Lane, x: Tensor) -> None:
        self.lane, self.signature = lane, _signature(model)
        self.notes: list[str] = []  # what is missing, with a warning
        self.remarks: list[str] = []  # what there was no need for
        self.folds: list[_Fold] = []
        self.constants: set[str] = set()
        self.late: list[str] = []
        self.module = self._copy(model, x)
        if lane.fold and not self.folds and not self.notes:
            norms = any(isinstance(part, _BatchNorm) for part in model.modules())
            why = (
                "none of its batch norms follows a layer that could take it" if norms else "the model has no batch norm"
            )
            self.remarks.append(f"nothing is folded: {why}")
        self.sharp = not isinstance(self.module, fx.GraphModule)  # a graph has its casts inside
        if lane.dtype is not None:
            _cast(self.module, lane.dtype)
        if lane.channels_last:
            for tensor in (*self.module.parameters(), *self.module.buffers()):
                if tensor.ndim == 4:  # `Module.to` fails on those of three-dimensional convolutions
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
            for name in self.late:
                layer: Any = self.module.get_submodule(name)
                layer.weight.data = layer.weight.data.contiguous()
        self.call: Callable[[Tensor], Tensor] = self.module
        if lane.compile:
            self.call = torch.compile(self.module, mode="reduce-overhead" if lane.cuda_graphs else None)
        elif lane.cuda_graphs and x.is_cuda:
            self.call = _Graphed(self.module, x)
        if lane.cuda_graphs and not x.is_cuda:
            self.notes.append(f"no CUDA graphs, because the inputs are on {x.device.type!r}")

    def __call__(self, x: Tensor) -> Tensor:
        """Logits."""
        if self.lane.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.lane.dtype is None:
            return self.call(x)
        with without_autocast(x):
            return self.call(x.to(self.lane.dtype) if self.sharp else x)

    def renew(self, model: nn.Module) -> None:
        """Take the present weights of the model."""
        targets = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        for layer, norm in self.folds:
            weight, bias = (targets.pop(f"{layer}.{name}") for name in ("weight", "bias"))
            _write_folded(weight, bias, model.get_submodule(layer), model.get_submodule(norm))
        for name, target in targets.items():
            if name not in self.constants:
                target.copy_(operator.attrgetter(name)(model))

    def _copy(self, model: nn.Module, x: Tensor) -> nn.Module:
        """The model in eval mode, as a graph with its batch norms folded where that can be done."""
        twin = _plain_copy(model)
        foldable = self.lane.fold and any(isinstance(part, _BatchNorm) for part in model.modules())
        if not foldable and self.lane.dtype is None:
            return twin
        whole, x = x.detach(), x[:8].detach()
        x = x if len(x) > 1 else torch.cat([x, x])  # which tells samples from what is the same for all
        with without_autocast(x):
            try:
                expected = twin(x)
            except Exception:  # the model's own, which may take whole batches only
                x, expected = whole, twin(whole)
        try:
            graph = _traced(twin)
            self.constants = {str(node.target) for node in graph.graph.nodes if _is_constant(node, model)}
            self.folds = _fold(graph) if foldable else []
            _compare(graph, x, expected)
            write_in_place(graph)
            if self.lane.channels_last and x.device.type == "cpu" and (self.lane.dtype or x.dtype) == torch.float32:
                self.late = late_layers(graph)
            _compare(graph, x, expected)
        except Exception as error:  # whatever the model's own code raises while it is traced
            self.folds, self.constants, self.late = [], set(), []
            if foldable:
                self.notes.append(f"batch norm is not folded, because the model cannot be traced: {_reason(error)}")
            return _plain_copy(model)
        return graph


class _Graphed:
    """Forward and input gradient as CUDA graphs, for inputs of one shape; others run as usual."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.shape = module, x.shape
        self.graph: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape != self.shape or not (x.requires_grad and torch.is_grad_enabled()):
            output: Tensor = self.module(x)
            return output
        if self.graph is None:  # of the function: a module's own `forward` would be replaced
            sample = torch.zeros_like(x).requires_grad_()
            self.graph = torch.cuda.make_graphed_callables(self.module.forward, (sample,))
        graphed: Tensor = self.graph(x)
        return graphed


_LOCK = threading.RLock()
_TWINS: WeakKeyDictionary[nn.Module, dict[Lane, list[_Twin]]] = WeakKeyDictionary()
"""Twins that nobody uses at the moment; a borrower takes one away, so that no two ever share one."""


def _twin(model: nn.Module, lane: Lane, x: Tensor) -> _Twin:
    """A twin of a model with its present weights, made where none is free."""
    # Whoever asks first, its weights are ordinary tensors and the random state stays as it was.
    with torch.inference_mode(False), torch.no_grad():
        signature = _signature(model)
        with _LOCK:
            free = _TWINS.setdefault(model, {}).setdefault(lane, [])
            free[:] = [twin for twin in free if twin.signature == signature]
            twin = free.pop() if free else None
        if twin is None:
            # Tracing replaces methods of torch's modules for a moment, so one thread at a time makes twins.
            with _LOCK, torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                twin = _Twin(model, lane, x)
            for note in twin.notes:
                warnings.warn(f"Lane: {note}.", stacklevel=4)
        twin.renew(model)
    return twin


def _free(model: nn.Module, twin: _Twin) -> None:
    """Let others have the twin."""
    with _LOCK:
        _TWINS.setdefault(model, {}).setdefault(twin.lane, []).append(twin)


def _signature(model: nn.Module) -> tuple[Any, ...]:
    """What a twin depends on beside the values of the weights: all that can be seen to change what a part computes."""
    parts = [
        (id(part), type(part), *(_seen(name, value) for name, value in vars(part).items() if name not in _OTHERWISE))
        for part in model.modules()
    ]
    kinds = [
        (kind, *(_seen(name, value) for name, value in vars(kind).items() if not name.startswith("__")))
        for kind in {base for part in model.modules() for base in type(part).__mro__ if _is_users(base)}
    ]
    tensors = (*model.named_parameters(), *model.named_buffers())
    return (*parts, *kinds, *((name, value.shape, value.dtype, value.device) for name, value in tensors))


_OTHERWISE = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def _seen(name: str, value: Any, depth: int = 4) -> Any:
    """Something that differs when a setting does: its value, or for what has none which object it is."""
    if isinstance(value, _PLAIN):
        return name, repr(value)
    if isinstance(value, Tensor):
        return name, id(value), value._version
    if isinstance(value, nn.Module) or depth == 0 or isinstance(value, type | types.FunctionType | types.ModuleType):
        return name, id(value)
    if isinstance(value, Mapping):  # hooks too: by their number, and the function
        return name, *(_seen(repr(key), one, depth - 1) for key, one in list(value.items()))
    if isinstance(value, list | tuple):
        return name, *(_seen("", one, depth - 1) for one in value)
    if isinstance(value, set | frozenset):
        return name, *sorted(repr(_seen("", one, depth - 1)) for one in value)
    if isinstance(value, types.MethodType):
        return name, id(value.__func__), id(value.__self__)
    return name, id(value), *(_seen(key, one, depth - 1) for key, one in list(getattr(value, "__dict__", {}).items()))


def _is_users(kind: type) -> bool:
    """Whether a class is no part of torch, whose classes nobody changes."""
    return kind is not object and not kind.__module__.startswith("torch.")


def _plain_copy(model: nn.Module) -> nn.Module:
    """The model once more, in eval mode."""
    held = (value for part in model.modules() for value in (*vars(part).values(), *part._buffers.values()))
    # What a pass or a switch to eval mode has left there has a history, which torch refuses to copy and a twin has no
    # use for.
    plain = {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}
    try:
        twin = copy.deepcopy(model, plain).eval().requires_grad_(False)
    except Exception as error:  # code of the user's own
        raise _NoCopy(_reason(error)) from error
    if "_original_forward" in vars(twin):  # Accelerate put autocast around it; a lane has a dtype of its own
        vars(twin).pop("forward", None)
    return twin


def _traced(model: nn.Module) -> fx.GraphModule:
    """The model as a graph of layers."""
    for name, part in model.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            raise ValueError(f"layer {name!r} has forward hooks")
    return fx.GraphModule(model, _Tracer().trace(model), type(model).__name__)


class _Tracer(fx.Tracer):
    """Records what its own thread calls: while it works, the modules of all other threads come by here too."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a module."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A module's attribute."""
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _is_constant(node: fx.Node, model: nn.Module) -> bool:
    """Whether a graph took up a tensor that the model made while it was traced, and does not hold."""
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    return not hasattr(model.get_submodule(owner), name)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


def _fold(graph: fx.GraphModule) -> list[_Fold]:
    """Take out every batch norm that directly follows a layer which nothing else follows; gives the pairs."""
    calls = collections.Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    folds = []
    for node in list(graph.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        layer: Any = graph.get_submodule(str(before.target))
        norm: Any = graph.get_submodule(str(node.target))
        if type(layer) not in _FOLDABLE or not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        if isinstance(layer, _TRANSPOSED) and layer.groups > 1:  # its weight does not count the outputs one by one
            continue
        if calls[before.target] > 1 or calls[node.target] > 1:  # shared layers would need two sets of weights
            continue
        bias = nn.Parameter(torch.zeros_like(norm.running_mean), requires_grad=False)
        _write_folded(layer.weight, bias, layer, norm)
        layer.bias = bias
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
        folds.append(_Fold(str(before.target), str(node.target)))
    graph.delete_all_unused_submodules()
    graph.recompile()
    return folds


def _write_folded(weight: Tensor, bias: Tensor, layer: Any, norm: Any) -> None:
    """Write the weight and bias of a layer that does what layer and batch norm do."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    offset = (0.0 if layer.bias is None else layer.bias) - norm.running_mean
    bias.copy_(scale * offset if norm.bias is None else torch.addcmul(norm.bias, scale, offset))
    outputs = 1 if isinstance(layer, _TRANSPOSED) else 0  # the dimension of the weight that counts them
    torch.mul(layer.weight, scale.reshape([-1 if d == outputs else 1 for d in range(weight.ndim)]), out=weight)


def _compare(graph: fx.GraphModule, x: Tensor, expected: Tensor) -> None:
    """Require that the graph gives the model's logits: tracing records one of the ways through the model's code."""
    with without_autocast(x):
        got = ShapeProp(graph).propagate(x)
    if not torch.allclose(got, expected, rtol=0.0, atol=_SAME * float(expected.abs().amax())):
        raise ValueError("its graph gives other logits")


def _cast(twin: nn.Module, dtype: torch.dtype) -> None:
    """Weights in another dtype, but not those of batch norms; in a graph, inputs are cast where they meet the first.

    What a graph does before that, such as the normalisation of images, stays as precise as it was.
    """
    early: set[str] = set()
    if isinstance(twin, fx.GraphModule):
        early = _cast_inputs(twin, dtype)
    for name, part in twin.named_modules():
        if isinstance(part, _BatchNorm):
            continue
        for tensors in (part._parameters, part._buffers):
            for key, value in tensors.items():
                if value is not None and value.is_floating_point() and f"{name}.{key}".lstrip(".") not in early:
                    value.data = value.data.to(dtype)


def _cast_inputs(twin: fx.GraphModule, dtype: torch.dtype) -> set[str]:
    """Insert the casts; gives the names of the buffers that are used before."""
    parameters = dict(twin.named_parameters())
    late: set[fx.Node] = set()
    constants = [node for node in twin.graph.nodes if node.op == "get_attr"]
    for node in list(twin.graph.nodes):
        weighted = any(source.target in parameters for source in node.all_input_nodes if source.op == "get_attr")
        if node.op == "call_module":
            layer = twin.get_submodule(str(node.target))
            weighted = not isinstance(layer, _BatchNorm) and any(True for _ in layer.parameters())
        if not weighted and late.isdisjoint(node.all_input_nodes):
            continue
        late.add(node)
        for source in node.all_input_nodes:
            if source not in late and source not in constants and "tensor_meta" in source.meta:
                with twin.graph.inserting_before(node):
                    late.add(cast := twin.graph.call_method("to", (source, dtype)))
                node.replace_input_with(source, cast)
    twin.recompile()
    return {str(node.target) for node in constants if late.isdisjoint(node.users)}
