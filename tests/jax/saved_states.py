"""Writes a state as the engine does, without a run."""

from pathlib import Path
from typing import Any

import numpy as np

from stepguard.jax.checkpoint.restore import read_state
from stepguard.jax.checkpoint.snapshot import Donations, HostMemory, JaxSnapshot, take
from stepguard.jax.checkpoint.tree import flatten
from stepguard.options import Restoring
from stepguard.orbax_files.taken import write_part, write_process, write_tree


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


def assert_same(found: Any, expected: Any, *, is_orbax: bool = False) -> None:
    """The same values of the same kinds, types and shardings. Orbax binds each array to its devices."""
    one, other = flatten(found), flatten(expected)
    assert (one.static, one.empty) == (other.static, other.empty)
    for leaf, wanted in zip(one.leaves, other.leaves, strict=True):
        assert type(leaf.value) is type(wanted.value), leaf.name
        assert (leaf.name, leaf.key_impl) == (wanted.name, wanted.key_impl)
        for what in ("dtype", "weak_type", "sharding", *([] if is_orbax else ["committed"])):
            assert getattr(leaf.value, what, None) == getattr(wanted.value, what, None), (leaf.name, what)
        assert np.asarray(leaf.value).tobytes() == np.asarray(wanted.value).tobytes(), leaf.name
