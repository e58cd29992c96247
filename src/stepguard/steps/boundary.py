"""The step boundary of a training loop: the moment between two steps.

The protocol: a step and a service (a save, a summary) take the same lock, one at a time. Python's lock is not fair: a
loop that releases it and takes it again at once would never let a service in. Therefore a service first sets up an
event, its turn, and the next step waits for that event before it takes the lock. The service sets the event when it is
done or when its patience is over. So a step waits for at most one service, and a service waits for at most one step,
both for a limited time.

No deadlock is possible: services queue for ``_holding`` before they take the lock, a step never holds the lock while it
waits for a turn, and the code that a service runs while it holds the boundary waits for no step. An error inside a step
marks the boundary torn; from then on no service gets it, because the state belongs to no step. Ctrl-C between two lines
could leave the lock taken for ever. Therefore a thread that is taking or releasing the lock is in ``_changing``, and
``interrupts`` holds the signal back meanwhile. A kill leaves nothing, because all of this is memory of one process.

After a step of the program's own loop, code of the program runs, which belongs to the training, as a schedule does, or
uses the model for something else before the next step. The training thread therefore ends the step *away*. A service
waits until the thread is back, at the beginning of the next step, or gives up.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stepguard.errors import NoBoundaryError, StopRequested

# How long a service waits for a boundary, unless steps are longer than this.
_PATIENCE_SECS = 5.0


class Boundary:
    """Lets one step run at a time, and a service between two steps.

    A step calls :meth:`enter` and :meth:`leave` on one thread. A service holds the boundary by :meth:`hold`.
    """

    def __init__(self) -> None:
        # Taken while a step runs, and while the boundary is held.
        self._lock = threading.Lock()
        # The turn of the service that waits or holds the boundary; the next step waits until it is set.
        self._turn: threading.Event | None = None
        self._holding = threading.Lock()
        # The thread that is in a step.
        self.stepping: int | None = None
        # The threads that are taking or releasing the lock; an interrupt between two lines could leave it taken.
        self._changing: set[int] = set()
        self._began = 0.0
        self._longest_secs = 0.0
        self._on_due: Callable[[], int] | None = None
        self._due_at = sys.maxsize
        self._is_torn = False
        # The thread that runs code of the program between two steps, and the event that says that it is back.
        self._away: int | None = None
        self._is_back = threading.Event()
        self._on_rest: Callable[[bool], None] | None = None
        self._soon: list[Callable[[], None]] = []
        # The number of steps, and when the last of them ended (monotonic clock); replaced together.
        self.last_step: tuple[int, float] = (0, 0.0)
        # Rises at the beginning and at the end of each rest.
        self.pauses = 0
        # The thread that began the last step.
        self.thread: int | None = None
        # Whether the program's loop over steps has ended, so that it may use the model for something else.
        self.is_resting = False
        # Set once, by any thread. No step begins after that. Exception: a main thread that has already seen
        # should_stop() return true may run further steps to finish.
        self.must_stop = False
        self._main_thread_was_told: Callable[[], bool] = lambda: False

    def enter(self, *, comes_back: bool = True) -> None:
        """Begin a step on this thread; wait while a service holds the boundary."""
        me = threading.get_ident()
        if self._away is not None and comes_back:
            self.come_back()
        self._changing.add(me)
        try:
            turn = self._turn
            # A service that waits for a thread that is away lets it in.
            if turn is not None and self._away is None:
                turn.wait()
            self._lock.acquire()
            self.stepping = self.thread = me
        finally:
            self._changing.discard(me)
        self._began = time.monotonic()
        if self.is_resting:
            self.is_resting = False
            self.pauses += 1

    def rest(self, change: Callable[[], None] | None = None, *, is_last: bool = False) -> None:
        """Note that no step follows for now; wait while a service holds the boundary.

        ``change`` is called first, then the callback of :meth:`call_at_rest`, both while this thread has the boundary.
        """
        self.enter(comes_back=False)
        try:
            if change is not None:
                change()
            self.come_back()
            if self._on_rest is not None and not self._is_torn:
                self._on_rest(is_last)
            self.is_resting = True
            self.pauses += 1
        finally:
            self.leave(is_done=False)

    def call_at_rest(self, callback: Callable[[bool], None]) -> None:
        """Call ``callback(is_last)`` on the loop's thread whenever a loop ends; ``is_last`` if the run ends there."""
        self._on_rest = callback

    def go_away(self) -> None:
        """Mark that this thread now runs code of the program: no service reads the state until it is back."""
        self.enter()
        self.leave(is_done=False, goes_away=True)

    def come_back(self) -> None:
        """Mark that the thread is back: the state is that of the training again."""
        if self._away is not None:
            self._away = None
            self._is_back.set()

    def stop(self, main_thread_was_told: Callable[[], bool]) -> None:
        """Refuse all further steps.

        Exception: a main thread for which ``main_thread_was_told()`` is true may run further steps to finish.
        """
        self._main_thread_was_told = main_thread_was_told
        self.must_stop = True

    def check_stop(self) -> None:
        """Raise StopRequested if no further step may begin."""
        is_told = threading.current_thread() is threading.main_thread() and self._main_thread_was_told()
        if self.must_stop and not is_told:
            raise StopRequested("stopped before the next step: the run was asked to stop")

    def leave(self, *, is_done: bool = True, calls_due: bool = True, goes_away: bool = False) -> None:
        """End the step of this thread; ``is_done`` says whether it counts, ``goes_away`` is as in :meth:`go_away`.

        Without ``calls_due`` a callback that is due is left for :meth:`call_due`.
        """
        me = threading.get_ident()
        if self.stepping != me:
            return
        now = time.monotonic()
        if is_done:
            self.last_step = self.last_step[0] + 1, now
        lasted = now - self._began
        if lasted > self._longest_secs:
            self._longest_secs = lasted
        self._changing.add(me)
        try:
            self.stepping = None
            if goes_away:
                self._away = me
                self._is_back.clear()
            self._lock.release()
        finally:
            self._changing.discard(me)
        if is_done and calls_due and (self._soon or self.last_step[0] >= self._due_at):
            self.call_due()

    @property
    def is_due(self) -> bool:
        """Whether a service waits for this thread, or a callback is to be called after this step."""
        return self._turn is not None or bool(self._soon) or self.last_step[0] >= self._due_at

    def call_due(self) -> None:
        """Call the callbacks that are due after the last step, unless they were called already."""
        if self._soon:
            self.call_put_off()
        # `>=`, because another thread may have done one more step before this thread gets here.
        if self.last_step[0] >= self._due_at and self._on_due is not None:
            # Called once, by the first thread that gets here.
            self._due_at = sys.maxsize
            self._due_at = self.steps + max(1, self._on_due())

    def leave_torn(self) -> None:
        """End a step that an error has left half-way, so that the state belongs to no step."""
        self._is_torn = True
        self.leave(is_done=False)

    def mark_torn(self) -> None:
        """Mark that this thread leaves its step half-way."""
        self._is_torn = True

    @property
    def steps(self) -> int:
        """The number of steps done."""
        return self.last_step[0]

    @property
    def is_away(self) -> bool:
        """Whether the training thread runs code of the program between two steps of a loop of its own."""
        return self._away is not None

    @property
    def is_away_here(self) -> bool:
        """Whether that thread is the calling one."""
        return self._away == threading.get_ident()

    @property
    def is_torn(self) -> bool:
        """Whether a step was left half-way, so that the state belongs to no step."""
        return self._is_torn

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread is in the middle of a step."""
        return self.stepping == threading.get_ident()

    @property
    def is_changing_hands(self) -> bool:
        """Whether the calling thread is at the beginning or the end of a step or of a hold."""
        return threading.get_ident() in self._changing

    def check_whole(self, what: str, *, is_left_by_error: bool = False) -> None:
        """Raise NoBoundaryError, for ``what``, if a step was left half-way."""
        if self._is_torn or is_left_by_error:
            raise NoBoundaryError(
                f"no step boundary for {what}: a step was left half-way by an error, and what the model holds now "
                f"belongs to no step. The checkpoint before it is good"
            )

    def call_after_steps(self, steps: int, callback: Callable[[], int]) -> None:
        """Call ``callback`` after ``steps`` more steps, on the thread of the last one.

        ``callback`` returns the number of steps until its next call.
        """
        self._on_due = callback
        self._due_at = self.steps + max(1, steps)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, at the end of the running step, on its thread."""
        if callback not in self._soon:
            self._soon.append(callback)

    def call_put_off(self) -> None:
        """Call the callbacks of :meth:`call_soon` that have not been called yet."""
        # Not those that they call for in their turn.
        for _ in range(len(self._soon)):
            self._soon.pop(0)()

    @contextmanager
    def hold(self, what: str, patience_secs: float | None = None) -> Iterator[None]:
        """A block in which no step runs. The running step has at most ``patience_secs`` to end.

        Raises:
            NoBoundaryError: the running step did not end in time, or a step was left half-way.
        """
        me = threading.get_ident()
        with self._holding:
            self._changing.add(me)
            try:
                self._take(what, patience_secs)
                try:
                    yield
                finally:
                    self._give_back()
            finally:
                self._changing.discard(me)

    def _take(self, what: str, patience_secs: float | None) -> None:
        patience = max(_PATIENCE_SECS, 3 * self._longest_secs)
        if patience_secs is not None:
            patience = min(patience, patience_secs)
        deadline = time.monotonic() + patience
        self._turn = threading.Event()
        # A caller that sets a patience is ending the run: the program begins no further step.
        waits_for_return = patience_secs is None
        while True:
            if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                began = self._began
                self._end_turn()
                raise NoBoundaryError(
                    f"no step boundary for {what}: step {self.steps + 1} of this session has been under way for "
                    f"{time.monotonic() - began:.1f} s (waited {patience:.1f} s for it)"
                )
            if not waits_for_return or self._away in (None, threading.get_ident()):
                break
            self._lock.release()
            if not self._is_back.wait(max(0.0, deadline - time.monotonic())):
                self._end_turn()
                raise NoBoundaryError(
                    f"no step boundary for {what}: the program was between two steps of its own loop for "
                    f"{patience:.1f} s, and what the model holds there is its own affair"
                )
        try:
            self.check_whole(what)
        except NoBoundaryError:
            self._give_back()
            raise

    def _give_back(self) -> None:
        self._lock.release()
        self._end_turn()

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.set()
