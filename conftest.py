"""One thread per process, and names that docstring examples may use without importing them."""

import functools

import pytest
import torch
from torch import nn

import perceptual_at

# Not for this process: calls that must not type-check, and tests of another device that change what torch is.
collect_ignore = ["tests/typing", "tests/second_device/contract.py"]

# The suite runs one process per core on tiny tensors: more threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _names_in_examples(doctest_namespace):
    doctest_namespace.update({name: getattr(perceptual_at, name) for name in perceptual_at.__all__})
    doctest_namespace.update(torch=torch, nn=nn, functools=functools)
