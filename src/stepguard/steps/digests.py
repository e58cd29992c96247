"""Digests of 64 bits of whatever a loader gives, a generator holds or a model is, to compare two runs bit for bit.

The digest is XXH3 of the bytes of each leaf, with its kind and shape. Of arrays on a device only evenly spaced values
are read, since a copy of all of them would cost more than the step.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

SAMPLED = 4096
"""How many values of an array on a device are read."""

_DEPTH = 12
_PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None))

AsBytes = Callable[[Any], Any]
"""Returns the bytes of an array of a framework, in an object with the buffer protocol; ``None`` if it cannot."""


def digest(value: Any, as_bytes: AsBytes) -> int:
    """The digest of a value with all that it holds."""
    import xxhash

    hasher = xxhash.xxh3_64()
    for path, leaf in leaves(value):
        hasher.update(path.encode("utf-8", "surrogatepass"))
        _update(hasher, leaf, as_bytes)
    return int(hasher.intdigest())


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


def leaves(value: Any, path: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, sequences, data classes and plain objects, each with its path."""
    if isinstance(value, _PLAIN) or _is_array(value) or not depth:
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, f"{path}[{key!r:.80}]", depth - 1)
    elif isinstance(value, (list, tuple)):
        numbers = _numbers(value)
        if numbers is not None:
            yield f"{path}[:]", numbers
            return
        for index, part in enumerate(value):
            yield from leaves(part, f"{path}[{index}]", depth - 1)
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from leaves(getattr(value, one.name), f"{path}.{one.name}", depth - 1)
    elif parts := getattr(value, "__dict__", None):
        for key, part in dict(parts).items():
            yield from leaves(part, f"{path}.{key}", depth - 1)
    else:
        yield path, value


def _numbers(values: Any) -> bytes | None:
    """The bytes of a sequence of many whole numbers, as the state of a generator is one; ``None`` for any other."""
    if len(values) < 8 or not isinstance(values[0], int):
        return None
    try:
        return array("q", values).tobytes()
    except (TypeError, OverflowError):
        return None


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _update(hasher: Any, leaf: Any, as_bytes: AsBytes) -> None:
    if isinstance(leaf, (bytes, bytearray)):
        hasher.update(leaf)
    elif isinstance(leaf, _PLAIN):
        hasher.update(repr(leaf).encode("utf-8", "surrogatepass"))
    elif _is_array(leaf):
        hasher.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
        content = as_bytes(leaf)
        if content is not None:
            hasher.update(content)
    else:
        # An object of which nothing is known: its address is not the same in another process.
        hasher.update(type(leaf).__qualname__.encode())


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
            return repr(found.tolist()).encode("utf-8", "surrogatepass")
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
