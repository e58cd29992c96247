"""Values as JSON: the random states and positions of a process, which Orbax's format has no place for.

JSON has no tuples, bytes, arrays or keys that are no text; they stand as objects with one key, which begins with "%".
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping
from typing import Any

from stepguard.disk import schema


def to_json(values: Any) -> bytes:
    """The values as JSON. Raises TypeError for what is neither a plain value nor a NumPy array of numbers."""
    return json.dumps(_coded(values)).encode()


def from_json(content: bytes) -> Any:
    """The values that `to_json` was given; no code from ``content`` is run. Raises ValueError: its form is another."""
    try:
        return _decoded(json.loads(content))
    except schema.WRONG as error:
        raise ValueError(f"the form is unknown: {error}") from error


def _coded(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("%") for key in value):
            return {key: _coded(part) for key, part in value.items()}
        return {"%dict": [[_coded(key), _coded(part)] for key, part in value.items()]}
    if isinstance(value, tuple):
        return {"%tuple": [_coded(part) for part in value]}
    if isinstance(value, list):
        return [_coded(part) for part in value]
    if isinstance(value, (bytes, bytearray)):
        return {"%bytes": base64.b64encode(value).decode()}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype.kind in "biufc":
        return {"%array": [value.dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]}
    raise TypeError(f"expected plain values and arrays, found a {type(value).__name__}: {value!r:.80}")


def _decoded(document: Any) -> Any:
    if isinstance(document, list):
        return [_decoded(part) for part in document]
    if not isinstance(document, dict):
        return document
    if len(document) != 1 or not next(iter(document)).startswith("%"):
        return {key: _decoded(part) for key, part in document.items()}
    ((kind, content),) = document.items()
    if kind == "%tuple":
        return tuple(_decoded(part) for part in content)
    if kind == "%bytes":
        return base64.b64decode(content)
    if kind == "%dict":
        return {_decoded(key): _decoded(part) for key, part in content}
    if kind != "%array":
        raise ValueError(f"expected a value, found {kind!r:.80}")
    import numpy as np

    dtype, shape, encoded = content
    if np.dtype(dtype).kind not in "biufc":
        raise ValueError(f"expected an array of numbers, found {dtype!r:.80}")
    return np.frombuffer(bytearray(base64.b64decode(encoded)), np.dtype(dtype)).reshape(shape)
