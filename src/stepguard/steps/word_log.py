"""A broadcast log: one list of words in the common store, which all processes read in the same order.

A word is written to the first free number, by one atomic request. If two processes speak at once, both words are heard,
one after the other. A listener waits for the next number by one request, and does not poll. A process that is killed
while it speaks has said its word completely or not at all.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stepguard.steps.common_store import CommonStore

# How many words are kept for slow listeners. Older words are deleted, because the store is in the memory of one process
# as long as the training lasts.
_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Word:
    """A message of one process to all. ``number`` is its unique place in the list."""

    number: int
    rank: int
    kind: str
    content: tuple[Any, ...]


class WordLog:
    """The list, as one process uses it. Any thread may call ``say``; one thread calls ``listen``."""

    def __init__(self, store: CommonStore, rank: int) -> None:
        self._store = store.below("word")
        self._rank = rank
        self._serial = itertools.count()
        # The number of the next word to hear; all words before it exist.
        self._next = 1

    def say(self, kind: str, *content: Any, unless_said: bool = False) -> int:
        """Say a word to all processes, this one included; return its number.

        With ``unless_said`` it is not said if another process has just said a word of the same kind.
        """
        mine = json.dumps([self._rank, next(self._serial), kind, *content]).encode()
        number = self._next
        while (said := self._store.claim(str(number), mine)) != mine:
            if unless_said and json.loads(said)[2] == kind:
                break
            number += 1
        return number

    def listen(self) -> Iterator[Word]:
        """All words, as they are said. Raises StoreLostError when the store ends."""
        while True:
            number = self._next
            self._store.wait([str(number)])
            rank, _, kind, *content = json.loads(self._store.get([str(number)])[0])
            self._next = number + 1
            if self._rank == 0 and number > _KEPT:
                self._store.delete(str(number - _KEPT))
            yield Word(number, rank, kind, tuple(content))
