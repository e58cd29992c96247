"""The numbers in what TensorFlow returns, by name, for the NaN guard: results of runs, summaries, variables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

_v1 = tf.compat.v1

_NO_FLOATS = (np.bool_, np.integer, np.character, np.object_)


def of_run(fetches: Any, result: Any) -> dict[str, float]:
    """The scalar floats that ``session.run(fetches)`` has returned, by the names of their tensors."""
    found: dict[str, float] = {}
    _collect(fetches, result, found)
    return found


def _collect(fetches: Any, result: Any, found: dict[str, float]) -> None:
    if isinstance(result, dict):
        for key, value in result.items():
            _collect(fetches[key] if isinstance(fetches, dict) else key, value, found)
    elif isinstance(result, (list, tuple)):
        parts = (
            fetches if isinstance(fetches, (list, tuple)) and len(fetches) == len(result) else [fetches] * len(result)
        )
        for part, value in zip(parts, result, strict=True):
            _collect(part, value, found)
    else:
        number = _as_number(result)
        if number is not None:
            found[str(getattr(fetches, "name", fetches))] = number


def of_summary(summary: Any) -> dict[str, float]:
    """The scalars in a Summary proto, or one serialised, by their tags; of its histograms and images nothing."""
    proto = _v1.Summary.FromString(summary) if isinstance(summary, bytes) else summary
    found: dict[str, float] = {}
    for value in proto.value:
        if value.HasField("simple_value"):
            found[value.tag] = value.simple_value
        elif value.HasField("tensor") and tf.DType(value.tensor.dtype).is_floating:
            array = tf.make_ndarray(value.tensor)
            if array.size == 1:
                found[value.tag] = float(array.reshape(()))
    return found


def is_finite(array: Any) -> bool:
    """Whether all numbers of an array of floats are."""
    array = np.asarray(array)
    if array.dtype.kind == "c":
        array = array.reshape(-1).view(array.real.dtype)
    if not array.size:
        return True
    with np.errstate(invalid="ignore"):
        # One pass each, and no copy of the state: both ends are NaN where anything is.
        return math.isfinite(float(array.min())) and math.isfinite(float(array.max()))


def _as_number(value: Any) -> float | None:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, float):
        return value
    if isinstance(value, complex):
        return abs(value)
    # bfloat16 and its kin are scalars of NumPy, and no floats of Python.
    if isinstance(value, np.generic) and not isinstance(value, _NO_FLOATS):
        return abs(complex(value)) if isinstance(value, np.complexfloating) else float(value)
    return None
