"""Submodules as attributes of their package, loaded on first use."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
from types import ModuleType


def on_first_use(package: str, path: Iterable[str]) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """What a package calls `__getattr__` and `__dir__`, so that its submodules need no import of their own."""
    names = frozenset(found.name for found in pkgutil.iter_modules(path) if not found.name.startswith("_"))

    def submodule(name: str) -> ModuleType:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return submodule, listed
