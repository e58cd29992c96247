"""The frameworks of the engines: the lowest version of each, and what an import says where it is missing or older."""

from __future__ import annotations

import importlib
import re

LOWEST = {"tensorflow": ("TensorFlow", 2, 16), "torch": ("PyTorch", 2, 8), "jax": ("JAX", 0, 10)}
"""The name and the lowest version of each framework, by its package."""


def require(package: str) -> None:
    """Import the framework ``package``, before what needs names that only newer versions of it have.

    Raises:
        ModuleNotFoundError: it is not installed.
        ImportError: it is older than the lowest version.
    """
    name, *lowest = LOWEST[package]
    needs = f"stepguard.{package} needs {name} {'.'.join(map(str, lowest))} or newer"
    install = f"'stepguard[{package}]'"
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(f"{needs}, found none: pip install {install}", name=package) from None
    version = str(getattr(module, "__version__", ""))
    # A version without numbers is one of the user's own making, and no reason to refuse it.
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and [int(one) for one in found.groups()] < lowest:
        raise ImportError(f"{needs}, found {version}: pip install --upgrade {install}", name=package)
