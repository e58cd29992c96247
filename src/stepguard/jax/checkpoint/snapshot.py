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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepguard.errors import CheckpointError
from stepguard.jax.checkpoint.tree import flatten
from stepguard.orbax_files.leaves import Leaf
from stepguard.steps.gate import Moment

Index = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SavedLeaf:
    """A leaf of the state, the same in every process: its names, and what it is.

    ``kind`` is "array", "numpy", or the type of a plain Python value, which ``plain`` holds. ``chunk`` is the shape of
    the shards, which are an even grid. ``weak`` says whether the array has a weak type, as Python numbers have in JAX.
    """

    keys: tuple[str | int, ...]
    name: str
    kind: str
    shape: tuple[int, ...] = ()
    dtype: Any = None
    chunk: tuple[int, ...] = ()
    key_impl: str | None = None
    weak: bool = False
    plain: Any = None


@dataclass(slots=True)
class Part:
    """A shard that this process writes: ``index`` has start and stop in each dimension of the whole leaf.

    ``data`` is an array of the device until the snapshot is finished, and then one in host memory.
    """

    leaf_index: int
    index: Index
    data: Any


@dataclass(slots=True)
class JaxSnapshot:
    """The state of one step: all leaves by name, and the parts of them that this process writes."""

    step: int
    leaves: Sequence[SavedLeaf]
    static: Mapping[str, str]
    empty: Mapping[tuple[str | int, ...], str]
    parts: Sequence[Part]
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
        bad = {part.leaf_index for part in self.parts if not _is_finite(part.data)}
        bad |= {
            n for n, leaf in enumerate(self.leaves) if leaf.kind in ("float", "complex") and leaf.plain != leaf.plain
        }
        return [self.leaves[n].name for n in sorted(bad)]


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
        self._buffers: dict[tuple[str, Index], np.ndarray[Any, Any]] = {}
        self._in_use: weakref.ref[_Lease] | None = None

    def lease(self) -> _Lease:
        """The right to use this memory, or other memory if a snapshot still lies in it."""
        free = self._in_use is None or self._in_use() is None
        lease = _Lease(self._buffers if free else {})
        if free:
            self._in_use = weakref.ref(lease)
        return lease


class _Lease:
    def __init__(self, buffers: dict[tuple[str, Index], np.ndarray[Any, Any]]) -> None:
        self._buffers = buffers

    def copy(self, name: str, index: Index, array: Any) -> np.ndarray[Any, Any]:
        """A copy of ``array`` in host memory."""
        source = np.asarray(array)
        buffer = self._buffers.get((name, index))
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = self._buffers[name, index] = np.empty(source.shape, source.dtype)
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
    leaves: list[SavedLeaf] = []
    parts: list[Part] = []
    for leaf in flat.leaves:
        saved, shards = _described(leaf, rank)
        is_donated = leaf.name in donations.names
        for index, data in shards:
            if isinstance(data, jax.Array):
                data = _held(leaf.name, index, data, is_donated, donations.is_known, lease)
            parts.append(Part(len(leaves), index, data))
        leaves.append(saved)
    nbytes = sum(part.data.nbytes for part in parts)
    return JaxSnapshot(step, leaves, flat.static, flat.empty, parts, process, nbytes, moment, lease)


def _described(leaf: Leaf, rank: int) -> tuple[SavedLeaf, list[tuple[Index, Any]]]:
    """The leaf, and the shards of it that this process writes."""
    value = leaf.value
    if isinstance(value, jax.Array):
        shape, sharding = value.shape, value.sharding
        chunk, dtype = sharding.shard_shape(shape), np.dtype(value.dtype)
        saved = SavedLeaf(
            leaf.keys, leaf.name, "array", shape, dtype, chunk, key_impl=leaf.key_impl, weak=value.weak_type
        )
        whole = tuple((0, size) for size in shape)
        if len(sharding.device_set) == 1:
            # In a run of several processes each has one of these, and the chief's is saved.
            return saved, [(whole, value)] if rank == 0 else []
        if value.is_fully_addressable and rank:
            return saved, []
        own = [shard for shard in value.addressable_shards if shard.replica_id == 0]
        return saved, [(_bounds(shard.index, shape), shard.data) for shard in own]
    if isinstance(value, (np.ndarray, np.generic)):
        copy = np.array(value, order="C")
        saved = SavedLeaf(leaf.keys, leaf.name, "numpy", copy.shape, copy.dtype, copy.shape)
        return saved, [(tuple((0, size) for size in copy.shape), copy)] if rank == 0 else []
    return SavedLeaf(leaf.keys, leaf.name, type(value).__name__, plain=value), []


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
    return tuple(
        (one.start or 0, size if one.stop is None else one.stop) for one, size in zip(index, shape, strict=True)
    )


def _held(name: str, index: Index, array: Any, is_donated: bool, is_known: bool, lease: _Lease) -> Any:
    """What keeps the values of ``array``: a view of it, or a copy."""
    if _is_on_cpu(array):
        return lease.copy(name, index, array) if is_donated else np.asarray(array)
    if is_donated or not is_known:
        array = jnp.copy(array)
    array.copy_to_host_async()
    return array


def _is_on_cpu(array: Any) -> bool:
    return bool(next(iter(array.devices())).platform == "cpu")


def _is_finite(data: np.ndarray[Any, Any]) -> bool:
    if not jnp.issubdtype(data.dtype, jnp.inexact) or not data.size:
        return True
    if data.dtype.itemsize > 2 and data.dtype.kind == "f":
        # One pass and no copy. If any number is NaN, then minimum and maximum are NaN.
        with np.errstate(invalid="ignore"):
            return bool(np.isfinite(data.min()) and np.isfinite(data.max()))
    return bool(np.isfinite(data).all())
