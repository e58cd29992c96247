"""Statistics of one tensor, and of the difference between two. NumPy is loaded when it is first used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Values that are widened to float64 at a time: one block stays in the cache, and a tensor of any size fits in memory.
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of the values that are not NaN; for complex numbers, of their magnitudes. None for strings, and where
    there are no values.
    """

    minimum: int | float | None
    maximum: int | float | None
    mean: float | None
    nan: int
    inf: int


@dataclass(frozen=True, slots=True)
class Difference:
    """``changed`` elements of ``count`` differ; a NaN equals a NaN.

    ``absolute`` is the largest difference, ``relative`` the largest by the larger of the two magnitudes; "nan" if one
    of two values is NaN, None for strings.
    """

    changed: int
    count: int
    absolute: int | float | None
    relative: float | None


def describe(array: Any) -> Statistics:
    """The statistics of an array."""
    import numpy as np

    if array.dtype.kind not in "biufc" or array.size == 0:
        return Statistics(None, None, None, 0, 0)
    lows, highs, total, counted, nan, inf = [], [], 0.0, 0, 0, 0
    for (block,) in _blocks(array):
        if block.dtype.kind == "c":
            block = np.abs(block)
        if block.dtype.kind == "f":
            block = block.astype(np.float64)
            missing = np.isnan(block)
            inf += int(np.isinf(block).sum())
            nan += int(missing.sum())
            block = block[~missing]
        if block.size:
            lows.append(block.min().item())
            highs.append(block.max().item())
            with np.errstate(invalid="ignore"):  # the mean of inf and -inf is NaN
                total += float(block.sum(dtype=np.float64))
            counted += block.size
    if not counted:
        return Statistics(None, None, None, nan, inf)
    return Statistics(_number(min(lows)), _number(max(highs)), total / counted, nan, inf)


def compare(one: Any, other: Any) -> Difference:
    """The difference between two arrays of one shape."""
    import numpy as np

    changed, absolute, relative = 0, [], []
    for left, right in _blocks(one, other):
        if left.dtype.kind not in "biufc" or right.dtype.kind not in "biufc":
            changed += sum(a != b for a, b in zip(left.tolist(), right.tolist(), strict=True))
            continue
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            same = (left == right) | ((left != left) & (right != right))
            left, right = left[~same], right[~same]
            if not left.size:
                continue
            changed += left.size
            distance = _distance(left, right)
            absolute.append(distance.max().item())  # NaN wherever there is one
            scale = np.maximum(_magnitude(left), _magnitude(right))
            # Two finite values may differ by more than a float can hold; between infinite ones nothing is relative.
            relative.append((distance.astype(np.float64) / scale).max().item())
    if not absolute:
        return Difference(changed, one.size, 0 if not changed else None, 0.0 if not changed else None)
    return Difference(changed, one.size, _largest(absolute), _largest(relative))


def _blocks(*arrays: Any) -> Iterator[tuple[Any, ...]]:
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, _BLOCK):
        yield tuple(one[start : start + _BLOCK] for one in flat)


def _distance(left: Any, right: Any) -> Any:
    import numpy as np

    if left.dtype.kind == "b" or right.dtype.kind == "b":
        return (left.astype(np.float64) - right.astype(np.float64)).__abs__()
    if left.dtype.kind in "iu" and left.dtype == right.dtype:
        # The difference of two integers of 64 bits fits into an unsigned one, and into nothing that is signed.
        wide = np.uint64 if left.dtype.kind == "u" else np.int64
        high, low = np.maximum(left, right).astype(wide), np.minimum(left, right).astype(wide)
        return high.view(np.uint64) - low.view(np.uint64)
    wide = np.complex128 if "c" in (left.dtype.kind, right.dtype.kind) else np.float64
    return np.abs(left.astype(wide) - right.astype(wide))


def _magnitude(array: Any) -> Any:
    import numpy as np

    return np.abs(array if array.dtype.kind == "c" else array.astype(np.float64))


def _largest(values: list[Any]) -> Any:
    return next((one for one in values if one != one), None) or max(values)


def _number(value: float) -> int | float:
    return int(value) if isinstance(value, bool) else value
