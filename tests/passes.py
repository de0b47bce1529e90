"""Counts what a step costs, exactly and on any machine: passes of a network, and reads on the host.

Times depend on the machine; the operations that a step asks for do not.
"""

import collections
import contextlib
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Cost(NamedTuple):
    """Passes of a batch: 1.5 forwards are one of the whole batch and one of half of it."""

    forwards: float
    input_gradients: float
    parameter_gradients: float
    reads: int
    """Values read on the host; on a device each would wait for it."""


class CountPasses(TorchDispatchMode):
    """Counts the images that go through a convolutional network, by what is computed of them.

    A forward and an input gradient are seen at the first convolution, the only one that reads `channels` channels.
    Parameter gradients are seen at every convolution and batch norm; the one that computes them most often counts,
    so that a single parameter which should have been frozen is not missed.
    """

    def __init__(self, channels=3):
        super().__init__()
        self.channels = channels
        self.forwards = self.input_gradients = 0
        self.by_parameter = collections.Counter()

    @property
    def parameter_gradients(self):
        return max(self.by_parameter.values(), default=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("convolution", "conv2d") and args[1].shape[1] == self.channels:
            self.forwards += args[0].shape[0]
        elif name in ("convolution_backward", "native_batch_norm_backward"):
            of_input, *of_parameters = args[-1]
            weight = args[2]
            if of_input and name == "convolution_backward" and weight.shape[1] == self.channels:
                self.input_gradients += args[0].shape[0]
            if any(of_parameters):
                self.by_parameter[name, weight.data_ptr()] += args[0].shape[0]
        return func(*args, **(kwargs or {}))


class CountReads(TorchDispatchMode):
    """Counts the operations that bring values to the host, and on a device would wait for it."""

    WAITING = (
        "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique", "_unique2", "unique_dim",
        "unique_consecutive", "bincount", "_assert_async",
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.WAITING or by_mask:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


class CountCopies(TorchFunctionMode):
    """Counts copies to the host that the CPU makes without an operation of its own."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("tolist", "numpy", "cpu"):
            self.reads.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_reads():
    """A list that grows with every value read on the host."""
    reads = []
    with CountReads() as values, CountCopies() as copies:
        yield reads
    reads += values.reads + copies.reads


def cost(step, *, batch, channels=3):
    """What a call of `step` costs, with the passes in units of `batch` images."""
    with host_reads() as reads, CountPasses(channels) as passes:
        step()
    images = passes.forwards, passes.input_gradients, passes.parameter_gradients
    return Cost(*(number / batch for number in images), len(reads))
