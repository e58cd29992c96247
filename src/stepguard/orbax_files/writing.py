"""Writes the files of a checkpoint: the arrays of one process, and what Stepguard and Orbax find them by."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepguard.disk import files
from stepguard.disk.new_file import NewFile
from stepguard.orbax_files import ocdbt
from stepguard.orbax_files.index import (
    STATE_FILE,
    Bounds,
    Index,
    Keys,
    StoredLeaf,
    data_file,
    nbytes_of,
    orbax_name,
    zarr_type,
)

Digests = dict[str, tuple[int, str]]
"""Size in bytes and digest of files, by their names in the directory."""

# A block of this size stays in the cache of a core from its digest to its write.
_BLOCK_BYTES = 1 << 20
# What the vector instructions of all processors like, so that a reader may use mapped memory as it is.
_ALIGNMENT = 64
_TREE_FILE = "d/tree"


def write_data(directory: Path, rank: int, arrays: Iterable[np.ndarray[Any, Any]]) -> Digests:
    """Write the arrays of one process, one after the other.

    Raises:
        OSError: the disk is full, or fails.
    """
    name = data_file(rank)
    files.make_own_dir(directory / "d")
    with NewFile(directory / name) as file:
        blocks = _Blocks(file)
        for array in arrays:
            blocks.write(bytes(-blocks.size % _ALIGNMENT))
            data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            blocks.write(memoryview(data.reshape(-1).view(np.uint8)))
        blocks.flush()
    return {name: (file.size, file.digest)}


class _Blocks:
    """Writes large arrays block by block, and puts small ones together into blocks: each write has a price."""

    def __init__(self, file: NewFile) -> None:
        self._file = file
        self._held = bytearray()
        self.size = 0

    def write(self, content: bytes | memoryview) -> None:
        self.size += len(content)
        if len(self._held) + len(content) > _BLOCK_BYTES:
            self.flush()
        if len(content) < _BLOCK_BYTES:
            self._held += content
            return
        for begin in range(0, len(content), _BLOCK_BYTES):
            self._file.write(content[begin : begin + _BLOCK_BYTES])

    def flush(self) -> None:
        self._file.write(self._held)
        self._held.clear()


def offsets(parts: Iterable[tuple[Bounds, np.dtype[Any]]]) -> Iterator[int]:
    """The places at which `write_data` begins arrays of these forms, in the same order."""
    end = 0
    for bounds, dtype in parts:
        begin = end + -end % _ALIGNMENT
        yield begin
        end = begin + nbytes_of(bounds, dtype)


def write_index(directory: Path, index: Index, chunks: Sequence[tuple[int, ...]], empty: Mapping[Keys, str]) -> Digests:
    """Write what makes a checkpoint of the files of `write_data`, once all processes have written them.

    ``chunks`` are the shapes of the parts of each leaf, and ``empty`` the kinds of the nodes without values.

    Raises:
        OSError: the disk is full, or fails.
    """
    values: dict[str, bytes | ocdbt.Place] = {}
    for leaf, chunk in zip(index.leaves, chunks, strict=True):
        values.update(_zarr(leaf, chunk))
    node = ocdbt.node(values)
    root = ocdbt.Place(_TREE_FILE, 0, len(node))
    strings = {orbax_name(one.keys): one.plain for one in index.leaves if one.kind == "str"}
    written = {
        STATE_FILE: index.to_json(),
        _TREE_FILE: node,
        ocdbt.MANIFEST: ocdbt.manifest(root, values),
        "_METADATA": json.dumps(_metadata(index, chunks, empty)).encode(),
    }
    # Each file costs an fsync, so there is none without content.
    if strings:
        written["_strings.json"] = json.dumps(strings).encode()
    if any(one.key_impl is not None for one in index.leaves):
        files.make_own_dir(directory / "array_metadatas")
        written["array_metadatas/process_0"] = json.dumps(_array_metadata(index, chunks)).encode()
    return {name: write_small(directory / name, content) for name, content in written.items()}


def write_small(path: Path, content: bytes) -> tuple[int, str]:
    """Write a file; return its size and digest. Raises OSError: the disk is full, or fails."""
    with NewFile(path) as file:
        file.write(content)
    return file.size, file.digest


def _zarr(leaf: StoredLeaf, chunk: tuple[int, ...]) -> Iterator[tuple[str, bytes | ocdbt.Place]]:
    """The keys of one array in the database. A Python number is an array without dimensions, a string is elsewhere."""
    name = orbax_name(leaf.keys)
    dtype = leaf.dtype
    if dtype is None:
        if leaf.kind == "str":
            return
        number = np.asarray(leaf.plain)
        yield f"{name}/.zarray", _zarray((), (), number.dtype)
        yield f"{name}/0", number.tobytes()
        return
    yield f"{name}/.zarray", _zarray(leaf.shape, chunk, dtype)
    for part in leaf.parts:
        numbers = [start // max(1, size) for (start, _), size in zip(part.bounds, chunk, strict=True)]
        place = ocdbt.Place(data_file(part.rank), part.offset, nbytes_of(part.bounds, dtype))
        if place.length:
            yield f"{name}/{'.'.join(map(str, numbers)) or '0'}", place


# A model has many arrays of one form.
@functools.lru_cache(maxsize=1024)
def _zarray(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Zarr's description (version 2) of an array in chunks of one shape, without compression."""
    described = {
        "chunks": [max(1, size) for size in chunk],
        "compressor": None,
        "dimension_separator": ".",
        "dtype": zarr_type(dtype),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }
    return json.dumps(described, separators=(",", ":")).encode()


def _metadata(index: Index, chunks: Sequence[tuple[int, ...]], empty: Mapping[Keys, str]) -> dict[str, Any]:
    """The tree, as Orbax describes it."""
    values: dict[Keys, dict[str, Any]] = {
        keys: {"value_type": kind, "skip_deserialize": True} for keys, kind in empty.items()
    }
    for leaf, chunk in zip(index.leaves, chunks, strict=True):
        # Orbax has no complex scalars.
        kinds = {"array": "jax.Array", "numpy": "np.ndarray", "complex": "np.ndarray", "str": "string"}
        value: dict[str, Any] = {"value_type": kinds.get(leaf.kind, "scalar"), "skip_deserialize": False}
        values[leaf.keys] = {**value, "write_shape": list(chunk)} if leaf.kind == "array" else value
    tree = {
        str(tuple(map(str, keys))): {
            "key_metadata": [{"key": str(one), "key_type": 1 if isinstance(one, int) else 2} for one in keys],
            "value_metadata": value,
        }
        for keys, value in values.items()
    }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _array_metadata(index: Index, chunks: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """The shapes of the chunks, and which arrays are typed PRNG keys, as Orbax describes them."""
    return {
        "array_metadatas": [
            {
                "array_metadata": {
                    "param_name": orbax_name(leaf.keys),
                    "write_shape": list(chunk),
                    "chunk_shape": list(chunk),
                    "ext_metadata": None if leaf.key_impl is None else {"random_key_impl": leaf.key_impl},
                }
            }
            for leaf, chunk in zip(index.leaves, chunks, strict=True)
            if leaf.kind == "array"
        ]
    }
