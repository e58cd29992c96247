"""The gate at which the steps of one process wait for the agreement of all processes.

The protocol: the training thread calls :meth:`Gate.begin` before each step and :meth:`Gate.done` after it. It waits
only in ``begin``: at a limit, until the thread that listens to the other processes moves the limit; and at a step where
all processes meet, until it may copy this process's part of a checkpoint there. The methods that move the gate notify
the condition ``_changed``, on which it waits. The listening thread never waits for a step, so the two cannot deadlock.
Threads that do wait for a step (for a snapshot, or for a stop) call :meth:`Gate.await_change`, each with a patience of
its own; ``begin``, ``done`` and ``end`` wake them. When nobody will move the gate any more, it is abandoned, and so
opened. The attendant is called without the lock. A kill leaves nothing, because all of this is memory of one process.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol


class Loop(Enum):
    """The state of the program's loop over steps."""

    RUNS = "runs"
    LEFT = "left"
    """The program has left the loop by ``break`` or by an exit; another loop may follow."""
    ENDED = "ended"
    """The loop has ended as intended: no more data, the last step, or a stop. Another loop may follow."""


class Moment(NamedTuple):
    """How far a process is. Moments are ordered, and the same moment is the same place in the program of each process.

    The steps count from the beginning of their loop, because processes with uneven inputs end a loop after different
    numbers of steps, and then begin the next one together.
    """

    epochs: int
    """The complete epochs of ``sess.epochs``, those before a restart included."""
    loops: int
    """The loops that have ended since the last complete epoch."""
    steps: int
    """The steps done since the last loop has ended."""


NEVER = Moment(sys.maxsize, 0, 0)

# A process that is between two steps for longer than this does something else, and is not asked to go to a later step.
_PAUSE_SECS = 1.0


class Attendant(Protocol):
    """The object that a gate calls, on the training thread and between two steps."""

    def take_state(self) -> None:
        """Copy this process's part of a checkpoint. Raises nothing."""

    def loop_changed(self, *, is_due: bool) -> None:
        """A loop has begun, was left, or has ended; ``is_due`` if a capture is due at its end. Raises nothing."""


@dataclass(slots=True)
class _Meetings:
    """The steps after which all processes take their states unasked."""

    next_at: float = math.inf
    every: float = math.inf
    # Whether the last captured state is no longer needed, and whether the chief will come to the next meeting.
    is_free: bool = True
    has_chief: bool = True

    def is_due(self, step: int) -> bool:
        return step >= self.next_at and (self.is_free or not self.has_chief)

    def pass_by(self, step: int) -> None:
        if step >= self.next_at:
            self.next_at += self.every * ((step - self.next_at) // self.every + 1)


class Gate:
    """Lets steps begin. Training threads call ``begin``, ``done`` and ``end``; any thread calls the other methods."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # The moment from which steps are counted, and the steps of the session until then.
        self._origin = Moment(0, 0, 0), 0
        self._begun = self._done = self._origin[0]
        # The moment after the last step, which the end of its loop does not change.
        self.last_done: Moment | None = None
        self._moved_at = self._began_at = time.monotonic()
        self._step_secs = math.inf
        self._loop = Loop.LEFT
        self._limit = NEVER
        self._is_last = False
        self._refusal: Exception | None = None
        self._attendant: Attendant | None = None
        self._captures_at = NEVER
        self._meetings = _Meetings()
        # No step begins after so many, but for the rendezvous to settle that they are the last.
        self._ends_at = math.inf
        # Whether nobody will settle that any more.
        self._is_abandoned = False
        self._steps_begun = 0
        # The training thread; if there are several, the one that began the last step.
        self.trainer: int | None = None

    # --- the training thread ---

    def moment(self, steps_done: int) -> Moment:
        """The moment after ``steps_done`` steps of this session. Any thread."""
        origin, before = self._origin
        return origin._replace(steps=steps_done - before)

    def begin_at(self, epochs_done: int) -> None:
        """Go on after ``epochs_done`` complete epochs. Called before the first step."""
        self._origin = Moment(epochs_done, 0, 0), 0
        self._begun = self._done = self._origin[0]

    def turn(self, steps_done: int, epochs_done: int | None = None) -> None:
        """Count a loop that has ended after ``steps_done`` steps, or an epoch, so that ``epochs_done`` are complete.

        Called inside the boundary, so that the state and its moment change together. :meth:`end` follows.
        """
        last = self.moment(steps_done)
        if epochs_done is None:
            self._origin = Moment(last.epochs, last.loops + 1, 0), steps_done
        else:
            self._origin = Moment(epochs_done, 0, 0), steps_done

    def begin(self, steps_done: int) -> bool:
        """Wait until the step after ``steps_done`` may begin; ``False`` if it never may.

        Raises:
            Exception: the error that :meth:`refuse_after` was given: another process takes no part in this step.
        """
        while not (is_let := self._is_let(steps_done)):
            if is_let is None:
                self._tell_of_loop()
                return False
            self._take_state()
        return True

    def _is_let(self, steps_done: int) -> bool | None:
        """``True`` if the step may begin, ``None`` if it never may, ``False`` if a capture must come first."""
        moment = self.moment(steps_done)
        with self._changed:
            if steps_done >= self._ends_at and self._loop is Loop.LEFT:
                # The first loop of a run that was over when it was resumed: the stop is settled as inside a loop.
                self._loop = Loop.RUNS
                self._changed.notify_all()
            is_at_end = steps_done >= self._ends_at
            while is_at_end or moment >= min(self._limit, self._captures_at) or steps_done >= self._meetings.next_at:
                if self._must_capture(moment, steps_done):
                    return False
                if moment >= self._limit and self._refusal is not None:
                    raise self._refusal
                is_settled = self._is_last or (is_at_end and self._is_abandoned)
                if is_settled and (is_at_end or moment >= self._limit):
                    self._loop = Loop.ENDED
                    return None
                self._changed.wait()
            was, self._loop = self._loop, Loop.RUNS
            self._begun, self._steps_begun = _after(moment), steps_done + 1
            self._note_pace(was)
            self.trainer = threading.get_ident()
            self._changed.notify_all()
        if was is not Loop.RUNS:
            self._tell_of_loop()
        return True

    def _note_pace(self, was: Loop) -> None:
        """Update the time from one step's beginning to the next, input included. One long pause counts only in part."""
        now = time.monotonic()
        if was is Loop.RUNS:
            secs = min(now - self._began_at, 4 * self._step_secs)
            self._step_secs = secs if self._step_secs == math.inf else 0.8 * self._step_secs + 0.2 * secs
        self._began_at = self._moved_at = now

    def _must_capture(self, moment: Moment, steps_done: int) -> bool:
        if moment < self._captures_at and not self._meetings.is_due(steps_done):
            return False
        self._captures_at = NEVER
        self._meetings.is_free = False
        self._meetings.pass_by(steps_done)
        return True

    def _take_state(self) -> None:
        if self._attendant is not None:
            self._attendant.take_state()

    def _tell_of_loop(self, *, is_due: bool = False) -> None:
        if self._attendant is not None:
            self._attendant.loop_changed(is_due=is_due)

    def done(self, steps: int) -> None:
        """Note that ``steps`` steps are done."""
        with self._changed:
            self._done, self._moved_at = self.moment(steps), time.monotonic()
            self.last_done = self._done
            self._changed.notify_all()

    def meet(self, steps_done: int) -> None:
        """Take the state after the last step of a loop if it is due there, before the end of the loop changes it."""
        while self._is_awaited(steps_done):
            self._take_state()

    def _is_awaited(self, steps_done: int) -> bool:
        """Whether a capture must come after ``steps_done`` steps; waits while the last captured state is needed."""
        moment = self.moment(steps_done)
        with self._changed:
            while moment >= self._captures_at or steps_done >= self._meetings.next_at:
                if self._must_capture(moment, steps_done):
                    return True
                if self._is_last or self._refusal is not None:
                    return False
                self._changed.wait()
        return False

    def end(self, steps_done: int, *, how: Loop = Loop.ENDED) -> None:
        """Note that no step follows for now. A begun step that found no input does not count."""
        with self._changed:
            moment = self._begun = self._done = self.moment(steps_done)
            self._loop, self._steps_begun = how, steps_done
            is_due = self._must_capture(moment, steps_done)
            self._changed.notify_all()
        self._tell_of_loop(is_due=is_due)

    # --- how far this process is ---

    @property
    def loop(self) -> Loop:
        """The state of the loop."""
        return self._loop

    @property
    def begun(self) -> Moment:
        """The moment after the steps that have begun."""
        return self._begun

    @property
    def steps_begun(self) -> int:
        """The number of steps of this session that have begun."""
        return self._steps_begun

    @property
    def is_last(self) -> bool:
        """Whether the last step of the run is settled."""
        return self._is_last

    @property
    def is_resting(self) -> bool:
        """Whether no step is running, and possibly none will follow."""
        with self._changed:
            is_between = self._begun == self._done and time.monotonic() - self._moved_at > _PAUSE_SECS
            return self._loop is not Loop.RUNS or is_between

    @property
    def step_secs(self) -> float:
        """The usual length of a step in seconds; infinite before the first."""
        return self._step_secs

    def await_change(self, timeout_secs: float, is_so: Callable[[], bool]) -> bool:
        """Wait until ``is_so()`` is true, for at most ``timeout_secs``. It is called after each change of the gate."""
        with self._changed:
            return self._changed.wait_for(is_so, timeout_secs)

    # --- how far it may go ---

    def pause(self, ahead: int = 0) -> tuple[Moment, bool]:
        """Let only ``ahead`` more steps begin; return that limit, and whether the loop is over."""
        with self._changed:
            # A loop that is not running promises no steps, because nobody knows how far it will go.
            ahead = int(min(ahead, max(0, self._ends_at - self._steps_begun)))
            limit = _after(self._begun, 0 if self.is_resting or self._is_last else ahead)
            if self._refusal is None and not self._is_last:
                self._limit = limit
            return limit, self._loop is Loop.ENDED

    def open_until(self, moment: Moment, *, is_last: bool = False) -> None:
        """Let steps begin until ``moment``; with ``is_last`` the run ends there."""
        with self._changed:
            if self._refusal is None and not (self._is_last and not is_last):
                self._limit = moment
            self._is_last = self._is_last or is_last
            self._changed.notify_all()

    def end_at(self, steps: int) -> None:
        """Let no step begin after ``steps`` are done. A thread that comes there waits for the agreement on the end."""
        with self._changed:
            self._ends_at = steps

    def refuse_after(self, moment: Moment, error: Exception) -> bool:
        """Have ``begin`` raise ``error`` for a step after ``moment``; return whether such a step has already begun."""
        with self._changed:
            if self._is_last or self._refusal is not None:
                return False
            self._limit, self._refusal = moment, error
            self._meetings = _Meetings()
            self._changed.notify_all()
            return self._begun > moment

    def abandon(self) -> None:
        """Open the gate, because nobody will move it any more; it stays closed where the run is to end."""
        with self._changed:
            self._meetings = _Meetings()
            self._captures_at = NEVER
            self._is_abandoned = True
            if not self._is_last and self._refusal is None:
                self._limit = NEVER
            self._changed.notify_all()

    # --- this process's part of a checkpoint ---

    def attend(self, attendant: Attendant) -> None:
        """Call ``attendant`` from now on."""
        self._attendant = attendant

    def capture_at(self, moment: Moment) -> None:
        """Capture the state at ``moment``, or at the first one after it that this process comes to, and go on."""
        with self._changed:
            self._captures_at = moment
            self._meetings.is_free = False
            self._changed.notify_all()

    def meet_every(self, first: int, every: int) -> None:
        """Capture the state after ``first`` steps, and after each ``every`` more.

        If the last captured state is still needed, steps wait until it is not, or until the chief passes the meeting.
        """
        with self._changed:
            self._meetings = _Meetings(first, every)

    @property
    def is_free(self) -> bool:
        """Whether the last captured state is no longer needed."""
        return self._meetings.is_free

    def free(self, is_so: Callable[[], bool] = lambda: True) -> None:
        """Note that the last captured state is no longer needed, if ``is_so()``, which is called with the lock."""
        with self._changed:
            if is_so():
                self._meetings.is_free = True
                self._changed.notify_all()

    def pass_meeting(self, step: int) -> None:
        """Skip the meeting after ``step`` steps and all earlier ones: nothing is captured there."""
        with self._changed:
            self._meetings.pass_by(step)
            self._changed.notify_all()

    def expect_chief(self, is_coming: bool) -> None:
        """Say whether the chief will come to the meetings. If not, no step waits there, and the last capture counts."""
        with self._changed:
            self._meetings.has_chief = is_coming
            self._changed.notify_all()


def _after(moment: Moment, steps: int = 1) -> Moment:
    return moment._replace(steps=moment.steps + steps)
