"""One thread per process, random numbers that follow from a test's name, and names that examples need not import."""

import functools
import zlib

import pytest
import torch
from torch import nn

import perceptual_at

# Not for this process: calls that must not type-check, and tests of another device that change what torch is.
collect_ignore = ["tests/typing", "tests/second_device/contract.py"]

# Fixtures that take seconds to make: a built site, a browser, trained networks, finished runs, processes of their own.
COSTLY = {"chromium", "copied", "finished", "honest", "miniature", "pages", "runner", "runs", "site", "whole"}

# The suite runs one process per core on tiny tensors: more threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _names_in_examples(doctest_namespace):
    doctest_namespace.update({name: getattr(perceptual_at, name) for name in perceptual_at.__all__})
    doctest_namespace.update(torch=torch, nn=nn, functools=functools)


def _seed(name):
    torch.manual_seed(zlib.crc32(name.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """A fixture draws the same numbers, whoever asks for it first."""
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    """A test draws the same numbers, whatever ran before it in its process."""
    _seed(item.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Whatever needs a costly fixture is slow, because the first test to ask for it pays for it."""
    for item in items:
        if COSTLY & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
