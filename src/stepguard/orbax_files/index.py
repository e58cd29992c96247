"""What a checkpoint holds: its values by name, and the places of their bytes. Stepguard's own file of it is here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError, CheckpointError

STATE_FILE = "state.json"
FORMAT_VERSION = 1

Keys = tuple[str | int, ...]
"""The place of a value in its state: names, and ``int`` for a place in a list or tuple."""
Bounds = tuple[tuple[int, int], ...]
"""A part of an array: where it starts and stops in each dimension."""

PLAIN_KINDS: dict[str, type] = {one.__name__: one for one in (bool, int, float, complex, str)}


def name_of(keys: Keys) -> str:
    """The name for messages, such as ``opt[0].mu.w``."""
    return "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in keys).removeprefix(".") or "state"


def orbax_name(keys: Keys) -> str:
    """The name in Orbax's files, such as ``opt.0.mu.w``."""
    return ".".join(map(str, keys))


def data_file(rank: int) -> str:
    """The file with the arrays of the process of ``rank``."""
    return f"d/process-{rank}"


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part of an array: the rank of the process that wrote it, what it is of the whole, and its place in the file."""

    rank: int
    bounds: Bounds
    offset: int


@dataclass(frozen=True, slots=True)
class StoredLeaf:
    """One value. ``kind`` is "array", "numpy" or the type of a Python value, which ``plain`` has.

    ``key_impl`` is the implementation of a typed PRNG key, whose data the array has. ``weak`` is JAX's weak type.
    """

    keys: Keys
    kind: str
    shape: tuple[int, ...] = ()
    dtype: np.dtype[Any] | None = None
    key_impl: str | None = None
    weak: bool = False
    plain: Any = None
    parts: Sequence[StoredPart] = ()

    @property
    def name(self) -> str:
        """The name for messages."""
        return name_of(self.keys)

    @property
    def form(self) -> str:
        """What it is, for messages: ``float32[3, 4]``, ``key<threefry2x32>[]``, ``int``."""
        if self.dtype is None:
            return self.kind
        if self.key_impl is not None:
            return f"key<{self.key_impl}>{list(self.shape[:-1])}"
        return f"{self.dtype.name}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Index:
    """All values of a checkpoint; ``static`` has the parts of the program that are compared, as text."""

    leaves: Sequence[StoredLeaf]
    static: Mapping[str, str]

    def to_json(self) -> bytes:
        """The content of the file `STATE_FILE`."""
        leaves = [_document(one) for one in self.leaves]
        return json.dumps({"format_version": FORMAT_VERSION, "leaves": leaves, "static": dict(self.static)}).encode()


def read_index(directory: Path) -> Index:
    """Read the file `STATE_FILE`.

    Raises:
        CheckpointCorruptError: it is not of this form.
        CheckpointError: a newer Stepguard wrote it.
        OSError: it cannot be read.
    """
    path = directory / STATE_FILE
    content = files.read_bytes(path)
    try:
        document = json.loads(content)
        version = document["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: a newer Stepguard wrote it (format {version}): upgrade stepguard", path=path
            )
        static = {str(name): str(text) for name, text in document["static"].items()}
        return Index([_leaf(one) for one in document["leaves"]], static)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(
            f"{path}: expected the values of a state, found {len(content)} bytes that are none "
            f"({type(error).__name__}: {error})",
            path=path,
        ) from error


def _document(leaf: StoredLeaf) -> dict[str, Any]:
    found: dict[str, Any] = {"keys": leaf.keys, "kind": leaf.kind}
    if leaf.dtype is None:
        plain = leaf.plain
        return {**found, "plain": [plain.real, plain.imag] if isinstance(plain, complex) else plain}
    parts = [[one.rank, one.bounds, one.offset] for one in leaf.parts]
    found |= {"shape": leaf.shape, "dtype": zarr_type(leaf.dtype), "parts": parts}
    if leaf.key_impl is not None:
        found["key_impl"] = leaf.key_impl
    return {**found, "weak": True} if leaf.weak else found


def _leaf(document: dict[str, Any]) -> StoredLeaf:
    keys = tuple(document["keys"])
    if not all(type(one) in (str, int) for one in keys):
        raise TypeError(f"expected names and places, found {keys!r:.80}")
    kind = document["kind"]
    if kind in PLAIN_KINDS:
        plain = complex(*document["plain"]) if kind == "complex" else document["plain"]
        if type(plain) is not PLAIN_KINDS[kind]:
            raise TypeError(f"{name_of(keys)}: expected a value of the type {kind}, found {plain!r:.80}")
        return StoredLeaf(keys, kind, plain=plain)
    if kind not in ("array", "numpy"):
        raise ValueError(f"{name_of(keys)}: expected the kind of a value, found {kind!r:.80}")
    shape = tuple(_count(one) for one in document["shape"])
    parts = [
        StoredPart(_count(rank), _bounds(bounds, shape), _count(offset)) for rank, bounds, offset in document["parts"]
    ]
    impl = document.get("key_impl")
    if impl is not None and not isinstance(impl, str):
        raise TypeError(f"{name_of(keys)}: expected the name of an implementation, found {impl!r:.80}")
    dtype = dtype_of(document["dtype"])
    return StoredLeaf(keys, kind, shape, dtype, impl, bool(document.get("weak")), parts=parts)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"expected a size or a place, found {value!r:.80}")
    return value


def _bounds(document: Any, shape: tuple[int, ...]) -> Bounds:
    bounds = tuple((_count(start), _count(stop)) for start, stop in document)
    if len(bounds) != len(shape) or not all(a <= b <= size for (a, b), size in zip(bounds, shape, strict=True)):
        raise ValueError(f"expected a part of {shape}, found {bounds}")
    return bounds


def nbytes_of(bounds: Bounds, dtype: np.dtype[Any]) -> int:
    """The size of a part, in bytes."""
    return math.prod(stop - start for start, stop in bounds) * dtype.itemsize


# --- the types of arrays ---


def zarr_type(dtype: np.dtype[Any]) -> str:
    """The name of a type in Zarr's metadata. TensorStore added those of ml_dtypes, such as ``bfloat16``."""
    return str(dtype.newbyteorder("<").str if is_numpys(dtype) else dtype.name)


def is_numpys(dtype: np.dtype[Any]) -> bool:
    """Whether a type is one of NumPy's own, and not of ml_dtypes."""
    return bool(dtype.type.__module__ == "numpy")


def dtype_of(name: str) -> np.dtype[Any]:
    """The type with a name of `zarr_type`. Raises ValueError if arrays of numbers have no such type."""
    try:
        dtype = np.dtype(name)
    except TypeError:
        import ml_dtypes

        found = getattr(ml_dtypes, name, None)
        if not isinstance(found, type) or not issubclass(found, np.generic):
            raise ValueError(f"expected the type of an array, found {name!r:.80}") from None
        dtype = np.dtype(found)
    if dtype.kind in "OSUMm" or dtype.type is np.void:
        raise ValueError(f"expected a type of numbers, found {name!r:.80}")
    return dtype


def kind_of(dtype: np.dtype[Any]) -> str:
    """The kind of a type: "b" (booleans), "i" (integers), "f" (floats) or "c" (complex numbers)."""
    if dtype.kind == "V":
        return "i" if "int" in dtype.name else "f"
    return "i" if dtype.kind == "u" else dtype.kind
