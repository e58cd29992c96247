"""Where one step ends and the next has not begun, when several threads run steps of one session."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stepguard.errors import NoBoundaryError, StopRequested
from stepguard.tensorflow.runs import RunKinds, describe

# How long a boundary may keep the next step waiting before it exists. Longer runs than this raise the bound (see
# `_patience`), so that only a run that waits for another run of ours is ever given up on.
_PATIENCE_SECS = 5.0


class Boundary:
    """Tells the runs of a session that change its saved state from all others, and finds the moments between them.

    ``enter`` and ``leave`` are called around every step, by any thread. ``hold`` is called by a service: it keeps new
    steps waiting until those that run have ended, and as long as its block lasts.
    """

    def __init__(self, kinds: RunKinds) -> None:
        self.is_step = kinds.changes_state
        self._condition = threading.Condition(threading.Lock())
        # The steps that run now: thread -> (what it fetches, when it began).
        self._running: dict[int, tuple[Any, float]] = {}
        self._holder: int | None = None
        self._held_until = math.inf
        self._longest_secs = 0.0
        self._steps = 0
        self._holding = threading.Lock()
        self._on_due: Callable[[], int] | None = None
        self._due_at = -1
        # Set once, by any thread: no step begins after it.
        self.must_stop = False

    @property
    def steps(self) -> int:
        """The number of runs that may have changed the saved state, so far."""
        return self._steps

    def enter(self, fetches: Any) -> None:
        """A step begins: wait while a service holds the boundary.

        Raises:
            StopRequested: the run is to stop at this boundary.
        """
        if self.must_stop:
            raise StopRequested(f"stopped before the run of {describe(fetches)}: SIGTERM was received")
        thread = threading.get_ident()
        with self._condition:
            while self._holder is not None and self._holder != thread:
                remaining = self._held_until - time.monotonic()
                if remaining <= 0:
                    break
                self._condition.wait(None if remaining == math.inf else remaining)
            self._running[thread] = (fetches, time.monotonic())

    def leave(self) -> None:
        """The step of this thread has ended."""
        with self._condition:
            _, began = self._running.pop(threading.get_ident())
            self._steps += 1
            lasted = time.monotonic() - began
            if lasted > self._longest_secs:
                self._longest_secs = lasted
            if self._holder is not None:
                self._condition.notify_all()
            is_due = self._steps == self._due_at
        if is_due and self._on_due is not None:
            self._due_at = self._steps + max(1, self._on_due())

    def call_after_steps(self, steps: int, callback: Callable[[], int]) -> None:
        """Call ``callback`` after ``steps`` more steps, between two of them; it returns the number until the next."""
        self._on_due = callback
        self._due_at = self._steps + max(1, steps)

    @contextmanager
    def hold(self, what: str, *, at_most_secs: float = math.inf) -> Iterator[None]:
        """Keep steps from starting; the block runs when none is under way.

        After ``at_most_secs`` inside the block steps go on in spite of it: for a block that may itself wait for what
        only a step provides.

        Raises:
            NoBoundaryError: the steps that run now did not end in time. The bound is a multiple of the longest step
                seen, so that this means a step that waits for something, usually for another step.
        """
        with self._holding:
            self._wait_for_no_step(what)
            self._held_until = time.monotonic() + at_most_secs
            try:
                yield
            finally:
                with self._condition:
                    self._holder = None
                    self._condition.notify_all()

    def _wait_for_no_step(self, what: str) -> None:
        patience = max(_PATIENCE_SECS, 3 * self._longest_secs)
        deadline = time.monotonic() + patience
        with self._condition:
            self._held_until = math.inf
            self._holder = threading.get_ident()
            while others := self._running_elsewhere():
                if not self._condition.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    # New steps go on: one of them may be what the step in the way is waiting for.
                    self._holder = None
                    self._condition.notify_all()
                    break
            else:
                return
        fetches, began = min(others, key=lambda step: step[1])
        raise NoBoundaryError(
            f"no step boundary for {what}: the run of {describe(fetches)} has been under way for "
            f"{time.monotonic() - began:.1f} s (waited {patience:.1f} s for it); if it waits for another run that "
            f"changes the model, split the two, or feed it from a thread that only fills a queue"
        )

    def _running_elsewhere(self) -> list[tuple[Any, float]]:
        # A thread that asks for a boundary is not inside a step, whatever an interrupted `leave` left behind.
        holder = self._holder
        return [step for thread, step in self._running.items() if thread != holder]
