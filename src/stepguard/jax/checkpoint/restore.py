"""Restores the state of a checkpoint in the form of the program's own state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepguard.errors import CheckpointMismatchError
from stepguard.jax.checkpoint.tree import flatten, rebuild
from stepguard.options import Restoring
from stepguard.orbax_files.fitting import Fitting, fit, warn_of_names
from stepguard.orbax_files.index import StoredLeaf
from stepguard.orbax_files.leaves import Flat, Leaf
from stepguard.orbax_files.reading import Stored, open_part, open_stored, whole
from stepguard.orbax_files.runs import newest_at
from stepguard.orbax_files.taken import ENGINE
from stepguard.saving.unfound import first_weights_at
from stepguard.words import listed

# The parts that hold weights, by the names that programs give them.
_WEIGHTS = ("params", "model", "batch_stats")


def read_state(directory: Path, state: Any, options: Restoring) -> Any:
    """The state of the checkpoint in ``directory``, in the form of ``state``.

    A value comes back as the interrupted run had it: a Python number that a step has made an array is that array. Its
    sharding is that of the program's array in the same place, and each process reads only what its devices need.

    Raises:
        CheckpointMismatchError: the checkpoint does not fit. Nothing was changed.
        CheckpointCorruptError: the checkpoint cannot be read.
    """
    flat = flatten(state)
    stored = open_stored(directory, _parts(flat.leaves))
    fitting = fit(directory, flat, stored, options, jax.dtypes.canonicalize_dtype)
    values = _values(flat.leaves, stored, fitting)
    if jax.process_index() == 0:
        fitting.report(directory)
        warn_of_names(flat, stored, options)
    return rebuild(state, values)


def first_values(state: Any, options: Restoring) -> Any:
    """The state with which a run begins that has no checkpoint: with the weights of ``options.init_from``, if any.

    Raises:
        FileNotFoundError: there is no checkpoint at that path.
        CheckpointMismatchError: the weights do not fit; with ``init_fit="part"``, none of them fits.
    """
    if options.init_from is None:
        return state
    flat = flatten(state)
    parts = _parts(flat.leaves)
    if isinstance(options.init_from, Mapping):
        places = {name: Path(place) for name, place in options.init_from.items()}
    else:
        places = {name: Path(options.init_from) for name in parts if name in _WEIGHTS}
    if not places or not places.keys() <= {*parts}:
        raise CheckpointMismatchError(
            f"init_from={options.init_from!r}: expected the names of parts of the state, which are {listed(parts)}, "
            f"found {listed(places) or 'none of the usual ones'}: give a mapping from names to paths",
            missing=parts,
            unexpected=[name for name in places if name not in parts],
        )
    values = [leaf.value for leaf in flat.leaves]
    for name, place in places.items():
        own = {number: leaf for number, leaf in enumerate(flat.leaves) if leaf.keys and str(leaf.keys[0]) == name}
        for number, value in zip(own, _first_of_part(name, place, [*own.values()], options), strict=True):
            values[number] = value
    return rebuild(state, values)


def _first_of_part(name: str, place: Path, leaves: list[Leaf], options: Restoring) -> list[Any]:
    with first_weights_at(place):
        path = newest_at(place, ENGINE)
        stored = open_part(path, name)
    left = list(options.leave_out)
    if options.init_fit == "part":
        shapes = {one.name: one.shape for one in stored.leaves}
        left = [one.name for one in leaves if shapes.pop(one.name, None) != np.shape(one.value)]
        left += shapes
    if len(left) >= len(leaves) and all(one.name in left for one in leaves):
        left = list(options.leave_out)  # Nothing fits: let the error say why.
    fitting = fit(
        path, Flat(leaves, {}, {}), stored, Restoring(only=[name], leave_out=left), jax.dtypes.canonicalize_dtype
    )
    fitting.report(path)
    return _values(leaves, stored, fitting)


def _parts(leaves: Sequence[Leaf]) -> list[str]:
    return list(dict.fromkeys(str(leaf.keys[0]) for leaf in leaves if leaf.keys))


# --- values ---


def _values(leaves: Sequence[Leaf], stored: Stored, fitting: Fitting) -> list[Any]:
    return [
        leaf.value if saved is None else _value(leaf, saved, stored)
        for leaf, saved in zip(leaves, fitting.sources, strict=True)
    ]


def _value(leaf: Leaf, saved: StoredLeaf, stored: Stored) -> Any:
    if saved.dtype is None:
        return saved.plain
    if saved.kind == "numpy":
        found = stored.read(saved, whole(saved))
        return found.astype(leaf.value.dtype) if isinstance(leaf.value, np.ndarray) else found
    if saved.weak and not saved.shape:
        number = jax.device_put(stored.read(saved, ()).item())  # Only a Python number makes a weak type.
        if number.dtype == saved.dtype:
            return _placed(leaf, number)
    if not isinstance(leaf.value, jax.Array):
        return jax.device_put(stored.read(saved, whole(saved)))
    dtype = leaf.value.dtype
    if not _is_bound(leaf.value):
        return jax.device_put(stored.read(saved, whole(saved)).astype(dtype, copy=False))

    def shard(index: tuple[slice, ...]) -> Any:
        bounds = tuple(one.indices(size)[:2] for one, size in zip(index, saved.shape, strict=True))
        return stored.read(saved, bounds).astype(dtype, copy=False)

    return jax.make_array_from_callback(saved.shape, leaf.value.sharding, shard)


def _placed(leaf: Leaf, value: Any) -> Any:
    return jax.device_put(value, leaf.value.sharding) if _is_bound(leaf.value) else value


def _is_bound(value: Any) -> bool:
    """Whether an array belongs to its devices. One that does not may be used with arrays on others."""
    return isinstance(value, jax.Array) and (value.committed or len(value.sharding.device_set) > 1)
