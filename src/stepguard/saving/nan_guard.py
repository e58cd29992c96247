"""The NaN guard: a number or a state that is not finite stops the run, or takes it back to a good checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stepguard.coordination.coordinator import Coordinator
from stepguard.engine import Engine, EventLog, RestsBetweenLoops, Snapshot
from stepguard.errors import CheckpointCorruptError, NoBoundaryError, NonFiniteError
from stepguard.options import Guarding
from stepguard.store import Checkpoint, CheckpointStore
from stepguard.watching.observer import Observer
from stepguard.watching.run_record import describe
from stepguard.words import listed

_log = logging.getLogger(__name__)

# So long is a step boundary for a return waited for, on top of the engine's own patience with a long step.
_PATIENCE_SECS = 60.0
_PAUSE_SECS = 0.05


@dataclass(frozen=True, slots=True)
class _Sight:
    """What was seen that is not finite."""

    step: int | None
    names: tuple[str, ...]
    text: str


class NanGuard:
    """Watches one session at a time for numbers and states that are not finite.

    With ``"stop"`` the first one is an error of the run, a :class:`NonFiniteError`. With ``"return"`` the session is
    put back, between two steps, to the newest good checkpoint; after ``nan_returns`` of those, the next one is that
    error. A snapshot that is not finite is never committed, nor one taken between a sight and what is done about it.

    Threads: :meth:`look`, :meth:`settle`, :meth:`mark` and :meth:`admits` by any; the others by whoever opens and stops
    the session. ``on_error`` is called with the error of the run, ``on_return`` at the boundary at which the session
    was put back; ``one_save`` is held then, so that no checkpoint is being committed meanwhile.
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
        on_return: Callable[[], None],
    ) -> None:
        self._returns_left = options.nan_returns if options.returns else 0
        self._options = options
        self._engine = engine
        self._coord = coord
        self._store = store
        self._events = events
        self._observer = observer
        self._one_save = one_save
        self._on_error = on_error
        self._on_return = on_return
        self._lock = threading.Lock()
        self._session: Any = None
        self._sight: _Sight | None = None
        self._history: list[str] = []
        self._is_over = False
        self._returning: threading.Thread | None = None
        self._loops = engine if isinstance(engine, RestsBetweenLoops) else None
        # Whether a thread that trains waits for the return, and so has the state back from whatever it lent it to.
        self._is_awaited = False
        # Snapshots of before a return are not committed after it. The progress at the last return, if there was one.
        self._generation = 0
        self._progress_at_return: object = None

    # --- the life of a session ---

    def begin(self, session: Any) -> None:
        """Watch ``session`` from now on, and no other."""
        self.end(was_asked=True)
        self._session = session
        self._sight = None
        self._progress_at_return = None
        self._generation += 1
        self._is_over = False
        self._engine.watch_values(session, self)

    def end(self, *, was_asked: bool, within_secs: float | None = None) -> bool:
        """The training loop is over; ``was_asked`` says whether it was asked to stop. Whether all is well.

        A loop that ended by itself while its session was put back has not come to where it wanted to: an error.
        ``within_secs`` is how long a return that is under way is waited for; ``None``: until it is done.
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
            with contextlib.suppress(Exception):  # A session that was lost has an error of its own.
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
        """Look at numbers of the program, by their names; ``step`` is theirs, by default that of the session.

        Returns whether one of them is not finite. What is done about it then is done by other threads, or at the next
        step boundary: see :meth:`settle`. While it is still to be done, nothing more is looked at.
        """
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if not bad:
            return False
        if step is None:
            with contextlib.suppress(Exception):  # A closed session: the number is what counts.
                step = self._engine.step(self._session)
        shown = listed(f"{name} is {value}" for name, value in bad.items())
        self._see(_Sight(step, tuple(bad), f"{shown} at step {_shown(step)}"))
        return True

    def settle(self) -> None:
        """Wait for the return that :meth:`look` has asked for, if any. By a thread that trains, between two steps."""
        returning = self._returning
        if returning is not None and returning is not threading.current_thread():
            self._is_awaited = True
            returning.join(_PATIENCE_SECS)
            self._is_awaited = False

    # --- what is saved ---

    def mark(self) -> int | None:
        """What belongs to a snapshot that was just taken, for :meth:`admits`."""
        return self._generation if self._sight is None else None

    def admits(self, snapshot: Snapshot, mark: int | None) -> bool:
        """Whether ``snapshot`` may be committed; one that is not finite is dealt with. By who holds ``one_save``."""
        if mark != self._generation:
            _log.info("step %s is not saved: something was not finite before", snapshot.step)
            return False
        names = self._engine.non_finite(snapshot)
        if not names:
            return True
        text = f"the state to be saved is not finite at step {_shown(snapshot.step)}: {listed(names)}"
        self._see(_Sight(snapshot.step, tuple(names), text))
        return False

    # --- what is done about it ---

    def _see(self, sight: _Sight) -> None:
        with self._lock:
            if self._sight is not None:
                return
            self._sight = sight
            may_return = self._returns_left > 0 and not self._is_over
            if may_return:
                self._returning = threading.Thread(
                    target=self._return, args=(sight,), name="stepguard-nan-guard", daemon=True
                )
                self._returning.start()
        if not may_return:
            self._fail(self._history_text())

    def _fail(self, why: str = "", cause: BaseException | None = None) -> None:
        """The run is to stop, with what was seen as its error."""
        sight = self._sight
        assert sight is not None
        hint = (
            ", or with Guarding(nan_guard='return'), which goes back and on by itself"
            if self._may_advise_return()
            else ""
        )
        error = NonFiniteError(
            f"{sight.text}{'; ' if why else ''}{why}. {self._saved_text()}Look at the step that made it "
            f"(the data, the learning rate), and start again{hint}",
            step=sight.step,
            names=sight.names,
        )
        error.__cause__ = cause
        self._on_error(error)
        # A loop that never asks whether to stop ends as well.
        if self._session is not None:
            self._engine.stop_at_boundary(self._session, self._coord.main_thread_was_told)

    def _may_advise_return(self) -> bool:
        return not self._options.returns and self._store is not None and self._engine.can_return

    def _saved_text(self) -> str:
        """What there is to go on from, as far as this process knows: one that saves nothing itself does not."""
        if self._store is None:
            return ""
        newest = None
        with contextlib.suppress(OSError):
            newest = next((one for one in self._store.candidates() if one.is_committed), None)
        if newest is None:
            return "There is no checkpoint to go on from; nothing later is saved. "
        return f"The newest checkpoint is {newest.path} (step {_shown(newest.step)}); nothing later is saved. "

    def _history_text(self) -> str:
        if not self._options.returns:
            return ""
        if self._returns_left:
            return "the training loop had ended, so the run did not return to a good checkpoint"
        returned = f"the run has returned {len(self._history)} of at most {self._options.nan_returns} times"
        return f"{returned} ({'; '.join(self._history)})" if self._history else returned

    def _return(self, sight: _Sight) -> None:
        try:
            self._go_back(sight)
        except Exception as error:  # noqa: BLE001 - a thread's edge: the coordinator carries this
            self._fail(f"the run could not return to a good checkpoint ({describe(error)})", error)

    def _go_back(self, sight: _Sight) -> None:
        deadline = time.monotonic() + _PATIENCE_SECS
        # A stop that comes first leaves the sight where it is, for `end`.
        while not self._coord.should_stop():
            if self._loops is not None and self._loops.is_resting(self._session) and not self._is_awaited:
                # What the model holds between two loops may be something else, which would be put back after this.
                self._coord.wait_for_stop(_PAUSE_SECS)
                deadline = time.monotonic() + _PATIENCE_SECS
                continue
            try:
                # In this order: the program's own saves hold the one when they come to a boundary.
                with self._one_save, self._engine.at_boundary(self._session, "the return to a good checkpoint"):
                    if self._coord.should_stop():
                        return
                    checkpoint, to_step = self._put_back()
            except NoBoundaryError as error:
                if time.monotonic() > deadline:
                    raise
                _log.info("the return waits: %s", error)
                self._coord.wait_for_stop(_PAUSE_SECS)
                continue
            self._tell(sight, checkpoint, to_step)
            return

    def _put_back(self) -> tuple[Checkpoint, int | None]:
        engine, session, store = self._engine, self._session, self._store
        assert store is not None

        def attempt(checkpoint: Checkpoint) -> None:
            if checkpoint.manifest is None:
                raise CheckpointCorruptError("it has no manifest, so nobody has looked at it", path=checkpoint.path)
            engine.restore(session, checkpoint, in_run=True)
            # It may be of a run without a guard.
            names = engine.non_finite(engine.snapshot(session))
            if names:
                raise CheckpointCorruptError(f"it is not finite: {listed(names)}", path=checkpoint.path)

        checkpoint = store.newest_good(attempt=attempt, quarantine=False).checkpoint
        if checkpoint is None:
            raise FileNotFoundError(f"no checkpoint was saved in {store.root} yet; save more often")
        to_step = engine.step(session)
        if self._events is not None and to_step is not None:
            # TensorBoard drops what was left behind of the curves.
            self._events.started(to_step)
        self._on_return()
        with self._lock:
            self._returns_left -= 1
            self._generation += 1
            self._progress_at_return = engine.progress(session)
            self._sight = None
        return checkpoint, to_step

    def _tell(self, sight: _Sight, checkpoint: Checkpoint, to_step: int | None) -> None:
        self._history.append(f"{sight.text}: back to step {_shown(to_step)}")
        number = len(self._history)
        message = (
            f"{sight.text}: the run has returned to {checkpoint.name} (step {_shown(to_step)}), "
            f"{number} of at most {self._options.nan_returns} times"
        )
        _log.warning("%s", message)
        self._observer.returned(step=sight.step, to_step=to_step, reason=sight.text, number=number, message=message)


def _shown(step: int | None) -> str:
    return "unknown" if step is None else str(step)
