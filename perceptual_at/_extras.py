"""Packages that the core does without: imported where they are used, with one sentence where they are missing."""

import importlib
from types import ModuleType

INSTALLED_AS = {"sklearn": "scikit-learn", "PIL": "pillow"}
"""Names on the package index, where they differ from what is imported."""


def extra(function: str, module: str, *, why: str) -> ModuleType:
    """Import a module of a package that is optional.

    Args:
        function: the name that the error speaks of.
        module: what to import, such as `"torchvision.datasets"`.
        why: what it is needed for, such as `"to read class folders"`.

    Raises:
        ImportError: if the package is not installed; names the command that installs it. An installed package that
            cannot be imported raises what its import raises.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:  # something that the package itself needs
            raise
        name = INSTALLED_AS.get(package, package)
        raise ImportError(
            f"{function}: {name} is needed {why} and is not installed; `pip install {name}` brings it."
        ) from error
