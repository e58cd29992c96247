"""When a crashed program is started again: back-off, crash loops, and the limit on restarts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

SAME_FAILURES = 3
"""How many starts in a row without progress, all ended by the same crash, are a crash loop."""

# Addresses, process ids, steps, times and sizes differ between two crashes for the same reason.
_CHANGING = re.compile(r"0x[0-9a-fA-F]+|\d+")


@dataclass(frozen=True, slots=True)
class Crash:
    """How a program ended: its exit code or signal in words, and the line that best tells why ("" if there is none)."""

    ending: str
    line: str

    def is_same(self, other: Crash) -> bool:
        """Whether this is the same crash again. After a signal the lines, which may be unrelated, do not count."""
        if self.ending != other.ending or self.ending.startswith("SIG"):
            return self.ending == other.ending
        return _CHANGING.sub("#", self.line) == _CHANGING.sub("#", other.line)

    def __str__(self) -> str:
        return f"{self.ending}: {self.line}" if self.line else self.ending


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the program again after ``delay_secs``; ``number`` counts the restarts from 1."""

    number: int
    delay_secs: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Do not start the program again, for this ``reason``."""

    reason: str


CRASH_LOOP = GiveUp("crash loop")
NO_RESTARTS_LEFT = GiveUp("no restarts left")


class Restarts:
    """Decides after each crash. The delay is doubled by each start without progress, up to ``longest_delay_secs``, and
    then shortened by up to a half at random, so that many runs that failed together do not start together.
    """

    def __init__(
        self,
        *,
        most: int,
        first_delay_secs: float,
        longest_delay_secs: float,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.done = 0
        self._most = most
        self._first_delay_secs = first_delay_secs
        self._longest_delay_secs = longest_delay_secs
        self._uniform = uniform
        self._without_progress = 0
        self._same = 0
        self._last: Crash | None = None

    @property
    def same_failures(self) -> int:
        """How many starts in a row have ended in the same way, without progress; 0 if the last one made progress."""
        return self._same

    def after(self, failure: Crash, *, has_progressed: bool) -> Restart | GiveUp:
        """What to do after a crash."""
        if has_progressed:
            self._without_progress = self._same = 0
        else:
            self._without_progress += 1
            self._same = self._same + 1 if self._last is not None and failure.is_same(self._last) else 1
        self._last = None if has_progressed else failure
        if self._same >= SAME_FAILURES:
            return CRASH_LOOP
        if self.done >= self._most:
            return NO_RESTARTS_LEFT
        self.done += 1
        # Bounded, because 2.0**1024 overflows.
        doublings = min(max(0, self._without_progress - 1), 60)
        delay_secs = min(self._longest_delay_secs, self._first_delay_secs * 2.0**doublings)
        return Restart(self.done, delay_secs * self._uniform(0.5, 1.0))
