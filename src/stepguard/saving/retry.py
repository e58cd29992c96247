"""The retry policy: when a failed save is tried again, and when it is given up."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TypeAlias

Retry: TypeAlias = Callable[[int, float], "float | None"]
"""``retry(tries, failing_secs)`` returns the seconds to wait after that many failed tries; ``None`` gives up."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits twice as long after each failed try, up to ``longest_secs``; gives up after ``max_secs`` without success.

    Each wait is multiplied by ``draw(low, high)``, so that many runs on one failing file system do not all retry at the
    same moment.
    """

    max_secs: float
    _: KW_ONLY
    first_secs: float = 1.0
    longest_secs: float = 60.0
    # A separate generator: drawing from the program's would change its next draws.
    draw: Callable[[float, float], float] = random.Random().uniform

    def __call__(self, tries: int, failing_secs: float) -> float | None:
        """Return the seconds to wait after ``tries`` failed tries; the first began ``failing_secs`` ago."""
        if failing_secs >= self.max_secs:
            return None
        # The exponent is bounded, so that a month of retries does not overflow a float.
        return min(self.first_secs * 2.0 ** min(tries - 1, 64), self.longest_secs) * self.draw(0.75, 1.25)
