"""The step boundary of a session whose steps several threads run: the moment when no step is under way.

The protocol: a thread that runs steps announces each step in ``_running`` and then reads ``_hold``. A holder (a service
that wants a boundary) sets ``_hold`` and then reads ``_running``. Whichever thread comes second sees the other, so a
step that meets no holder takes no lock. A step that meets a holder withdraws its announcement and waits on
``_condition`` until the hold ends; it announces itself again while it has the lock, which the next holder needs to set
``_hold``. A holder waits on the same condition until all other threads have left their steps; ``leave`` notifies it.
Several holders take turns, also on this condition.

No deadlock is possible. Every wait of a holder has a deadline, after which it raises NoBoundaryError and lets the steps
go on. A step waits only as long as a hold lasts: ``hold`` ends it in a ``finally``, and a block that may itself need a
step limits the hold by ``at_most_secs``. A run that another step may be waiting for passes a holder that still waits
for that step (``enter_for_others``). The block and the callback run without the lock. Nothing here is on disk: a kill
leaves nothing behind.
"""

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

# How long new steps wait for a holder that has no boundary yet. `hold` raises this bound to a multiple of the longest
# step seen, so that the holder gives up only on a run that waits for another run.
_PATIENCE_SECS = 5.0
_LONGEST_PATIENCE_SECS = 60.0
# The factor by which each later step shrinks the recorded length of a long step: after 25 steps a tenth is left.
_FADING = 0.91
_NONE_DONE = (0, 0.0)


class Boundary:
    """Knows which runs of a session are steps (they can change the saved state), and finds the moments between them.

    Any thread calls ``enter`` and ``leave`` around each of its steps. A service calls ``hold``: new steps wait while
    the running ones end and while the block of ``hold`` lasts.

    A step may wait for another run. In synchronous training each step waits for the queue runner's run that applies
    the gradients. That run calls ``enter_for_others``: it passes a holder that still waits for a step, because that
    step may be waiting for this run. Once no step is under way, no step needs this run, and it waits as steps do.
    """

    def __init__(self, kinds: RunKinds) -> None:
        self.is_step = kinds.changes_state
        # Set once, by any thread. No step begins after that. Exception: a main thread that has already seen
        # should_stop() return true may run further steps to finish.
        self.must_stop = False
        self._main_thread_was_told: Callable[[], bool] = lambda: False
        # The steps under way: thread -> (what the step fetches, when it began).
        self._running: dict[int, tuple[Any, float]] = {}
        # Steps done: thread -> number, and when the last ended. Each thread counts in its own entry, so that no count
        # is lost.
        self._done: dict[int, tuple[int, float]] = {}
        self._longest_secs = 0.0
        self._usual_secs = 0.0
        self._condition = threading.Condition(threading.Lock())
        self._hold: _Hold | None = None
        self._on_due: Callable[[], int] | None = None
        self._due_at = 0
        self._after_each: Callable[[], None] | None = None

    @property
    def steps(self) -> int:
        """The number of runs that may have changed the saved state, so far."""
        return sum(number for number, _ in list(self._done.values()))

    @property
    def last_step(self) -> tuple[int, float]:
        """The number of these runs, and when the last of them ended, in seconds of the monotonic clock."""
        done = list(self._done.values())
        return sum(number for number, _ in done), max((ended_at for _, ended_at in done), default=0.0)

    @property
    def usual_secs(self) -> float:
        """The length of the longest recent step, in seconds. The first steps, which also do much set-up, fade out."""
        return self._usual_secs

    def enter(self, fetches: Any) -> None:
        """Begin a step of this thread; wait while a service holds the boundary.

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
        """Begin a step that a running step may be waiting for; wait only for a holder that has its boundary.

        A requested stop does not refuse this step: the step that waits for it could not end without it.
        """
        thread = get_ident()
        self._running[thread] = (fetches, monotonic())
        if self._hold is not None:
            self._wait_for_holder(thread, fetches, is_needed=True)

    def pass_by(self, fetches: Any) -> None:
        """Begin a run that is no step. It waits for no holder, but in the main thread it obeys a requested stop.

        Without this, a loop that only reads (an evaluator, for example) would never meet the stop.

        Raises:
            StopRequested: the run is to stop, and this is the main thread.
        """
        if self.must_stop and threading.current_thread() is threading.main_thread():
            self._stop_before(fetches)

    def stop(self, main_thread_was_told: Callable[[], bool]) -> None:
        """Refuse all further steps, and in the main thread all further runs.

        Exception: a main thread for which ``main_thread_was_told()`` is true may run further steps to finish.
        """
        self._main_thread_was_told = main_thread_was_told
        self.must_stop = True

    def _stop_before(self, fetches: Any) -> None:
        if threading.current_thread() is threading.main_thread() and self._main_thread_was_told():
            return
        raise StopRequested(f"the run was asked to stop, and does at this boundary, before {describe(fetches)}")

    def leave(self) -> None:
        """End the step of this thread."""
        thread = get_ident()
        # Counted before the announcement is removed: a thread that finds no step under way must find this one counted.
        now = monotonic()
        self._done[thread] = self._done.get(thread, _NONE_DONE)[0] + 1, now
        announced = self._running.pop(thread, None)
        # There is no announcement if a nested run of the same thread has already removed it.
        if announced is not None:
            secs = now - announced[1]
            self._longest_secs = max(self._longest_secs, secs)
            self._usual_secs = max(_FADING * self._usual_secs, secs)
        if self._hold is not None:
            with self._condition:
                self._condition.notify_all()
        if self._after_each is not None:
            self._after_each()
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
                # Announced while this thread has the lock: the next holder needs the lock to set `_hold`.
                self._running[thread] = (fetches, monotonic())

    def _call_if_due(self, callback: Callable[[], int]) -> None:
        with self._condition:
            is_due = self.steps >= self._due_at
            if is_due:
                # The callback is not due again before it has returned the number of steps until the next call.
                self._due_at = sys.maxsize
        if is_due:
            steps = 1
            try:
                steps = callback()
            finally:
                self._due_at = self.steps + max(1, steps)

    def call_after_steps(self, steps: int, callback: Callable[[], int]) -> None:
        """Call ``callback`` after ``steps`` more steps, between two steps.

        ``callback`` returns the number of steps until its next call.
        """
        self._due_at = self.steps + max(1, steps)
        self._on_due = callback

    def call_after_each(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` after each step, on its thread, before what is due there."""
        self._after_each = callback

    @contextmanager
    def hold(self, what: str, *, patience_secs: float | None = None, at_most_secs: float = math.inf) -> Iterator[None]:
        """Keep new steps from starting, and run the block when no step is under way.

        The running steps have three times the longest step seen to end, at least 5 s and at most ``patience_secs`` (by
        default 60 s): only a step that waits for something, usually for another step, is given up on. After
        ``at_most_secs`` inside the block, steps go on while the block runs: for a block that may need input of a step.

        Raises:
            NoBoundaryError: the running steps did not end in time; new steps go on.
        """
        longest_secs = _LONGEST_PATIENCE_SECS if patience_secs is None else patience_secs
        patience_secs = min(max(_PATIENCE_SECS, 3 * self._longest_secs), longest_secs)
        mine = _Hold(get_ident())
        try:
            self._wait_for_no_step(mine, what, patience_secs)
            with self._condition:
                mine.until = monotonic() + at_most_secs
                # Wakes the waiting steps, so that they wait no longer than the new `until`.
                self._condition.notify_all()
            yield
        finally:
            # Runs also when Ctrl-C interrupts the wait: a hold that nobody ends would stop all training.
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
        # The asking thread is in no step, even if an interrupted `leave` has left its entry behind.
        return [step for thread, step in list(self._running.items()) if thread != me]


class _Hold:
    """The thread that keeps steps waiting, the time until which it may, and whether the last step has ended."""

    __slots__ = ("is_granted", "thread", "until")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.until = math.inf
        self.is_granted = False
