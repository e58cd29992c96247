"""Lists that a sampler shuffles in place, so that the order of an epoch depends on the epochs before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_PLAIN = (bool, int, float, str, bytes)


class ShuffledLists:
    """The lists of plain values that ``objects`` hold. Only those that have changed since the start are saved."""

    def __init__(self, objects: Iterable[Any]) -> None:
        found = [value for one in objects for value in getattr(one, "__dict__", {}).values()]
        self._lists: list[list[Any]] = [value for value in found if type(value) is list and _is_plain(value)]
        self._digests = [_digest(one) for one in self._lists]

    def changed(self) -> dict[int, list[Any]]:
        """Copies of the lists that have changed, by their numbers."""
        return {number: list(one) for number, one in enumerate(self._lists) if _digest(one) != self._digests[number]}

    def restore(self, saved: Mapping[int, list[Any]]) -> None:
        """Give the lists their contents."""
        for number, content in saved.items():
            self._lists[number][:] = content


def _is_plain(values: list[Any]) -> bool:
    # A look at the first is enough: a list of batches has lists of numbers, and a data set's items are others.
    first = values[0] if values else None
    if isinstance(first, (list, tuple)):
        first = first[0] if first else None
    return isinstance(first, _PLAIN)


def _digest(values: list[Any]) -> int:
    try:
        return hash(tuple(values))
    except TypeError:
        return hash(repr(values))
