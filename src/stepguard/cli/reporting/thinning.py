"""Bounded pictures of long series: what a chart shows of a million points, and what is kept while they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Sample(Generic[T]):
    """Items of a series, in its order and at even distances: all of a short one, ``most`` of a long one at most.

    The last item is always among them. ``count`` is the number of all items.
    """

    def __init__(self, most: int) -> None:
        self.count = 0
        self._most = most
        self._distance = 1
        self._kept: list[T] = []
        self._last: list[T] = []

    def add(self, item: T) -> None:
        """Add the next item of the series."""
        if self.count % self._distance == 0:
            self._kept.append(item)
            if len(self._kept) >= self._most:
                self._kept = self._kept[::2]
                self._distance *= 2
            self._last = []
        else:
            self._last = [item]
        self.count += 1

    def items(self) -> list[T]:
        """The items that were kept."""
        return [*self._kept, *self._last]


def shown_of(values: Sequence[float], most: int) -> list[int]:
    """The indexes of those values that a chart of about ``most`` points needs, in their order.

    Of each stretch of a long series these are the smallest, the largest and one that is not finite, so that no spike
    and no gap is lost. The first and the last value are always among them.
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    found = {0, count - 1}
    stretches = max(1, most // 3)
    for number in range(stretches):
        stretch = range(number * count // stretches, (number + 1) * count // stretches)
        finite = [one for one in stretch if math.isfinite(values[one])]
        if finite:
            found |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < len(stretch):
            found.add(next(one for one in stretch if not math.isfinite(values[one])))
    return sorted(found)
