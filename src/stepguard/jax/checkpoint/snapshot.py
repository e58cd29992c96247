"""Takes the state of one step out of a JAX program.

JAX's arrays never change, so a reference is a snapshot, unless the next step donates the array: XLA then reuses its
memory. On the CPU a NumPy view of the array is the reference that JAX itself respects: while the view lives, a step
that would donate the array gets other memory. New memory is slow, because the system clears it, so an array that the
program is known to donate is copied into memory that earlier snapshots have used. :class:`Donations` finds out which
ones they are, by looking at the arrays of two neighbouring steps.

On an accelerator an array that may be donated is copied on the device, which puts the copy before the next step there.
The host waits for neither; the way from the device to the host ends on the writer thread.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepguard.errors import CheckpointError
from stepguard.jax.checkpoint.tree import flatten
from stepguard.orbax_files.index import Bounds, StoredLeaf
from stepguard.orbax_files.leaves import Leaf
from stepguard.orbax_files.taken import Part, Taken
from stepguard.steps.gate import Moment


@dataclass(slots=True)
class JaxSnapshot(Taken):
    """The state of one step."""

    step: int
    process: Mapping[str, Any]
    nbytes: int
    # How far the processes were; None without others.
    moment: Moment | None
    # Frees the memory of the copies, for the next snapshot, when the snapshot is no longer referenced.
    lease: object = None
    written: str | None = None

    def finish(self) -> None:
        """Wait until all parts are in host memory. Off the training."""
        for part in self.parts:
            if isinstance(part.data, jax.Array):
                try:
                    part.data = np.ascontiguousarray(np.asarray(part.data))
                except RuntimeError as error:
                    name = self.leaves[part.leaf_index].name
                    raise CheckpointError(f"{name}: was donated before it was copied to the host: {error}") from error

    def non_finite(self) -> list[str]:
        """The names of the leaves with NaN or infinity, and of plain numbers that are NaN."""
        self.finish()
        return self.not_finite()


class Donations:
    """The leaves that the program donates to its steps, by name. For the thread of the step, at its end.

    Two looks at two neighbouring boundaries find them: the arrays of the first were given to the step between them.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.is_known = False
        self._looks_left = 2
        self._seen: Mapping[str, Any] = {}

    def look_again(self) -> None:
        """Look at the next two steps, if no look is under way."""
        self._looks_left = self._looks_left or 2

    def after_step(self, state: Any) -> str | None:
        """Look, if it is due. Returns the problem of a state that steps do not replace, if it was seen."""
        if not self._looks_left:
            return None
        self._looks_left -= 1
        arrays = {one.name: one.value for one in flatten(state).leaves if isinstance(one.value, jax.Array)}
        seen, self._seen = self._seen, {} if self._looks_left == 0 else arrays
        if self._looks_left:
            return None
        self.names = {name for name, array in seen.items() if array.is_deleted()}
        was_known, self.is_known = self.is_known, True
        same = arrays and all(array is seen.get(name) for name, array in arrays.items())
        return None if was_known or not same else "the last step has left every array of sess.state as it was"


class HostMemory:
    """Memory for copies of donated arrays. It is used again when the snapshot that lies in it is gone."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Bounds], np.ndarray[Any, Any]] = {}
        self._in_use: weakref.ref[_Lease] | None = None

    def lease(self) -> _Lease:
        """The right to use this memory, or other memory if a snapshot still lies in it."""
        free = self._in_use is None or self._in_use() is None
        lease = _Lease(self._buffers if free else {})
        if free:
            self._in_use = weakref.ref(lease)
        return lease


class _Lease:
    def __init__(self, buffers: dict[tuple[str, Bounds], np.ndarray[Any, Any]]) -> None:
        self._buffers = buffers

    def copy(self, name: str, bounds: Bounds, array: Any) -> np.ndarray[Any, Any]:
        """A copy of ``array`` in host memory."""
        source = np.asarray(array)
        buffer = self._buffers.get((name, bounds))
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = self._buffers[name, bounds] = np.empty(source.shape, source.dtype)
        np.copyto(buffer, source)
        return buffer


def take(
    state: Any,
    step: int,
    process: Mapping[str, Any],
    donations: Donations,
    memory: HostMemory,
    rank: int = 0,
    moment: Moment | None = None,
) -> JaxSnapshot:
    """The state of the step that has just ended. Called inside the boundary.

    Raises:
        TypeError: a leaf cannot be saved.
    """
    flat, lease = flatten(state), memory.lease()
    leaves: list[StoredLeaf] = []
    chunks: list[tuple[int, ...]] = []
    parts: list[Part] = []
    for leaf in flat.leaves:
        saved, chunk, shards = _described(leaf, rank)
        is_donated = leaf.name in donations.names
        for bounds, data in shards:
            if isinstance(data, jax.Array):
                data = _held(leaf.name, bounds, data, is_donated, donations.is_known, lease)
            parts.append(Part(len(leaves), bounds, data))
        leaves.append(saved)
        chunks.append(chunk)
    nbytes = sum(part.data.nbytes for part in parts)
    return JaxSnapshot(leaves, chunks, flat.static, flat.empty, parts, step, process, nbytes, moment, lease)


def _described(leaf: Leaf, rank: int) -> tuple[StoredLeaf, tuple[int, ...], list[tuple[Bounds, Any]]]:
    """The leaf, the shape of its shards, and the shards of it that this process writes."""
    value = leaf.value
    if isinstance(value, jax.Array):
        shape, sharding = value.shape, value.sharding
        saved = StoredLeaf(leaf.keys, "array", shape, np.dtype(value.dtype), leaf.key_impl, value.weak_type)
        return saved, sharding.shard_shape(shape), _own_shards(value, rank)
    if isinstance(value, (np.ndarray, np.generic)):
        copy = np.array(value, order="C")
        own = [(_bounds((slice(None),) * copy.ndim, copy.shape), copy)] if rank == 0 else []
        return StoredLeaf(leaf.keys, "numpy", copy.shape, copy.dtype), copy.shape, own
    return StoredLeaf(leaf.keys, type(value).__name__, plain=value), (), []


def _own_shards(value: jax.Array, rank: int) -> list[tuple[Bounds, Any]]:
    is_on_one = len(value.sharding.device_set) == 1
    if rank and (is_on_one or value.is_fully_addressable):
        # In a run of several processes each has one of these, and the chief's is saved.
        return []
    if is_on_one:
        return [(_bounds((slice(None),) * value.ndim, value.shape), value)]
    own = [shard for shard in value.addressable_shards if shard.replica_id == 0]
    return [(_bounds(shard.index, value.shape), shard.data) for shard in own]


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(
        (one.start or 0, size if one.stop is None else one.stop) for one, size in zip(index, shape, strict=True)
    )


def _held(name: str, bounds: Bounds, array: Any, is_donated: bool, is_known: bool, lease: _Lease) -> Any:
    """What keeps the values of ``array``: a view of it, or a copy."""
    if _is_on_cpu(array):
        return lease.copy(name, bounds, array) if is_donated else np.asarray(array)
    if is_donated or not is_known:
        array = jnp.copy(array)
    array.copy_to_host_async()
    return array


def _is_on_cpu(array: Any) -> bool:
    return bool(next(iter(array.devices())).platform == "cpu")
