"""How often a copy of the state may be taken that perhaps nobody will ask for."""

from __future__ import annotations

import time
from collections import deque

# At most one part in so many of the time goes into such copies ...
_SHARE = 20
# ... but for the first ones, so that a program of a few short loops has one of each.
_FREE_SECS = 0.2
# The least of so many is what a copy costs: on a busy machine any of them may have waited for the processor.
_REMEMBERED = 8


class CopyingBudget:
    """A program of many short loops must not feel that each of them ends with a copy. One thread."""

    def __init__(self) -> None:
        self._left_secs = _FREE_SECS
        self._looked_at = time.monotonic()
        self._lasted: deque[float] = deque(maxlen=_REMEMBERED)

    def allows_one(self) -> bool:
        """Whether a copy may be taken now."""
        now = time.monotonic()
        self._left_secs = min(_FREE_SECS, self._left_secs + (now - self._looked_at) / _SHARE)
        self._looked_at = now
        return self._left_secs > 0

    def spend(self, secs: float) -> None:
        """One was taken, which has lasted so long. The first, which takes its memory too, is free."""
        self._lasted.append(secs)
        if len(self._lasted) > 1:
            self._left_secs -= min(self._lasted)
