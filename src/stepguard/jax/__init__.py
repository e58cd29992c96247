"""Stepguard for JAX: supervises a training loop whose state is a value that each step replaces."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepguard.jax.data.arrays import batches
    from stepguard.jax.session import Session
    from stepguard.jax.supervisor import Supervisor

__all__ = ["Session", "Supervisor", "batches"]

_HOMES = {
    "Session": "stepguard.jax.session",
    "Supervisor": "stepguard.jax.supervisor",
    "batches": "stepguard.jax.data.arrays",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: the commands read checkpoints without JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "jax":
            raise
        raise ModuleNotFoundError("stepguard.jax needs JAX: pip install 'stepguard[jax]'", name="jax") from error
    globals()[name] = value
    return value
