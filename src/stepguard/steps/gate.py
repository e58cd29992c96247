"""Where the steps of one process wait for the others.

Two threads meet here: the one that trains, and the one that listens to the other processes. The first waits in
:meth:`Gate.begin` while its next step lies behind the limit; only the second moves the limit. That is all that either
waits for, and the second never waits here, so the two cannot deadlock. What the second waits for is another process: it
gives up after its patience, and then opens the gate, so that no step waits for somebody who is gone. A kill leaves
nothing: the gate is memory of its process.
"""

from __future__ import annotations

import math
import threading


class Gate:
    """Where the steps of one process wait for the others."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = 0
        self._limit = math.inf
        self._is_last = False
        self._meets_at = math.inf
        self._every = math.inf
        self._is_awaiting_chief = False
        self._has_ended = False

    def begin(self, steps_done: int) -> bool:
        """The step after ``steps_done`` is to begin: wait if it may not yet; ``False`` if it never may."""
        with self._changed:
            while steps_done >= min(self._limit, self._meets_at):
                if steps_done >= self._limit and self._is_last:
                    return False
                self._is_awaiting_chief = steps_done >= self._meets_at
                self._changed.wait()
            self._is_awaiting_chief = False
            self._has_ended = False
            self._begun = steps_done + 1
            return True

    def end(self, steps_done: int) -> None:
        """There was no input for the step that had begun: the loop ends after ``steps_done``, as all others do."""
        with self._changed:
            self._begun = steps_done
            self._has_ended = True

    @property
    def has_ended(self) -> bool:
        """Whether no step will follow those that are done."""
        return self._has_ended

    def meet_chief(self, first: int, every: int) -> None:
        """Let no step begin after ``first`` steps, and after each ``every`` more, until the chief has passed there."""
        with self._changed:
            self._meets_at, self._every = first, every

    @property
    def is_awaiting_chief(self) -> bool:
        """Whether a step waits for the chief."""
        return self._is_awaiting_chief

    def chief_passed(self, steps: int) -> None:
        """The chief has done ``steps``, and what it does after them."""
        with self._changed:
            if steps >= self._meets_at:
                self._meets_at += self._every * ((steps - self._meets_at) // self._every + 1)
            self._changed.notify_all()

    def pause(self) -> int:
        """Let no further step begin; how many have."""
        with self._changed:
            self._limit = self._begun
            return self._begun

    def open_until(self, step: float, *, is_last: bool = False) -> None:
        """Let steps begin until ``step`` are done; with ``is_last`` the run ends there."""
        with self._changed:
            self._limit = step
            self._is_last = self._is_last or is_last
            self._changed.notify_all()

    def abandon(self) -> None:
        """Nobody will say any more how far this process may go: let it, unless the run is to end."""
        with self._changed:
            self._meets_at = math.inf
            if not self._is_last:
                self._limit = math.inf
            self._changed.notify_all()

    @property
    def is_last(self) -> bool:
        """Whether the step at which the run ends is settled."""
        return self._is_last
