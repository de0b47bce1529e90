"""What torch cannot differentiate in the way it is asked to, said in words that name what to change."""

import contextlib
from collections.abc import Iterator

import torch

_ONLY_BACKWARD = ("use_reentrant", "_will_engine_execute_node")
"""Of torch's errors where something in a graph can only be gone back through by `.backward()`."""
_OUT_OF_REACH = {
    "setup_context": (
        "holds a torch.autograd.Function without `setup_context`, or uses torch.utils.checkpoint with "
        "use_reentrant=True; neither can be differentiated by torch.func"
    ),
    "saved tensor hooks": "uses torch.utils.checkpoint, which torch.func cannot differentiate; switch it off here",
    "implement the jvp": "holds a torch.autograd.Function without `jvp`, for which torch has no forward mode",
    "forward AD": (
        "has a layer for which torch has no forward mode: {error} Recurrent layers on a CPU have one under "
        "`torch.backends.mkldnn.flags(enabled=False)`"
    ),
    "'workspace'": (
        "has a recurrent layer whose kernel for CPUs torch.func cannot differentiate; it can under "
        "`torch.backends.mkldnn.flags(enabled=False)`"
    ),
}
"""Of torch's errors where torch.func cannot go through a model: what the model does."""


def only_backward(error: Exception) -> bool:
    """Whether a gradient with respect to chosen tensors failed because only `.backward()` can be had."""
    return any(part in str(error) for part in _ONLY_BACKWARD)


def only_once(error: Exception) -> bool:
    """Whether a graph cannot be gone back through again: torch.compile lets the first pass write over what it kept."""
    return "donated buffers" in str(error)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """A block in which compiled models run as they were written, whose graphs last and have second derivatives."""
    with contextlib.nullcontext() if torch.compiler.is_compiling() else torch.compiler.set_stance("force_eager"):
        yield


def needs_backward(function: str, chosen: str) -> ValueError:
    """The error where it cannot be had here; `chosen` is what the gradient was to be with respect to."""
    return ValueError(
        f"{function}: `model` uses torch.utils.checkpoint with use_reentrant=True, or hooks that count gradients, "
        f"which give none with respect to {chosen} alone; pass use_reentrant=False there."
    )


@contextlib.contextmanager
def by_grad(function: str, chosen: str) -> Iterator[None]:
    """A block that takes gradients by `torch.autograd.grad`, with an error that says why it cannot."""
    try:
        yield
    except RuntimeError as error:
        if not only_backward(error):
            raise
        raise needs_backward(function, chosen) from error


@contextlib.contextmanager
def by_func(function: str, name: str) -> Iterator[None]:
    """A block that differentiates what was given under a name by torch.func, with an error that says why it cannot."""
    try:
        yield
    except RuntimeError as error:
        if (why := out_of_reach(error)) is None:
            raise
        raise NotImplementedError(f"{function}: `{name}` {why}.") from error


def out_of_reach(error: Exception) -> str | None:
    """What a model does that torch.func cannot go through, if that is what an error says."""
    texts = (text for part, text in _OUT_OF_REACH.items() if part in str(error))
    return next(texts, "").format(error=str(error).partition("\n")[0]) or None
