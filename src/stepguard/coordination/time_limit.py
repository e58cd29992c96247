"""The end of a run's time: the run is asked to stop early enough that its last step is saved by then.

The protocol: one thread waits for the stop flag, in short waits, because the time to keep free becomes known only while
the run trains, and the wall clock may be set. It ends with the run, whose end sets the flag too. It holds no lock, and
a kill leaves nothing of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from stepguard.coordination.coordinator import Coordinator
from stepguard.stops import TIME_LIMIT
from stepguard.words import duration, logger

_log = logger(__name__)

_LOOK_SECS = 5.0
# What is kept free before any save was measured, and at most in any case: a run that saves for longer than it trains
# would otherwise stop before its first step, at each start.
_SHARE_UNMEASURED = 0.1
_MOST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """The time of one session.

    Args:
        after_secs: how long the session may last, from :meth:`start` on; ``None`` sets no limit.
        ends_at: the end by the wall clock, in Unix seconds; ``None`` sets no limit.
        stop_secs: how many seconds a stop takes, with the save of the last step, as measured so far; ``None`` if
            nothing was measured.
        grace_secs: how long a stop may take.
    """

    after_secs: float | None
    ends_at: float | None
    stop_secs: Callable[[], float | None]
    grace_secs: float

    def start(self, coord: Coordinator) -> None:
        """Have ``coord`` asked to stop in time, from a thread that ends with the run. Does nothing without a limit."""
        if self.after_secs is None and self.ends_at is None:
            return
        began = time.monotonic()
        total_secs = self._left_secs(began)

        def limit() -> None:
            while (left := self._left_secs(began) - self.kept_free_secs(total_secs)) > 0:
                if coord.wait_for_stop(min(left, _LOOK_SECS)):
                    return
            if not coord.stop_requested:
                left_secs = self._left_secs(began)
                end = f"ends in {duration(left_secs)}" if left_secs > 0 else "is over"
                _log.warning("the time of this run %s: stopping at the next step boundary", end)
                coord.ask_stop(TIME_LIMIT)

        threading.Thread(target=limit, name="stepguard-time-limit", daemon=True).start()

    def kept_free_secs(self, total_secs: float) -> float:
        """The seconds of ``total_secs`` that are kept free for the stop."""
        measured = self.stop_secs()
        if measured is None:
            return max(0.0, min(self.grace_secs, total_secs * _SHARE_UNMEASURED))
        return max(0.0, min(measured, total_secs * _MOST_SHARE))

    def _left_secs(self, began: float) -> float:
        lefts = []
        if self.after_secs is not None:
            lefts.append(began + self.after_secs - time.monotonic())
        if self.ends_at is not None:
            lefts.append(self.ends_at - time.time())
        return min(lefts)
