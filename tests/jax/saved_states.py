"""Writes a state as the engine does, without a run."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepguard.jax.checkpoint.files import write_part, write_process, write_tree
from stepguard.jax.checkpoint.restore import read_state
from stepguard.jax.checkpoint.snapshot import Donations, HostMemory, JaxSnapshot, take
from stepguard.jax.checkpoint.tree import flatten
from stepguard.options import Restoring


def snapshot(state: Any, process: Any = None) -> JaxSnapshot:
    taken = take(state, 3, process or {}, Donations(), HostMemory())
    taken.finish()
    return taken


def save(state: Any, directory: Path, process: Any = None) -> Path:
    directory.mkdir()
    taken = snapshot(state, process)
    write_part(directory, 0, taken)
    write_tree(directory, taken, 1)
    write_process(directory, 0, taken.process)
    return directory


def restore(directory: Path, state: Any, **options: Any) -> Any:
    return read_state(directory, state, Restoring(**options))


def assert_same(found: Any, expected: Any) -> None:
    """The same values of the same kinds, types and shardings."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(flatten(found).leaves, flatten(expected).leaves, strict=True):
        assert type(one.value) is type(other.value), one.name
        assert (one.name, one.key_impl) == (other.name, other.key_impl)
        for what in ("dtype", "weak_type", "sharding", "committed"):
            assert getattr(one.value, what, None) == getattr(other.value, what, None), (one.name, what)
        assert np.asarray(one.value).tobytes() == np.asarray(other.value).tobytes(), one.name
