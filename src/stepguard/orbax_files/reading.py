"""Reads the values of a checkpoint, whole or in part: Stepguard's by its own index, and Orbax's with TensorStore."""

from __future__ import annotations

import ast
import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError, CheckpointError
from stepguard.orbax_files.index import (
    STATE_FILE,
    Bounds,
    Keys,
    StoredLeaf,
    StoredPart,
    data_file,
    dtype_of,
    nbytes_of,
    orbax_name,
    read_index,
)

METADATA = "_METADATA"

# Arrays that begin here need no copy to become arrays of JAX on the CPU.
_ALIGNMENT = 64
_SEQUENCE = 1


class Stored(Protocol):
    """A checkpoint that was opened for reading: its values, and the static parts of the program that saved it."""

    @property
    def leaves(self) -> Sequence[StoredLeaf]:
        """The values, in the order in which they were saved."""

    @property
    def static(self) -> Mapping[str, str]:
        """The static parts as text, by name; none if Orbax wrote the checkpoint."""

    def read(self, leaf: StoredLeaf, bounds: Bounds) -> np.ndarray[Any, Any]:
        """A part of an array, in new memory.

        Raises:
            CheckpointCorruptError: the bytes are not there.
            OSError: they cannot be read.
        """


def is_checkpoint(directory: Path) -> bool:
    """Whether Stepguard or Orbax has written ``directory`` as a checkpoint."""
    return (directory / STATE_FILE).is_file() or bool(_items(directory))


def open_stored(directory: Path, parts: Sequence[str] = ()) -> Stored:
    """Open the checkpoint in ``directory``, which Stepguard or Orbax has written. No code from it is run.

    ``parts`` are the names of the parts of the program's state. A ``CheckpointManager`` may have saved each as an item.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointCorruptError, OSError: it cannot be read.
        CheckpointError: a newer Stepguard wrote it, or TensorStore, which reads Orbax's, is not installed.
    """
    if (directory / STATE_FILE).exists():
        return StepguardFiles(directory)
    items = _items(directory)
    if not items:
        raise FileNotFoundError(errno.ENOENT, "expected a checkpoint of Stepguard or Orbax, found none", str(directory))
    if len(items) == 1 and not {*items} & {*parts}:
        return OrbaxFiles(*items.values())
    return Under({name: OrbaxFiles(path) for name, path in items.items()})


def open_part(directory: Path, name: str) -> Stored:
    """Open the part ``name`` of the state in a checkpoint, or the checkpoint as that part, if it has no such part."""
    stored = open_stored(directory, [name])
    return stored if any(one.keys and one.keys[0] == name for one in stored.leaves) else Under({name: stored})


def _items(directory: Path) -> dict[str, Path]:
    """The trees that Orbax has saved in ``directory``, by name: itself, or the items of a ``CheckpointManager``."""
    if (directory / METADATA).is_file():
        return {"": directory}
    if not directory.is_dir():
        return {}
    return {one.name: one for one in sorted(directory.iterdir()) if (one / METADATA).is_file()}


def whole(leaf: StoredLeaf) -> Bounds:
    """All of an array."""
    return tuple((0, size) for size in leaf.shape)


class StepguardFiles:
    """The files that :mod:`stepguard.orbax_files.writing` has written."""

    def __init__(self, directory: Path) -> None:
        index = read_index(directory)
        self._directory = directory
        self.leaves = index.leaves
        self.static = index.static
        # Before memory is made for arrays of any size.
        sizes = {
            part.rank: files.size_of(directory / data_file(part.rank)) for leaf in self.leaves for part in leaf.parts
        }
        for leaf in self.leaves:
            _check_parts(directory, leaf, sizes)

    def read(self, leaf: StoredLeaf, bounds: Bounds) -> np.ndarray[Any, Any]:
        """A part of an array; see `Stored`."""
        dtype = leaf.dtype
        if dtype is None:
            raise ValueError(f"{leaf.name}: expected an array, found the value {leaf.plain!r:.80}")
        found = _aligned(tuple(stop - start for start, stop in bounds), dtype)
        read = sum(self._read_part(dtype, part, bounds, found) for part in leaf.parts)
        if read != found.size:
            raise _gaps(self._directory, leaf)
        return found

    def _read_part(self, dtype: np.dtype[Any], part: StoredPart, bounds: Bounds, into: np.ndarray[Any, Any]) -> int:
        """Read what ``part`` has of ``bounds``; return how many values."""
        shared = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(part.bounds, bounds, strict=True)]
        if any(stop <= start for start, stop in shared):
            return 0
        path = self._directory / data_file(part.rank)
        if tuple(shared) == part.bounds == bounds:
            _read_at(path, part.offset, into)
            return into.size
        # Whole rows of the part are read, because these lie one after the other in the file.
        rows = [shared[0], *part.bounds[1:]]
        begin = part.offset + (rows[0][0] - part.bounds[0][0]) * nbytes_of(part.bounds[1:], dtype)
        read = _aligned(tuple(stop - start for start, stop in rows), dtype)
        _read_at(path, begin, read)
        source = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(shared, rows, strict=True))
        target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(shared, bounds, strict=True))
        into[target] = read[source]
        return math.prod(stop - start for start, stop in shared)


def _check_parts(directory: Path, leaf: StoredLeaf, sizes: Mapping[int, int | None]) -> None:
    """Raise CheckpointCorruptError unless the files have as many bytes as the array."""
    dtype = leaf.dtype
    if dtype is None:
        return
    for part in leaf.parts:
        end, size = part.offset + nbytes_of(part.bounds, dtype), sizes[part.rank]
        if size is None or size < end:
            path = directory / data_file(part.rank)
            raise CheckpointCorruptError(f"{path}: {leaf.name}: expected {end} bytes or more, found {size}", path=path)
    if sum(nbytes_of(part.bounds, dtype) for part in leaf.parts) != nbytes_of(whole(leaf), dtype):
        raise _gaps(directory, leaf)


def _gaps(directory: Path, leaf: StoredLeaf) -> CheckpointCorruptError:
    path = directory / STATE_FILE
    return CheckpointCorruptError(f"{path}: {leaf.name}: expected the whole array, found other parts", path=path)


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    nbytes = math.prod(shape) * dtype.itemsize
    memory: np.ndarray[Any, Any] = np.empty(nbytes + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + nbytes].view(dtype).reshape(shape)


def _read_at(path: Path, offset: int, into: np.ndarray[Any, Any]) -> None:
    flat: Any = into.reshape(-1).view(np.uint8)
    view = memoryview(flat)
    descriptor = files.open_regular(path)
    try:
        while view:
            count = os.preadv(descriptor, [view], offset)
            if not count:
                raise CheckpointCorruptError(
                    f"{path}: expected {len(view)} bytes from {offset}, found its end", path=path
                )
            view, offset = view[count:], offset + count
    finally:
        os.close(descriptor)


class OrbaxFiles:
    """A checkpoint that Orbax has written without Stepguard, in any of its forms."""

    def __init__(self, directory: Path) -> None:
        try:
            import tensorstore
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"{directory}: reading a checkpoint of Orbax's needs TensorStore: pip install orbax-checkpoint",
                path=directory,
            ) from error
        self._tensorstore = tensorstore
        self._directory = directory
        self.static: Mapping[str, str] = {}
        path = directory / METADATA
        try:
            metadata = json.loads(files.read_bytes(path))
            self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
            self._is_database = (directory / "manifest.ocdbt").exists()
            tree = metadata["tree_metadata"]
            self._arrays: dict[str, Any] = {}
            self._impls = self._key_impls()
            self._strings = self._read_strings()
            self.leaves: Sequence[StoredLeaf] = [
                leaf for place, one in tree.items() if (leaf := self._leaf(place, one)) is not None
            ]
        except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError) as error:
            raise CheckpointCorruptError(
                f"{path}: expected a checkpoint of Orbax's, found one that cannot be read: {error}", path=path
            ) from error

    def read(self, leaf: StoredLeaf, bounds: Bounds) -> np.ndarray[Any, Any]:
        """A part of an array; see `Stored`."""
        part = tuple(slice(start, stop) for start, stop in bounds)
        try:
            found: np.ndarray[Any, Any] = self._arrays[orbax_name(leaf.keys)][part].read().result()
            return found
        except ValueError as error:  # TensorStore raises it for all that it cannot read.
            raise CheckpointCorruptError(
                f"{self._directory}: {leaf.name}: cannot be read: {error}", path=self._directory
            ) from error

    def _leaf(self, place: str, one: dict[str, Any]) -> StoredLeaf | None:
        if one["value_metadata"].get("skip_deserialize"):
            return None
        types = [key["key_type"] for key in one["key_metadata"]]
        names = ast.literal_eval(place)
        keys: Keys = tuple(int(key) if kind == _SEQUENCE else str(key) for key, kind in zip(names, types, strict=True))
        name, kind = orbax_name(keys), one["value_metadata"]["value_type"]
        if kind == "string":
            return StoredLeaf(keys, "str", plain=str(self._strings[name]))
        array = self._arrays[name] = self._open(name)
        dtype = dtype_of(array.dtype.name)
        if kind == "scalar" and array.rank == 0 and dtype.kind in "bif":
            plain = array.read().result()[()].item()
            return StoredLeaf(keys, type(plain).__name__, plain=plain)
        stored = "array" if kind == "jax.Array" else "numpy"
        return StoredLeaf(keys, stored, tuple(array.shape), dtype, self._impls.get(name))

    def _open(self, name: str) -> Any:
        root = f"{self._directory.absolute()}/"
        file: dict[str, Any] = {"driver": "file", "path": root if self._is_database else f"{root}{name}/"}
        store = {"driver": "ocdbt", "base": file, "path": f"{name}/"} if self._is_database else file
        return self._tensorstore.open({"driver": self._driver, "kvstore": store}, open=True, read=True).result()

    def _key_impls(self) -> dict[str, str]:
        """The implementations of the typed keys, by name."""
        found = {}
        for path in sorted((self._directory / "array_metadatas").glob("process_*")):
            for one in json.loads(files.read_bytes(path))["array_metadatas"]:
                described = one["array_metadata"]
                impl = (described.get("ext_metadata") or {}).get("random_key_impl")
                if impl is not None:
                    found[str(described["param_name"])] = str(impl)
        return found

    def _read_strings(self) -> dict[str, Any]:
        path = self._directory / "_strings.json"
        found = json.loads(files.read_bytes(path)) if path.exists() else {}
        return dict(found)


class Under:
    """The values of checkpoints as parts of one state, each below the name of its part."""

    def __init__(self, parts: Mapping[str, Stored]) -> None:
        self._sources = {
            leaf.keys: (stored, leaf.keys[1:], leaf)
            for name, stored in parts.items()
            for one in stored.leaves
            for leaf in [replace(one, keys=(name, *one.keys))]
        }
        self.leaves: Sequence[StoredLeaf] = [leaf for _, _, leaf in self._sources.values()]
        self.static: Mapping[str, str] = {}

    def read(self, leaf: StoredLeaf, bounds: Bounds) -> np.ndarray[Any, Any]:
        """A part of an array; see `Stored`."""
        stored, keys, _ = self._sources[leaf.keys]
        return stored.read(replace(leaf, keys=keys), bounds)
