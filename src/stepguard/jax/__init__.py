"""Stepguard for JAX: supervises a training loop whose state is a value that each step replaces."""

from __future__ import annotations

try:
    import jax as _jax  # noqa: F401 - checked first, for a sentence that says what to install
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    raise ModuleNotFoundError("stepguard.jax needs JAX: pip install 'stepguard[jax]'", name="jax") from error

from stepguard.jax.data.arrays import batches
from stepguard.jax.session import Session
from stepguard.jax.supervisor import Supervisor
from stepguard.steps.values import Values

__all__ = ["Session", "Supervisor", "Values", "batches"]
