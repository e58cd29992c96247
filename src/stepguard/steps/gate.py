"""Where the steps of one process wait for what the processes have agreed on.

The thread that trains calls :meth:`Gate.begin` before each step and :meth:`Gate.done` after it. It waits in ``begin``,
and only there: at a limit, until the thread that listens to the other processes moves it; and at a step where all meet,
until what this process adds to a checkpoint may be taken there. The listening thread never waits for a step, and so the
two cannot deadlock. Threads that do wait for a step (for a snapshot, for a stop) do so in :meth:`Gate.await_change`,
with a patience of their own; ``done`` and ``end`` wake them. A gate that nobody will move any more is abandoned, and
open. A kill leaves nothing: all of this is memory of one process.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Loop(Enum):
    """What the program's loop over steps does."""

    RUNS = "runs"
    LEFT = "left"
    """By ``break`` or by an exit; another may follow."""
    ENDED = "ended"
    """As it was to end: no more data, the last step, or a stop. Another may follow."""


# Between two steps for longer than this, a process does something else: it is not asked to come to a later one.
_PAUSE_SECS = 1.0


class Attendant(Protocol):
    """Who is called by a gate, in the thread that trains and between two steps."""

    def take_state(self) -> None:
        """Take what this process adds to a checkpoint. Raises nothing."""

    def loop_changed(self) -> None:
        """A loop has begun, was left, or has ended. Raises nothing."""


@dataclass(slots=True)
class _Meetings:
    """The steps after which all processes take their states by themselves."""

    next_at: float = math.inf
    every: float = math.inf
    # Whether what was taken last is not wanted any more, and whether the chief comes to the next one at all.
    is_free: bool = True
    has_chief: bool = True

    def is_due(self, step: int) -> bool:
        return step >= self.next_at and (self.is_free or not self.has_chief)

    def pass_by(self, step: int) -> None:
        if step >= self.next_at:
            self.next_at += self.every * ((step - self.next_at) // self.every + 1)


class Gate:
    """Lets steps begin. ``begin``, ``done`` and ``end`` are for threads that train, the others for any."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = 0
        self._done = 0
        self._moved_at = self._began_at = time.monotonic()
        self._step_secs = math.inf
        self._loop = Loop.LEFT
        self._limit = math.inf
        self._is_last = False
        self._refusal: Exception | None = None
        self._attendant: Attendant | None = None
        self._captures_at = math.inf
        self._meetings = _Meetings()
        # The thread that trains; the last of them, where several do.
        self.trainer: int | None = None

    # --- the thread that trains ---

    def begin(self, steps_done: int) -> bool:
        """The step after ``steps_done`` is to begin: wait if it may not yet; ``False`` if it never may.

        Raises:
            Exception: what :meth:`refuse_after` was given, since another process takes no part in this step.
        """
        while not (is_let := self._is_let(steps_done)):
            if is_let is None:
                return False
            self._take_state()
        return True

    def _is_let(self, steps_done: int) -> bool | None:
        """``True``, or ``None`` for never; ``False`` when a capture is to come first."""
        with self._changed:
            while steps_done >= min(self._limit, self._meetings.next_at) or steps_done >= self._captures_at:
                if self._must_capture(steps_done):
                    return False
                if steps_done >= self._limit and self._refusal is not None:
                    raise self._refusal
                if steps_done >= self._limit and self._is_last:
                    self._loop = Loop.ENDED
                    return None
                self._changed.wait()
            was, self._loop = self._loop, Loop.RUNS
            self._begun = steps_done + 1
            self._note_pace(was)
            self.trainer = threading.get_ident()
            self._changed.notify_all()
        if was is not Loop.RUNS:
            self._tell_of_loop()
        return True

    def _note_pace(self, was: Loop) -> None:
        """From the beginning of one step to that of the next, with the input; one long pause does not count for all."""
        now = time.monotonic()
        if was is Loop.RUNS:
            secs = min(now - self._began_at, 4 * self._step_secs)
            self._step_secs = secs if self._step_secs == math.inf else 0.8 * self._step_secs + 0.2 * secs
        self._began_at = self._moved_at = now

    def _must_capture(self, steps_done: int) -> bool:
        if steps_done < self._captures_at and not self._meetings.is_due(steps_done):
            return False
        self._captures_at = math.inf
        self._meetings.is_free = False
        self._meetings.pass_by(steps_done)
        return True

    def _take_state(self) -> None:
        if self._attendant is not None:
            self._attendant.take_state()

    def _tell_of_loop(self) -> None:
        if self._attendant is not None:
            self._attendant.loop_changed()

    def done(self, steps: int) -> None:
        """So many steps are done."""
        with self._changed:
            self._done, self._moved_at = steps, time.monotonic()
            self._changed.notify_all()

    def end(self, steps_done: int, how: Loop = Loop.ENDED) -> None:
        """The loop ends after ``steps_done``; a step that had begun for which there was no input is none."""
        with self._changed:
            self._begun = self._done = steps_done
            self._loop = how
            must_capture = self._must_capture(steps_done)
            self._changed.notify_all()
        if must_capture:
            self._take_state()
        self._tell_of_loop()

    # --- how far this process is ---

    @property
    def loop(self) -> Loop:
        """What the loop does."""
        return self._loop

    @property
    def begun(self) -> int:
        """The steps that have begun."""
        return self._begun

    @property
    def is_last(self) -> bool:
        """Whether the step at which the run ends is settled."""
        return self._is_last

    @property
    def is_resting(self) -> bool:
        """Whether no step runs, and none may follow."""
        with self._changed:
            is_between = self._begun == self._done and time.monotonic() - self._moved_at > _PAUSE_SECS
            return self._loop is not Loop.RUNS or is_between

    @property
    def step_secs(self) -> float:
        """How long a step takes, in seconds; infinite before the first."""
        return self._step_secs

    def await_change(self, timeout_secs: float, is_so: Callable[[], bool]) -> bool:
        """Wait until ``is_so``, asked after each step that begins or ends, or until time is over."""
        with self._changed:
            return self._changed.wait_for(is_so, timeout_secs)

    # --- how far it may go ---

    def pause(self, ahead: int = 0) -> tuple[int, bool]:
        """Let no step begin but ``ahead`` more; how many will have begun then at most, and whether its loop is over."""
        with self._changed:
            # Nobody knows how far a loop will go that is not running.
            limit = self._begun + (0 if self.is_resting or self._is_last else ahead)
            if self._refusal is None and not self._is_last:
                self._limit = limit
            return limit, self._loop is Loop.ENDED

    def open_until(self, step: float, *, is_last: bool = False) -> None:
        """Let steps begin until ``step`` are done; with ``is_last`` the run ends there."""
        with self._changed:
            if self._refusal is None and not (self._is_last and not is_last):
                self._limit = step
            self._is_last = self._is_last or is_last
            self._changed.notify_all()

    def refuse_after(self, step: int, error: Exception) -> bool:
        """Raise ``error`` in the step that begins after ``step``; whether one has begun already."""
        with self._changed:
            if self._is_last or self._refusal is not None:
                return False
            self._limit, self._refusal = step, error
            self._meetings = _Meetings()
            self._changed.notify_all()
            return self._begun > step

    def abandon(self) -> None:
        """Nobody will say any more how far this process may go: let it, unless the run is to end."""
        with self._changed:
            self._meetings = _Meetings()
            self._captures_at = math.inf
            if not self._is_last and self._refusal is None:
                self._limit = math.inf
            self._changed.notify_all()

    # --- what it adds to a checkpoint ---

    def attend(self, attendant: Attendant) -> None:
        """Call it from now on."""
        self._attendant = attendant

    def capture_at(self, step: int) -> None:
        """Capture after ``step`` steps, and go on."""
        with self._changed:
            self._captures_at = step
            self._meetings.is_free = False
            self._changed.notify_all()

    def meet_every(self, first: int, every: int) -> None:
        """Capture after ``first`` steps, and after each ``every`` more.

        Where what was captured before is still wanted, steps wait until it is not, or until the chief passes.
        """
        with self._changed:
            self._meetings = _Meetings(first, every)

    @property
    def is_free(self) -> bool:
        """Whether what was captured last is not wanted any more."""
        return self._meetings.is_free

    def free(self) -> None:
        """What was captured last is not wanted any more."""
        with self._changed:
            self._meetings.is_free = True
            self._changed.notify_all()

    def pass_meeting(self, step: int) -> None:
        """Nothing is captured at the meeting after ``step`` steps, nor at those before it."""
        with self._changed:
            self._meetings.pass_by(step)
            self._changed.notify_all()

    def expect_chief(self, is_coming: bool) -> None:
        """Whether the chief comes to the meetings: where it does not, nobody waits, and the last state taken counts."""
        with self._changed:
            self._meetings.has_chief = is_coming
            self._changed.notify_all()
