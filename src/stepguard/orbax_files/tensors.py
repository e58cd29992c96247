"""Reads the tensors of a JAX checkpoint, Stepguard's or Orbax's, without the program that saved it, and without JAX."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError
from stepguard.orbax_files import plain_values
from stepguard.orbax_files.index import StoredLeaf, is_numpys, orbax_name
from stepguard.orbax_files.reading import Stored, open_stored, whole
from stepguard.store import manifest
from stepguard.store.saved_tensor import SavedTensor, SavedWeight

_NUMBERS = (bool, int, float, complex)


def read_tensors(path: Path) -> Iterator[SavedTensor]:
    """The tensors and plain values of a checkpoint, under the names of error messages, such as ``opt[0].mu.w``.

    Raises CheckpointCorruptError if a file is damaged, FileNotFoundError if there is no checkpoint.
    """
    stored = open_stored(path)
    for leaf in stored.leaves:
        if leaf.dtype is None:
            yield _plain(leaf.name, leaf.plain)
        else:
            nbytes = int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
            read = functools.partial(_array, stored, leaf)
            yield SavedTensor(leaf.name, leaf.dtype.name, leaf.shape, nbytes, read)
    named = manifest.named_files(path)
    for file in sorted(path.glob("process-*.json") if named is None else named):
        if not file.name.startswith("process-") or file.parent != path:
            continue
        try:
            values = plain_values.from_json(files.read_bytes(file))
        except ValueError as error:
            raise CheckpointCorruptError(f"{file}: expected the state of a process: {error}", path=file) from error
        yield from _values(file.stem, values)


def read_weights(path: Path) -> dict[str, list[SavedWeight]]:
    """The arrays of each part of the state, by the name of the part, such as ``params``; each is read on demand.

    Their names are those that Orbax has, such as ``dense.kernel``. Raises as :func:`read_tensors`.
    """
    stored = open_stored(path)
    found: dict[str, list[SavedWeight]] = {}
    for leaf in stored.leaves:
        if leaf.dtype is None:
            continue
        part = str(leaf.keys[0]) if leaf.keys else "state"
        name = orbax_name(leaf.keys[1:]) or part
        nbytes = int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
        read = functools.partial(_bytes, stored, leaf)
        found.setdefault(part, []).append(SavedWeight(name, leaf.dtype.name, leaf.shape, nbytes, read, leaf.name))
    return found


def _bytes(stored: Stored, leaf: StoredLeaf) -> np.ndarray[Any, Any]:
    found = stored.read(leaf, whole(leaf))
    if found.dtype.byteorder == ">":
        found = found.astype(found.dtype.newbyteorder("<"))
    flat: np.ndarray[Any, Any] = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
    return flat


def _array(stored: Stored, leaf: StoredLeaf) -> np.ndarray[Any, Any]:
    found = stored.read(leaf, whole(leaf))
    if is_numpys(found.dtype):
        return found
    # A type of ml_dtypes, which NumPy's own functions do not know.
    return found.astype(np.int16 if "int" in found.dtype.name else np.float32)


def _values(name: str, value: Any) -> Iterator[SavedTensor]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _values(f"{name}.{key}", part)
    elif isinstance(value, (list, tuple)) and not (value and all(isinstance(one, _NUMBERS) for one in value)):
        for index, part in enumerate(value):
            yield from _values(f"{name}[{index}]", part)
    else:
        yield _plain(name, value)


def _plain(name: str, value: Any) -> SavedTensor:
    if isinstance(value, (*_NUMBERS, list, tuple, np.ndarray)):
        array = np.asarray(value)
        if array.dtype.kind not in "biufc":  # The value is an integer of more than 64 bits.
            array = np.asarray(value, dtype=object)
    else:
        array = np.empty((), dtype=object)
        array[()] = value if isinstance(value, (str, bytes)) else str(value)
    return SavedTensor(name, type(value).__name__, tuple(array.shape), None, lambda: array, is_plain=True)
