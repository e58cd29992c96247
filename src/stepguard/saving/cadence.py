"""The cadence: a checkpoint is due when the cost of the last one is a small part of the time since.

What a checkpoint costs is the time by which training came less far because of it. From the moment of the snapshot until
nothing is written or uploaded any more, and the step of that moment has ended::

    cost = seconds - steps * seconds of a quiet step

The stall of the snapshot is part of these seconds. A quiet step is one of the time in which nothing is written; its
length is the mean of many, without those that are far longer than the median. Time between loops and in evaluations
counts on neither side. A single cost is noisy, because steps are, and a chance event such as a slow batch may fall into
it; so what counts is the median of the last few. The stalls are known exactly: the cost is at least their median. They
alone count while no quiet step can be measured: each step has an evaluation, or only other processes do steps.

The protocol: a thread of its own looks several times a second and, when a checkpoint is due, saves it. A thread that
takes a snapshot, by this cadence or for another reason, calls :meth:`Cadence.took` inside the boundary; the writer's
thread calls :meth:`Cadence.wrote`. Each of them changes the account under one lock, which nobody holds while it waits
for something, so no circle of waits exists. All of this is memory of one process: a kill leaves nothing behind.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from stepguard.engine import StepsDone
from stepguard.options import Saving

LOOK_SECS = 0.2
"""How often the cadence is to look."""

_DAY_SECS = 86_400.0
# Quiet steps: of so many looks, at least so many, and without those that are so many times longer than the median.
_QUIET_LOOKS = 64
_LEAST_QUIET_LOOKS = 3
_FAR_LONGER = 4.0
# A baseline older than this says nothing about the present steps.
_STALE_SECS = 600.0
# After a write there is a quiet time of at least this part of it, or there would be nothing to compare with.
_QUIET_PART = 0.1
_COSTS = 5
_REPORTED = 16
# After a save that was due and could not be made, the next try comes after this time, then after twice that, and so on.
_FIRST_PAUSE_SECS = 5.0
_LONGEST_PAUSE_SECS = 600.0


@dataclass(frozen=True, slots=True)
class CadenceReport:
    """What the cadence has come to, over the last checkpoints.

    Args:
        overhead: the part of the time that they may cost.
        interval_secs: the mean time from one to the next.
        cost: the part of the time that they have cost.
        bytes_per_day: what they write in a day, at this rate.
    """

    overhead: float
    interval_secs: float
    cost: float
    bytes_per_day: float


@dataclass(slots=True)
class _Window:
    """The time in which a checkpoint may slow the steps; ``secs`` and ``steps`` are those of it that were seen."""

    taken_at: float
    stall_secs: float
    secs: float = 0.0
    steps: int = 0
    # Since when nothing is written.
    idle_at: float | None = None


@dataclass(slots=True)
class _Paid:
    """One checkpoint: when it was taken, the seconds that count as its cost, and the bytes written for it."""

    taken_at: float
    cost_secs: float
    nbytes: int


class Cadence:
    """Measures what checkpoints cost, and says when the next one is due.

    Args:
        options: its ``overhead`` is set.
        clock: returns monotonic seconds; for tests.
    """

    def __init__(self, options: Saving, *, clock: Callable[[], float] = time.monotonic) -> None:
        assert options.overhead is not None
        self._overhead = options.overhead
        self._least_secs = options.min_interval_secs
        self._most_secs = math.inf if options.max_interval_secs is None else options.max_interval_secs
        self._bytes_per_day = math.inf if options.max_bytes_per_day is None else options.max_bytes_per_day
        self._clock = clock
        self._lock = threading.Lock()
        self._is_shared = False
        # When the last snapshot was taken, and how far the session was.
        self._taken_at = clock()
        self._taken: StepsDone | None = None
        self._window: _Window | None = None
        # What the session said at the last look, if the time since then may be counted.
        self._seen: StepsDone | None = None
        # Seconds and steps of the last quiet looks.
        self._quiet: deque[tuple[float, int]] = deque(maxlen=_QUIET_LOOKS)
        self._quiet_at = -math.inf
        # Since the end of the last window: when that was, how long it was, and how many looks were quiet.
        self._closed_at = self._taken_at
        self._window_secs = 0.0
        self._fresh_looks = 0
        self._costs: deque[float] = deque(maxlen=_COSTS)
        self._stalls: deque[float] = deque(maxlen=_COSTS)
        self._copied_secs = 0.0
        self._nbytes = 0
        self._paid: deque[_Paid] = deque(maxlen=_REPORTED)
        self._tells_steps = False
        self._paused_until = -math.inf
        self._pause_secs = _FIRST_PAUSE_SECS

    def begin(self, steps: StepsDone | None, *, is_shared: bool) -> None:
        """A session begins. ``is_shared`` says that other processes may train its model too."""
        with self._lock:
            self._taken_at, self._taken, self._is_shared = self._clock(), steps, is_shared
            self._window = self._seen = None

    # --- what the checkpoints tell ---

    def took(self, steps: StepsDone | None, stall_secs: float) -> None:
        """A snapshot was taken, for which training waited. Inside the boundary; any thread."""
        now = self._clock()
        with self._lock:
            if self._window is not None:
                # An upload that goes on: what it costs from now on counts for the new checkpoint.
                self._count(self._window, steps)
                self._close(self._window, now)
            if self._paid:
                self._paid[-1].cost_secs += self._copied_secs
            self._copied_secs = 0.0
            self._window = _Window(now, stall_secs)
            self._seen = self._taken = steps
            self._taken_at = now
            self._paused_until, self._pause_secs = -math.inf, _FIRST_PAUSE_SECS

    def copied(self, stall_secs: float) -> None:
        """The state was copied at the end of a loop, in case that it has to be saved. The thread of the loop."""
        with self._lock:
            self._copied_secs += stall_secs

    def wrote(self, nbytes: int) -> None:
        """A checkpoint was committed, for which so many bytes were written. Writer thread."""
        with self._lock:
            self._nbytes = nbytes

    def went_back(self) -> None:
        """The session was put back to an earlier step, which took time. At a boundary."""
        with self._lock:
            self._seen = None

    def failed(self) -> None:
        """A checkpoint that was due could not be taken: wait before the next try. The cadence's thread."""
        with self._lock:
            self._paused_until = self._clock() + self._pause_secs
            self._pause_secs = min(2 * self._pause_secs, _LONGEST_PAUSE_SECS)

    # --- what the cadence sees ---

    def look(self, steps: StepsDone | None, *, is_writing: bool, is_uploading: bool) -> bool:
        """Note how far the session is; return whether a checkpoint is due. The cadence's thread.

        The caller reads ``is_writing`` and ``is_uploading`` before ``steps``.
        """
        now = self._clock()
        with self._lock:
            self._tells_steps = steps is not None and steps.number > 0
            window = self._window
            if window is None:
                self._look_at_quiet(steps, now, is_quiet=not (is_writing or is_uploading))
            else:
                self._look_at_window(window, steps, now, is_busy=is_writing or is_uploading)
            return not is_writing and self._may_have_changed(steps) and self._is_due(steps, now, is_uploading)

    def _may_have_changed(self, steps: StepsDone | None) -> bool:
        return steps is None or self._is_shared or steps != self._taken

    def _look_at_quiet(self, steps: StepsDone | None, now: float, *, is_quiet: bool) -> None:
        if not is_quiet:
            self._seen = None
        elif (passed := self._passed(steps)) is not None:
            self._quiet.append(passed)
            self._quiet_at = now
            self._fresh_looks += 1

    def _look_at_window(self, window: _Window, steps: StepsDone | None, now: float, *, is_busy: bool) -> None:
        self._count(window, steps)
        if is_busy:
            window.idle_at = None
            return
        if window.idle_at is None:
            window.idle_at = now
        # The step that was under way at that time was slowed down too.
        if not self._tells_steps or (steps is not None and steps.ended_at >= window.idle_at):
            self._close(window, now)
        elif now - window.idle_at >= _STALE_SECS:
            # This process may do no more steps, while others train the model. If it does, this one is no quiet one.
            self._close(window, now)
            self._seen = None

    def _count(self, window: _Window, steps: StepsDone | None) -> None:
        passed = self._passed(steps)
        if passed is not None:
            window.secs += passed[0]
            window.steps += passed[1]

    def _passed(self, steps: StepsDone | None) -> tuple[float, int] | None:
        """Seconds and steps since the last look; ``None`` if no step has ended, or something else came between."""
        seen = self._seen
        if steps is not None and seen is not None and steps.number == seen.number and steps.pauses == seen.pauses:
            return None
        self._seen = steps
        # The first step also does much set-up, and nobody knows when it began.
        if steps is None or seen is None or seen.number == 0 or steps.pauses != seen.pauses:
            return None
        return steps.ended_at - seen.ended_at, steps.number - seen.number

    def _close(self, window: _Window, now: float) -> None:
        cost = self._measured(window)
        if cost is not None:
            self._costs.append(cost)
        self._stalls.append(window.stall_secs)
        self._paid.append(_Paid(window.taken_at, self._cost_secs() or 0.0, self._nbytes))
        self._window, self._closed_at, self._window_secs = None, now, now - window.taken_at
        self._fresh_looks = 0

    def _measured(self, window: _Window) -> float | None:
        """What a checkpoint has cost so far, in seconds; below zero by chance. ``None`` if that is not known."""
        step_secs = self._quiet_step_secs()
        if step_secs is None or not window.steps:
            return None
        return window.secs - window.steps * step_secs

    def _quiet_step_secs(self) -> float | None:
        if len(self._quiet) < _LEAST_QUIET_LOOKS:
            return None
        bound = _FAR_LONGER * statistics.median(secs / steps for secs, steps in self._quiet)
        usual = [(secs, steps) for secs, steps in self._quiet if secs <= bound * steps]
        return sum(secs for secs, _ in usual) / sum(steps for _, steps in usual)

    def _cost_secs(self) -> float | None:
        """The seconds that count as the cost of the last checkpoint; ``None`` before the first."""
        if not self._stalls:
            return None
        costs = self._costs or [0.0]
        # One of the first two may have met a chance event.
        cost_secs = statistics.median(costs) if len(costs) > 2 else min(costs)
        return max(statistics.median(self._stalls), cost_secs)

    # --- when the next one is due ---

    def _is_due(self, steps: StepsDone | None, now: float, is_uploading: bool) -> bool:
        since_secs = now - self._taken_at
        if now < self._paused_until or since_secs < self._least_secs:
            return False
        if since_secs >= self._most_secs:
            return True
        if since_secs < self._nbytes / self._bytes_per_day * _DAY_SECS or not self._has_baseline(
            steps, now, is_uploading
        ):
            return False
        cost_secs = self._cost_secs()
        if self._window is not None:
            # An upload goes on, and so does what it costs.
            cost_secs = max(cost_secs or 0.0, self._measured(self._window) or 0.0)
        # The first is due at once: what it costs is not known before.
        return (cost_secs or 0.0) + self._copied_secs <= self._overhead * since_secs

    def _has_baseline(self, steps: StepsDone | None, now: float, is_uploading: bool) -> bool:
        """Whether the quiet steps that the next checkpoint will be compared with are known, or cannot be."""
        if not self._tells_steps:
            return self._window is None
        is_known = len(self._quiet) >= _LEAST_QUIET_LOOKS
        if self._window is not None:
            return is_known and is_uploading and now - self._quiet_at < _STALE_SECS
        if now - self._closed_at < _QUIET_PART * self._window_secs:
            return False
        return (is_known and self._fresh_looks > 0) or self._is_without_quiet_steps(steps, now)

    def _is_without_quiet_steps(self, steps: StepsDone | None, now: float) -> bool:
        """Whether there was none for long, although enough steps were done, or none because others train the model."""
        done = 0 if steps is None or self._taken is None else steps.number - self._taken.number
        is_long = now - max(self._taken_at, self._quiet_at) >= _STALE_SECS
        # Steps of many minutes are quiet ones in the end.
        return is_long and not 0 < done < 2 * _LEAST_QUIET_LOOKS

    @property
    def is_overdue(self) -> bool:
        """Whether the last snapshot is older than ``max_interval_secs``. Any thread."""
        return self._clock() - self._taken_at >= self._most_secs

    @property
    def exceeded_bytes_per_day(self) -> float | None:
        """What is written in a day at ``max_interval_secs``, if that is more than ``max_bytes_per_day``. Any thread."""
        with self._lock:
            written = self._nbytes / self._most_secs * _DAY_SECS
            return written if written > self._bytes_per_day else None

    @property
    def report(self) -> CadenceReport | None:
        """What it has come to; ``None`` before the second checkpoint. Any thread."""
        with self._lock:
            paid = list(self._paid)
        if len(paid) < 2:
            return None
        # The time from one checkpoint to the next pays for the first of the two.
        secs = max(paid[-1].taken_at - paid[0].taken_at, 1e-9)
        cost_secs = sum(one.cost_secs for one in paid[:-1])
        nbytes = sum(one.nbytes for one in paid[:-1])
        return CadenceReport(self._overhead, secs / (len(paid) - 1), cost_secs / secs, nbytes / secs * _DAY_SECS)
