"""A device that is not the CPU, for machines without one: see `stand_in.cpp`.

`load()` compiles it once per version of torch and makes `torch.device("stand_in")` usable in this process. It changes
what torch takes for the accelerator, so tests run with it in a process of their own: `tests/test_second_device.py`.

`PERCEPTUAL_AT_DEVICE=cuda` runs the same tests on a real one; what only the stand-in can do is skipped there.
"""

import contextlib
import os
import shutil
import sysconfig
import tempfile
import types
from pathlib import Path

import pytest
import torch

NAME = "stand_in"
CHOSEN = os.environ.get("PERCEPTUAL_AT_DEVICE", NAME)
"""The device to test on."""


def missing():
    """What a machine lacks to compile it, or None."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler"
    if shutil.which("ninja", path=_search_path()) is None:
        return "no ninja"
    return None


def load():
    """Compile the device where that is still to be done, and register it; nothing for a real one."""
    if CHOSEN != NAME:
        return
    from torch.utils import cpp_extension

    folder = Path(tempfile.gettempdir()) / f"perceptual_at_stand_in_{torch.__version__}_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    os.environ["PATH"] = _search_path()
    cpp_extension.load(
        NAME, [str(Path(__file__).with_name("stand_in.cpp"))], extra_cflags=["-O0", "-g0"], with_cuda=False,
        build_directory=str(folder), is_python_module=False,
    )  # fmt: skip
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.Tensor.__deepcopy__ = _copied(torch.Tensor.__deepcopy__)


@contextlib.contextmanager
def mode(what):
    """Within the block: `"no reads"`, `"no float64"` or `"no generator"`."""
    if CHOSEN != NAME:
        pytest.skip(f"{CHOSEN} cannot be made a device with {what}")
    set_mode, within, after = {
        "no reads": (torch.ops.stand_in.refuse_reads, True, False),
        "no float64": (torch.ops.stand_in.with_float64, False, True),
        "no generator": (torch.ops.stand_in.with_generator, False, True),
    }[what]
    set_mode(within)
    try:
        yield
    finally:
        set_mode(after)


def reads():
    """Values that were brought to the host so far."""
    if CHOSEN != NAME:
        pytest.skip(f"{CHOSEN} does not count reads")
    return torch.ops.stand_in.reads()


def _copied(usual):
    """Deep copies that know the device, for which torch makes no storages by itself."""

    def copied(self, memo):
        if self.device.type != NAME or id(self) in memo:
            return usual(self, memo)
        memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        return memo[id(self)]

    return copied


def _search_path():
    """Where programs are looked for, those of this environment too."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def _module():
    """What torch asks of `torch.stand_in`."""
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.synchronize = lambda device=None: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module
