"""The NaN guard: a number or a state that is not finite stops the run, or returns it to a good checkpoint.

The protocol: any thread may observe a bad number, and the writer thread a bad state. A short lock protects the first
observation, which starts the guard's own thread if the run may return. That thread takes ``one_save`` and then the step
boundary, in this order, as the program's own saves do; it restores, and releases both. The writer never holds a
boundary while it waits for ``one_save``, so these two locks cannot deadlock. A training thread that reported the bad
number waits in :meth:`NanGuard.settle`, between two steps and without a boundary, for the end of the guard's thread. A
stop request ends that thread at its next try, and :meth:`NanGuard.end` joins it. A return changes no checkpoint, so a
kill at any point leaves the committed checkpoints as they were.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stepguard.coordination.coordinator import Coordinator
from stepguard.engine import Engine, EventLog, RestsBetweenLoops, Snapshot
from stepguard.errors import NoBoundaryError, NonFiniteError
from stepguard.options import Guarding
from stepguard.saving.way_back import WayBack, shown
from stepguard.store import Checkpoint, CheckpointStore
from stepguard.watching.observer import Observer
from stepguard.watching.run_record import describe
from stepguard.words import listed, logger

_log = logger(__name__)

# How long a return keeps trying to get a step boundary, in addition to the engine's own patience with a long step.
_PATIENCE_SECS = 60.0
_PAUSE_SECS = 0.05


@dataclass(frozen=True, slots=True)
class _Sight:
    """One observation of something that is not finite."""

    step: int | None
    names: tuple[str, ...]
    text: str


class NanGuard:
    """Watches one session at a time for numbers and states that are not finite.

    With ``"stop"`` the first observation stops the run with a :class:`NonFiniteError`. With ``"return"`` the guard puts
    the session back to the newest good checkpoint, between two steps; after ``nan_returns`` returns, the next
    observation is the error. A snapshot that is not finite is never committed, nor is a snapshot taken between an
    observation and the return.

    Threads: :meth:`look`, :meth:`settle`, :meth:`mark` and :meth:`admits` from any thread; the others from the thread
    that opens and stops the session. ``on_error`` is called with the error of the run, ``on_return`` with
    the step of a return, at its boundary. ``one_save`` is held during a return, so that no checkpoint is committed
    meanwhile.
    """

    def __init__(
        self,
        options: Guarding,
        *,
        engine: Engine[Any],
        coord: Coordinator,
        store: CheckpointStore | None,
        events: EventLog | None,
        observer: Observer,
        one_save: threading.Lock,
        on_error: Callable[[BaseException], None],
        on_return: Callable[[int | None], None],
    ) -> None:
        self._way_back = WayBack(options, engine, store, events, on_return)
        self._engine = engine
        self._coord = coord
        self._observer = observer
        self._one_save = one_save
        self._on_error = on_error
        self._lock = threading.Lock()
        self._session: Any = None
        self._sight: _Sight | None = None
        self._is_over = False
        self._returning: threading.Thread | None = None
        self._loops = engine if isinstance(engine, RestsBetweenLoops) else None
        # Whether a training thread waits for the return. The state then belongs to training and is not lent out.
        self._is_awaited = False
        # The generation grows at each return, and snapshots of an older generation are not committed. Beside it, the
        # progress at the last return, if there was one.
        self._generation = 0
        self._progress_at_return: object = None

    # --- the life of a session ---

    def begin(self, session: Any) -> None:
        """Watch ``session``, and only it, from now on."""
        self.end(was_asked=True)
        self._session = session
        self._sight = None
        self._progress_at_return = None
        self._generation += 1
        self._is_over = False
        self._engine.watch_values(session, self)

    def end(self, *, was_asked: bool, within_secs: float | None = None) -> bool:
        """End the watch after the training loop; return whether the state is good. ``was_asked``: it was asked to stop.

        A loop that ended by itself while its session was put back has not reached its last step: that is an error.
        ``within_secs`` limits the wait for a return in progress; ``None`` waits until it is done.
        """
        with self._lock:
            was_over, self._is_over = self._is_over, True
            returning, self._returning = self._returning, None
        if returning is not None and returning is not threading.current_thread():
            returning.join(within_secs)
        sight, is_stuck = self._sight, False
        if was_over or self._session is None:
            return sight is None
        if sight is None and not was_asked and self._progress_at_return is not None:
            with contextlib.suppress(Exception):  # A lost session raises an error of its own elsewhere.
                is_stuck = self._engine.progress(self._session) == self._progress_at_return
            if is_stuck:
                self._sight = _Sight(self._engine.step(self._session), (), "the training loop ended")
        if is_stuck:
            self._fail("just when its session was put back, before where it wanted to come to; start it again to go on")
        elif sight is not None and not self._coord.failed:
            self._fail("the training loop ended before the run could return to a good checkpoint")
        return self._sight is None

    # --- what is seen ---

    def look(self, values: Mapping[str, float], step: int | None = None) -> bool:
        """Check named numbers of the program. ``step`` is the step of the numbers, by default that of the session.

        Returns whether one of them is not finite. Another thread then acts on it, or the next step boundary does: see
        :meth:`settle`. Until that is done, further observations are ignored.
        """
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if not bad:
            return False
        if step is None:
            with contextlib.suppress(Exception):  # The session may be closed, and the observation counts anyway.
                step = self._engine.step(self._session)
        numbers = listed(f"{name} is {value}" for name, value in bad.items())
        self._see(_Sight(step, tuple(bad), f"{numbers} at step {shown(step)}"))
        return True

    def settle(self) -> None:
        """Wait for the return that :meth:`look` has started, if any. From a training thread, between two steps."""
        returning = self._returning
        if returning is not None and returning is not threading.current_thread():
            self._is_awaited = True
            returning.join(_PATIENCE_SECS)
            self._is_awaited = False

    # --- what is saved ---

    def mark(self) -> int | None:
        """The generation of a snapshot that was just taken, for :meth:`admits`; ``None`` after an observation."""
        return self._generation if self._sight is None else None

    def admits(self, snapshot: Snapshot, mark: int | None) -> bool:
        """Whether ``snapshot`` may be committed; act on one that is not finite. The caller holds ``one_save``."""
        if mark != self._generation:
            _log.info("step %s is not saved: something was not finite before", snapshot.step)
            return False
        names = self._engine.non_finite(snapshot)
        if not names:
            return True
        text = f"the state to be saved is not finite at step {shown(snapshot.step)}: {listed(names)}"
        self._see(_Sight(snapshot.step, tuple(names), text))
        return False

    # --- what is done about it ---

    def _see(self, sight: _Sight) -> None:
        with self._lock:
            if self._sight is not None:
                return
            self._sight = sight
            may_return = self._way_back.is_open and not self._is_over
            if may_return:
                self._returning = threading.Thread(
                    target=self._return, args=(sight,), name="stepguard-nan-guard", daemon=True
                )
                self._returning.start()
        if not may_return:
            self._fail(self._way_back.why_not())

    def _fail(self, why: str = "", cause: BaseException | None = None) -> None:
        """Stop the run with the observation as its error."""
        sight = self._sight
        assert sight is not None
        hint = (
            ", or with Guarding(nan_guard='return'), which goes back and on by itself"
            if self._way_back.is_advisable
            else ""
        )
        error = NonFiniteError(
            f"{sight.text}{'; ' if why else ''}{why}. {self._way_back.saved_text()}Look at the step that made it "
            f"(the data, the learning rate), and start again{hint}",
            step=sight.step,
            names=sight.names,
        )
        error.__cause__ = cause
        self._on_error(error)
        # End even a loop that never asks should_stop().
        if self._session is not None:
            self._engine.stop_at_boundary(self._session, self._coord.main_thread_was_told)

    def _return(self, sight: _Sight) -> None:
        try:
            self._go_back(sight)
        except Exception as error:  # noqa: BLE001 - a thread's edge: the coordinator carries this
            self._fail(f"the run could not return to a good checkpoint ({describe(error)})", error)

    def _go_back(self, sight: _Sight) -> None:
        deadline = time.monotonic() + _PATIENCE_SECS
        # After a stop request, leave `_sight` set, so that `end` reports it.
        while not self._coord.should_stop():
            if self._loops is not None and self._loops.is_resting(self._session) and not self._is_awaited:
                # Between two loops the model may hold other values, which the program would put back after a return.
                self._coord.wait_for_stop(_PAUSE_SECS)
                deadline = time.monotonic() + _PATIENCE_SECS
                continue
            try:
                # In this order: the program's own saves already hold `one_save` when they take a boundary.
                with self._one_save, self._engine.at_boundary(self._session, "the return to a good checkpoint"):
                    if self._coord.should_stop():
                        return
                    checkpoint, to_step = self._way_back.take(self._session)
                    self._is_back()
            except NoBoundaryError as error:
                if time.monotonic() > deadline:
                    raise
                _log.info("the return waits: %s", error)
                self._coord.wait_for_stop(_PAUSE_SECS)
                continue
            self._tell(sight, checkpoint, to_step)
            return

    def _is_back(self) -> None:
        with self._lock:
            self._generation += 1
            self._progress_at_return = self._engine.progress(self._session)
            self._sight = None

    def _tell(self, sight: _Sight, checkpoint: Checkpoint, to_step: int | None) -> None:
        number, message = self._way_back.note(sight.text, checkpoint, to_step)
        _log.warning("%s", message)
        self._observer.returned(step=sight.step, to_step=to_step, reason=sight.text, number=number, message=message)
