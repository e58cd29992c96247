"""Stepguard for JAX: supervises a training loop whose state is a value that each step replaces."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stepguard import frameworks

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
    frameworks.require("jax")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
