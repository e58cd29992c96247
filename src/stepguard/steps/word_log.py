"""What is said to all processes: one list of words in their common store, which each of them reads in the same order.

A word is written to the first number that holds none, by one atomic request, so that two who speak at once are both
heard, one after the other. Who listens waits for the next number on the side of the store: nothing is asked while
nothing is said. A process that is killed while it speaks has said its word or not; there are no halves.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stepguard.steps.common_store import CommonStore

# How many words are left to those who are slow to listen. The others are taken away: the store is in the memory of one
# process, for as long as the training lasts.
_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Word:
    """What one process says to all. ``number`` is its place in the list, and belongs to no other."""

    number: int
    rank: int
    kind: str
    content: tuple[Any, ...]


class WordLog:
    """The list, as one process sees it. ``say`` is for any thread, ``listen`` for one."""

    def __init__(self, store: CommonStore, rank: int) -> None:
        self._store = store.below("word")
        self._rank = rank
        self._serial = itertools.count()
        # No word before it is missing.
        self._next = 1

    def say(self, kind: str, *content: Any, unless_said: bool = False) -> int:
        """Say it to all, this process included; its number.

        With ``unless_said`` it is not said where somebody was just quicker to say the same.
        """
        mine = json.dumps([self._rank, next(self._serial), kind, *content]).encode()
        number = self._next
        while (said := self._store.claim(str(number), mine)) != mine:
            if unless_said and json.loads(said)[2] == kind:
                break
            number += 1
        return number

    def listen(self) -> Iterator[Word]:
        """All words, as they are said. Ends with the store: raises StoreLostError."""
        while True:
            number = self._next
            self._store.wait([str(number)])
            rank, _, kind, *content = json.loads(self._store.get([str(number)])[0])
            self._next = number + 1
            if self._rank == 0 and number > _KEPT:
                self._store.delete(str(number - _KEPT))
            yield Word(number, rank, kind, tuple(content))
