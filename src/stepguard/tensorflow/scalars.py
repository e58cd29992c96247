"""The numbers that the NaN guard looks at, by name: in results of runs, in summaries, in variables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

_v1 = tf.compat.v1

_NO_FLOATS = (np.bool_, np.integer, np.character, np.object_)


def of_run(fetches: Any, result: Any) -> dict[str, float]:
    """The scalar floats in ``result`` of ``session.run(fetches)``, by the names of their tensors."""
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
    """The scalars in a Summary proto, or in the bytes of one, by their tags. Histograms and images are ignored."""
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
    """Whether all numbers in an array of floats are finite."""
    array = np.asarray(array)
    if array.dtype.kind == "c":
        array = array.reshape(-1).view(array.real.dtype)
    if not array.size:
        return True
    with np.errstate(invalid="ignore"):
        # Two passes and no copy of the array. If any number is NaN, then minimum and maximum are NaN.
        return math.isfinite(float(array.min())) and math.isfinite(float(array.max()))


def _as_number(value: Any) -> float | None:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, float):
        return value
    if isinstance(value, complex):
        return abs(value)
    # Scalars such as bfloat16 are NumPy's, and not Python floats.
    if isinstance(value, np.generic) and not isinstance(value, _NO_FLOATS):
        return abs(complex(value)) if isinstance(value, np.complexfloating) else float(value)
    return None
