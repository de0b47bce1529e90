"""Attention that can be differentiated as often as one likes."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class _Watched(TorchFunctionMode):
    """Changes nothing. While one is active, torch's attention modules leave their fast path alone, in this thread."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def attention_in_parts() -> Iterator[None]:
    """Attention as plain matrix products, in train and in eval mode, with gradients recorded or not.

    Its fused kernels have no forward mode and no second derivatives, and nor has the fast path that
    `nn.MultiheadAttention` and `nn.TransformerEncoder` take in eval mode, which hides their layers from hooks too.
    """
    with sdpa_kernel(SDPBackend.MATH), _Watched():
        yield
