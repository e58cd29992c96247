"""The numbers that a program reports: summaries and metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def as_numbers(values: Any, where: str) -> dict[str, float]:
    """Convert numbers, and tensors of one element, to floats. This waits for those that are still computed.

    A curve has a text for its name, also in the trace and in messages.

    Raises:
        TypeError: ``values``, given to ``where``, is no mapping, or a value is no number; the message names its curve.
    """
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{where}: expected numbers by the names of their curves, found {type(values).__name__}: {values!r:.80}"
        )
    return {str(tag): _as_number(tag, value, where) for tag, value in values.items()}


def _as_number(tag: object, value: Any, where: str) -> float:
    shape = getattr(value, "shape", ())
    if math.prod(shape) != 1:
        raise TypeError(
            f"{where}: expected a number for the curve {tag!r}, found a tensor of shape {list(shape)}; take its "
            f"mean, say"
        )
    try:
        plain: Any = value.item() if hasattr(value, "item") else value
        if isinstance(plain, (str, bytes)):
            raise TypeError("a text, of which Python would make a number")
        return float(plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(
            f"{where}: expected a number for the curve {tag!r}, found {type(value).__name__}: {value!r:.80}"
        ) from error
