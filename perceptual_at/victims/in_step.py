"""Models sharded over several processes: every process makes a pass whenever one of them does.

The passes of a sharded model are collective: each fetches weights from all processes, and waits until all have come.
Attacks that let decided samples go make as many passes as their samples need, so processes with different samples
would wait for each other for ever. In step, a process says before each pass what it wants; one that wants something
else, or has done, makes a pass on stand-ins meanwhile.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees

from perceptual_at._rounding import HOST
from perceptual_at.victims.finding import is_sharded, modules_of

_NOTHING, _FORWARD, _GRADIENT = 0, 1, 2
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DIMENSIONS = 16


class InStep(nn.Module):
    """A sharded model that is asked by all of its processes, each in its own time.

    One wait for the device and one small exchange per pass; a gradient costs a second forward pass, because what
    others ask for may come between a forward pass and the way back.

    Args:
        model: a sharded module, or a callable that runs one.
        groups: the processes that share its weights.
    """

    def __init__(self, model: Callable[[Tensor], Any], groups: Sequence[Any]) -> None:
        super().__init__()
        self.model, self.groups = model, groups
        self.training = self.broken = False
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        """What the model gives."""
        shapes: list[Any] = []
        tensors = _Pass.apply(x, self, shapes)
        leaves, shape = shapes[0]
        given = iter(tensors)
        return trees.tree_unflatten([next(given) if leaf is None else leaf for leaf in leaves], shape)

    def __enter__(self) -> "InStep":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stay with the others until they have done too; an interrupt waits for nobody."""
        if not self.broken and (kind is None or issubclass(kind, Exception)):
            self.turn(_NOTHING, self.seen)

    def turn(self, wish: int, x: Tensor | None) -> None:
        """Make the passes that others want until all want this one."""
        self.seen = x = self.seen if x is None else x.detach()[:2].clone()
        while True:
            wanted, stand_in = self._agreed(wish, x)
            if wanted == wish:
                return
            if wanted == _GRADIENT:
                self.pulled_back(stand_in, None)
            else:
                self.outputs(stand_in)

    def outputs(self, x: Tensor) -> Any:
        """One forward pass."""
        self.broken = True  # until it has ended well: with one pass missing, nothing fits any more
        with torch.no_grad():
            outputs = self.model(x.clone())
        self.broken = False
        return outputs

    def pulled_back(self, x: Tensor, weights: Sequence[Tensor] | None) -> Tensor | None:
        """One forward pass and the gradient of its weighted outputs; None where there is none."""
        self.broken = True
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            outputs = [one for one in trees.tree_leaves(self.model(leaf.clone())) if isinstance(one, Tensor)]
            weights = [torch.ones_like(one) for one in outputs] if weights is None else weights
            pairs = [pair for pair in zip(outputs, weights, strict=True) if pair[0].requires_grad]
            grad = None
            if pairs:
                heads, weights = zip(*pairs, strict=True)
                (grad,) = torch.autograd.grad(heads, leaf, weights, allow_unused=True)
        self.broken = False
        return grad

    def _agreed(self, wish: int, x: Tensor | None) -> tuple[int, Tensor]:
        """What is done next, and an input for who stands in: of one's own, or zeros in the shape of the others'."""
        reduce, most = torch.distributed.all_reduce, torch.distributed.ReduceOp.MAX
        shape = [] if x is None else [*x.shape, _DTYPES.index(x.dtype)]
        said = torch.zeros(_DIMENSIONS + 2, dtype=torch.int64, device=HOST)
        said[0] = wish
        said[1 : 1 + len(shape)] = torch.tensor(shape, dtype=torch.int64, device=HOST)
        said[-1] = len(shape)
        said = said.to(_device(self, x))
        for group in self.groups:
            reduce(said, op=most, group=group)
        wanted, *sizes, length = said.tolist()
        if x is None or not len(x):
            *sizes, dtype = sizes[: max(length, 1)]
            x = torch.zeros([max(size, 1) for size in sizes] or [1], dtype=_DTYPES[dtype], device=said.device)
        return wanted, x


class _Pass(torch.autograd.Function):
    """A forward pass without a graph; the way back makes both passes, as one turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: InStep, shapes: list[Any]) -> tuple[Tensor, ...]:
        """The tensors among the outputs; `shapes` takes the rest."""
        model.turn(_FORWARD, x)
        ctx.model = model
        ctx.save_for_backward(x)
        leaves, shape = trees.tree_flatten(model.outputs(x))
        shapes.append(([None if isinstance(leaf, Tensor) else leaf for leaf in leaves], shape))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> Any:
        """The gradient of the input."""
        (x,) = ctx.saved_tensors
        ctx.model.turn(_GRADIENT, x)
        return ctx.model.pulled_back(x.detach(), weights), None, None


def together(model: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The model, in step with other processes if it is sharded over several."""
    if isinstance(model, InStep) or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return model
    groups = _groups(part for module in modules_of(model) for part in module.modules())
    return InStep(model, groups) if groups else model


def in_step(model: Callable[[Tensor], Any]) -> contextlib.AbstractContextManager[Callable[[Tensor], Any]]:
    """The model to call however often; at the end waits for the other processes, if it is sharded over several."""
    joined = together(model)
    return joined if isinstance(joined, InStep) and joined is not model else contextlib.nullcontext(model)


def _groups(parts: Iterator[nn.Module]) -> list[Any]:
    """The groups of processes, of more than one each, that share the weights of sharded parts."""
    found: dict[int, Any] = {}
    for part in parts:
        if not is_sharded([part]):
            continue
        group = getattr(part, "process_group", None)  # of the first version
        groups = [group] if group is not None else []
        meshes = [getattr(parameter, "device_mesh", None) for parameter in part.parameters()] if group is None else []
        groups += [group for mesh in meshes if mesh is not None for group in mesh.get_all_groups()]
        found |= {id(group): group for group in groups if torch.distributed.get_world_size(group) > 1}
    return list(found.values())


def _device(model: nn.Module, x: Tensor | None) -> torch.device:
    if x is not None:
        return x.device
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
