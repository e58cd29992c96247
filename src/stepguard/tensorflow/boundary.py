"""Where one step ends and the next has not begun, when several threads run steps of one session."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from time import monotonic
from typing import Any

from stepguard.errors import NoBoundaryError, StopRequested
from stepguard.tensorflow.run_effects import RunKinds, describe

# How long a boundary may keep the next step waiting before it exists. Longer runs than this raise the bound (see
# `_patience`), so that only a run that waits for another run of ours is ever given up on.
_PATIENCE_SECS = 5.0
_LONGEST_PATIENCE_SECS = 60.0
# What is left of a step's length after each later step: after 25 of them a tenth.
_FADING = 0.91


class Boundary:
    """Tells the runs of a session that change its saved state from all others, and finds the moments between them.

    ``enter`` and ``leave`` are called around every step, by any thread. ``hold`` is called by a service: it keeps new
    steps waiting until those that run have ended, and as long as its block lasts.

    A run may wait for another one, as each step of synchronous training waits for the run of its queue runner that
    applies the gradients. That one comes in by ``enter_for_others``: while a holder still waits for a step, it passes,
    for the step may be waiting for it; when no step is under way any more, nobody is, and it waits like all others.

    A step that nobody holds up takes no lock. It announces itself and then looks for a holder; a holder announces
    itself and then looks for steps: whichever comes second sees the other.
    """

    def __init__(self, kinds: RunKinds) -> None:
        self.is_step = kinds.changes_state
        # Set once, by any thread: no step begins after it, but in a main thread that knows, and ends in its own way.
        self.must_stop = False
        self._main_thread_was_told: Callable[[], bool] = lambda: False
        # The steps that run now: thread -> (what it fetches, when it began).
        self._running: dict[int, tuple[Any, float]] = {}
        # Steps done: thread -> number. Each thread writes its own, so that none is lost.
        self._done: dict[int, int] = {}
        self._longest_secs = 0.0
        self._usual_secs = 0.0
        self._condition = threading.Condition(threading.Lock())
        self._hold: _Hold | None = None
        self._on_due: Callable[[], int] | None = None
        self._due_at = 0

    @property
    def steps(self) -> int:
        """The number of runs that may have changed the saved state, so far."""
        return sum(list(self._done.values()))

    @property
    def usual_secs(self) -> float:
        """The length of the longest of the last steps, in seconds: the first ones, which also prepare much, fade."""
        return self._usual_secs

    def enter(self, fetches: Any) -> None:
        """A step begins: wait while a service holds the boundary.

        Raises:
            StopRequested: the run is to stop at this boundary.
        """
        if self.must_stop:
            self._stop_before(fetches)
        thread = get_ident()
        self._running[thread] = (fetches, monotonic())
        if self._hold is not None:
            self._wait_for_holder(thread, fetches)

    def enter_for_others(self, fetches: Any) -> None:
        """A step begins that one under way may be waiting for: it waits for a holder only when that has its boundary.

        Nor is it stopped: without it the other would not come to its end.
        """
        thread = get_ident()
        self._running[thread] = (fetches, monotonic())
        if self._hold is not None:
            self._wait_for_holder(thread, fetches, is_needed=True)

    @property
    def is_busy(self) -> bool:
        """Whether another thread is in a step."""
        return bool(self._running_elsewhere(get_ident()))

    def pass_by(self, fetches: Any) -> None:
        """A run that is no step begins: nothing holds it up, but the main thread is told to stop here too.

        A loop that only reads, of an evaluator for example, would never come to a step.

        Raises:
            StopRequested: the run is to stop, and this is the main thread.
        """
        if self.must_stop and threading.current_thread() is threading.main_thread():
            self._stop_before(fetches)

    def stop(self, main_thread_was_told: Callable[[], bool]) -> None:
        """Let no step begin, and nothing in the main thread, unless that was told to stop and ends by itself."""
        self._main_thread_was_told = main_thread_was_told
        self.must_stop = True

    def _stop_before(self, fetches: Any) -> None:
        if threading.current_thread() is threading.main_thread() and self._main_thread_was_told():
            return
        raise StopRequested(f"the run was asked to stop, and does at this boundary, before {describe(fetches)}")

    def leave(self) -> None:
        """The step of this thread has ended."""
        thread = get_ident()
        # Counted first: who finds no step under way must find this one among those done.
        self._done[thread] = self._done.get(thread, 0) + 1
        announced = self._running.pop(thread, None)
        # Nothing is there when a run inside this one, in the same thread, has left already.
        if announced is not None:
            secs = monotonic() - announced[1]
            self._longest_secs = max(self._longest_secs, secs)
            self._usual_secs = max(_FADING * self._usual_secs, secs)
        if self._hold is not None:
            with self._condition:
                self._condition.notify_all()
        if self._on_due is not None:
            self._call_if_due(self._on_due)

    def _wait_for_holder(self, thread: int, fetches: Any, *, is_needed: bool = False) -> None:
        with self._condition:
            while (hold := self._hold) is not None and hold.thread != thread:
                if is_needed and not hold.is_granted and self._running_elsewhere(thread):
                    return
                remaining = hold.until - monotonic()
                if remaining <= 0:
                    return
                self._running.pop(thread, None)
                self._condition.notify_all()
                self._condition.wait(None if remaining == math.inf else remaining)
                # Announced while the lock is held: the next holder needs it to announce itself.
                self._running[thread] = (fetches, monotonic())

    def _call_if_due(self, callback: Callable[[], int]) -> None:
        with self._condition:
            is_due = self.steps >= self._due_at
            if is_due:
                # Until the callback has said when it is due again, it is not.
                self._due_at = sys.maxsize
        if is_due:
            steps = 1
            try:
                steps = callback()
            finally:
                self._due_at = self.steps + max(1, steps)

    def call_after_steps(self, steps: int, callback: Callable[[], int]) -> None:
        """Call ``callback`` after ``steps`` more steps, between two of them; it returns the number until the next."""
        self._due_at = self.steps + max(1, steps)
        self._on_due = callback

    @contextmanager
    def hold(self, what: str, *, patience_secs: float | None = None, at_most_secs: float = math.inf) -> Iterator[None]:
        """Keep steps from starting; the block runs when none is under way.

        The steps that run now have a multiple of the longest step seen to end, so that only one is given up on that
        waits for something, usually for another step; and never more than ``patience_secs``. After ``at_most_secs``
        inside the block steps go on in spite of it: for a block that may itself wait for what only a step provides.

        Raises:
            NoBoundaryError: the steps did not end in time; new ones go on.
        """
        longest_secs = _LONGEST_PATIENCE_SECS if patience_secs is None else patience_secs
        patience_secs = min(max(_PATIENCE_SECS, 3 * self._longest_secs), longest_secs)
        mine = _Hold(get_ident())
        try:
            self._wait_for_no_step(mine, what, patience_secs)
            with self._condition:
                mine.until = monotonic() + at_most_secs
                # The steps that wait for this hold wait from now on no longer than it may last.
                self._condition.notify_all()
            yield
        finally:
            # Also when Ctrl-C interrupts the wait: a hold that nobody ends would stop all training.
            with self._condition:
                if self._hold is mine:
                    self._hold = None
                    self._condition.notify_all()

    def _wait_for_no_step(self, mine: _Hold, what: str, patience_secs: float) -> None:
        deadline = monotonic() + patience_secs
        with self._condition:
            while self._hold is not None and self._hold.thread != mine.thread:
                remaining = min(deadline, self._hold.until) - monotonic()
                if monotonic() >= deadline:
                    raise NoBoundaryError(f"no step boundary for {what}: another service has held it all the time")
                if remaining <= 0:
                    break
                self._condition.wait(remaining)
            self._hold = mine
            while others := self._running_elsewhere(mine.thread):
                remaining = deadline - monotonic()
                if remaining <= 0:
                    break
                self._condition.wait(min(remaining, threading.TIMEOUT_MAX))
            else:
                mine.is_granted = True
                return
        fetches, began = min(others, key=lambda step: step[1])
        raise NoBoundaryError(
            f"no step boundary for {what}: the run of {describe(fetches)} has been under way for "
            f"{monotonic() - began:.1f} s (waited {patience_secs:.1f} s for it); if it waits for another run that "
            f"changes the model, split the two, or feed it from a thread that only fills a queue"
        )

    def _running_elsewhere(self, me: int) -> list[tuple[Any, float]]:
        # A thread that asks for a boundary is not inside a step, whatever an interrupted `leave` left behind.
        return [step for thread, step in list(self._running.items()) if thread != me]


class _Hold:
    """Who keeps the steps waiting, until when, and whether the last of them has ended."""

    __slots__ = ("is_granted", "thread", "until")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.until = math.inf
        self.is_granted = False
