"""Digests of 64 bits of whatever a loader gives, a generator holds or a model is, to compare two runs bit for bit.

The digest is XXH3 of the bytes of each leaf, with its kind and shape, and of the digests of what holds the leaves. What
is digested once is remembered, so that objects that refer to each other cost no more than their number, and it makes no
difference whether two equal parts are one object. Nothing depends on an address or on the order of a set. Of arrays on
a device only evenly spaced values are read, since a copy of all of them would cost more than the step.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from types import FunctionType, ModuleType
from typing import Any

from stepguard.steps.attributes import attributes, has

SAMPLED = 4096
"""How many values of an array on a device are read."""

_DEPTH = 12
_MOST_PARTS = 100_000
_AS_TEXT = (date, time, timedelta, Decimal, PurePath, range, slice)
_PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None))

AsBytes = Callable[[Any], Any]
"""Returns the bytes of an array of a framework, in an object with the buffer protocol; ``None`` if it cannot."""


def digest(value: Any, as_bytes: AsBytes) -> int:
    """The digest of a value with all that it holds, down to a bounded depth and number of parts."""
    return _Digester(as_bytes).of(value)


def part_digests(name: str, value: Any, as_bytes: AsBytes, most: int = 16) -> dict[str, int]:
    """The digests of the parts of ``value``, such as ``batch[0]`` and ``batch['image']``; ``name`` alone for one part.

    Of more than ``most`` parts, the last digest is that of all the others.
    """
    if isinstance(value, Mapping):
        parts = {f"{name}[{key!r:.80}]": one for key, one in value.items()}
    elif isinstance(value, (list, tuple)) and len(value) > 1:
        fields_of_it = getattr(value, "_fields", None)
        keys = range(len(value)) if fields_of_it is None else fields_of_it
        parts = {f"{name}[{key}]": one for key, one in zip(keys, value, strict=True)}
    else:
        parts = {name: value}
    if len(parts) > most:
        kept = list(parts.items())
        parts = {**dict(kept[: most - 1]), f"{name}[...]": [one for _, one in kept[most - 1 :]]}
    return {key: digest(one, as_bytes) for key, one in parts.items()}


class _Digester:
    """Makes one digest."""

    def __init__(self, as_bytes: AsBytes) -> None:
        import xxhash

        self._new = xxhash.xxh3_64
        self._as_bytes = as_bytes
        # By address, what has a digest already; the value itself is kept, so that nothing else gets its address.
        self._known: dict[int, tuple[Any, bytes]] = {}
        # What is being digested now, with its depth: one that comes again there is in a circle.
        self._open: dict[int, int] = {}

    def of(self, value: Any) -> int:
        """The digest of a value."""
        hasher = self._new()
        self._add(hasher, value, 0)
        return int(hasher.intdigest())

    def _add(self, hasher: Any, value: Any, depth: int) -> None:
        if isinstance(value, _PLAIN):
            _add_plain(hasher, value)
        elif _is_array(value) and not getattr(value.dtype, "hasobject", False):
            self._add_array(hasher, value)
        elif id(value) in self._known:
            hasher.update(self._known[id(value)][1])
        elif id(value) in self._open:
            hasher.update(f"circle {depth - self._open[id(value)]}".encode())
        elif depth >= _DEPTH or len(self._known) >= _MOST_PARTS:
            hasher.update(_name_of(value))
        else:
            self._open[id(value)] = depth
            own = self._new()
            self._add_parts(own, value, depth + 1)
            del self._open[id(value)]
            self._known[id(value)] = value, own.digest()
            hasher.update(own.digest())

    def _add_array(self, hasher: Any, value: Any) -> None:
        hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
        content = self._as_bytes(value)
        if content is not None:
            hasher.update(content)

    def _add_parts(self, hasher: Any, value: Any, depth: int) -> None:
        if isinstance(value, (set, frozenset)):
            hasher.update(b"set")
            for one in sorted(self._digest(part, depth) for part in value):
                hasher.update(one)
        elif isinstance(value, (list, tuple)) and (numbers := _numbers(value)) is not None:
            hasher.update(b"numbers")
            hasher.update(numbers)
        elif isinstance(value, Mapping):
            hasher.update(f"mapping of {len(value)}".encode())
            for key, part in value.items():
                self._add(hasher, key, depth)
                self._add(hasher, part, depth)
        elif isinstance(value, (list, tuple, deque)):
            hasher.update(f"sequence of {len(value)}".encode())
            for part in value:
                self._add(hasher, part, depth)
        elif _is_array(value):
            hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
            for part in value.reshape(-1).tolist():
                self._add(hasher, part, depth)
        else:
            hasher.update(_name_of(value))
            for name, part in _attributes(value):
                _add_plain(hasher, name)
                self._add(hasher, part, depth)

    def _digest(self, value: Any, depth: int) -> bytes:
        hasher = self._new()
        self._add(hasher, value, depth)
        return bytes(hasher.digest())


def _name_of(value: Any) -> bytes:
    """What is told of an object itself: its type, or its text where that is all there is; never an address."""
    if isinstance(value, _AS_TEXT):
        return repr(value).encode("utf-8", "surrogatepass")
    if isinstance(value, (FunctionType, ModuleType, type)):
        return f"{value.__class__.__name__} {getattr(value, '__qualname__', value.__name__)}".encode()
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}".encode()
    return type(value).__qualname__.encode()


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object, also those in slots; of one that is told by its name, none."""
    if isinstance(value, (*_AS_TEXT, FunctionType, ModuleType, type, Enum)):
        return
    yield from attributes(value).items()


def _add_plain(hasher: Any, value: Any) -> None:
    content = value if isinstance(value, (bytes, bytearray)) else repr(value).encode("utf-8", "surrogatepass")
    # With its length, so that two values are never another two that look alike when they stand one after the other.
    hasher.update(f"{type(value).__name__} {len(content)} ".encode())
    hasher.update(content)


def _numbers(values: Any) -> bytes | None:
    """The bytes of a sequence of many whole numbers, as the state of a generator is one; ``None`` for any other."""
    if len(values) < 8 or not isinstance(values[0], int):
        return None
    try:
        return array("q", values).tobytes()
    except (TypeError, OverflowError):
        return None


def _is_array(value: Any) -> bool:
    return has(value, "shape") and has(value, "dtype")


def array_bytes(leaf: Any) -> Any:
    """The bytes of what NumPy can read, such as an array of its own or of JAX; of a device, evenly spaced values."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if not is_on_host(leaf):
        flat = leaf.reshape(-1)
        leaf = flat[:: max(1, flat.shape[0] // SAMPLED)]
    try:
        found = numpy.ascontiguousarray(leaf)
        if found.dtype.hasobject:
            # Texts of a framework's own array; the bytes of the array are addresses.
            values = found.reshape(-1).tolist()
            is_plain = all(isinstance(one, _PLAIN) for one in values)
            return repr(values).encode("utf-8", "surrogatepass") if is_plain else None
        return found.reshape(-1).view(numpy.uint8).data
    except (TypeError, ValueError):
        return None


def is_on_host(leaf: Any) -> bool:
    """Whether a number or an array is in the memory of this process, so that nobody waits for a device."""
    device = getattr(leaf, "device", None)
    if callable(device):
        device = device()
    kind = getattr(device, "platform", None) or getattr(device, "type", None) or device
    return kind is None or kind == "cpu"


def numbers_at_hand(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of ``values`` that are numbers, or arrays of one, and can be read without waiting for a device."""
    found = {}
    for name, value in values.items():
        if is_on_host(value):
            try:
                found[str(name)] = float(value.item() if hasattr(value, "item") else value)
            except (TypeError, ValueError):
                continue
    return found
