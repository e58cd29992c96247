"""Limits the time spent on copies of the state that may never be used."""

from __future__ import annotations

import time
from collections import deque

COPYING_SHARE = 1 / 20
"""At most this part of the time is spent on such copies, except for the first ones."""

# The first copies are free, so that a program of a few short loops has a copy of each.
_FREE_SECS = 0.2
# The cost of a copy is the least of this many, because on a busy machine any copy may have waited for the processor.
_REMEMBERED = 8
_UNFELT_SECS = 0.002


class CopyingBudget:
    """A budget of time for the copies at the ends of loops, so that many short loops stay fast. One thread."""

    def __init__(self, share: float = COPYING_SHARE) -> None:
        self._share = share
        self._left_secs = _FREE_SECS
        self._looked_at = time.monotonic()
        self._lasted: deque[float] = deque(maxlen=_REMEMBERED)

    def allows_one(self) -> bool:
        """Whether a copy may be taken now."""
        now = time.monotonic()
        self._left_secs = min(_FREE_SECS, self._left_secs + (now - self._looked_at) * self._share)
        self._looked_at = now
        return self._left_secs > 0

    @property
    def costs_nothing(self) -> bool:
        """Whether a copy is so short that no program feels it."""
        return bool(self._lasted) and min(self._lasted) < _UNFELT_SECS

    def spend(self, secs: float) -> None:
        """Record that a copy has taken ``secs``. The first copy, which also allocates its memory, is free."""
        self._lasted.append(secs)
        if len(self._lasted) > 1:
            self._left_secs -= min(self._lasted)
