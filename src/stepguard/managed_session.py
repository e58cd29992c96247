"""The context that a training loop lives in: it opens the session, and ends the run however the block is left.

Three threads may meet here. The main thread opens the session and runs the loop. On SIGTERM, or another signal that
stops the run, the watch of ``coordination/signals.py`` sets the stop flag and starts the patience thread. The patience
thread waits until the main thread leaves the block, or until the grace period is over; then it saves the last step and
closes the session itself, so that a loop blocked in native code returns. If the main thread still does not leave,
because it sleeps or waits for a queue of the program's own, the patience thread stops the run and ends the process. A
session that drives its own loops is not closed, because its loop ends at the next boundary; between two loops the
patience thread saves the last step at once. A main thread that leaves the block wakes the patience thread and then
joins it, so only one of them saves and closes at a time. The join ends: the patience thread waits for nothing but its
save, whose limit is the grace period, or it ends the process. A kill at any point costs only the steps since the last
committed checkpoint.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import ParamSpec, Protocol, TypeVar

from stepguard.coordination.process_exit import has_threads
from stepguard.coordination.signals import SignalWatch, end_by_error, show_as_line
from stepguard.engine import SessionT
from stepguard.errors import StopRequested, add_note, described
from stepguard.stops import COMMAND, ERROR, FINISHED, TIME_LIMIT
from stepguard.watching import launcher_link
from stepguard.words import logger

_log = logger(__name__)

# How long a main thread whose session was closed has to leave the block.
_LEAVING_SECS = 5.0

P = ParamSpec("P")
T = TypeVar("T")


class Supervision(Protocol[SessionT]):
    """The part of a supervisor that a managed session uses, for one run."""

    @property
    def grace_secs(self) -> float:
        """How long a loop may go on after a signal, in seconds."""

    def exit_code(self, reason: str) -> int | None:
        """The exit code of a process whose run has ended by ``reason``; ``None`` unless the program has chosen one."""

    @property
    def stop_reason(self) -> str | None:
        """Who asked for the stop before the run was over; ``None`` if nobody did."""

    @property
    def stop_signals(self) -> Sequence[signal.Signals]:
        """The signals that end the run at the next step boundary."""

    def open(self) -> SessionT:
        """Open a prepared session."""

    def request_stop(self, error: BaseException | None) -> None:
        """Ask everything to stop, because of ``error`` if there is one. Any thread."""

    def ask_stop(self, reason: str) -> None:
        """Ask everything to stop on behalf of ``reason``. Any thread."""

    def stop_at_boundary(self, session: SessionT) -> None:
        """Let no further step begin. Any thread."""

    def note_end(self, reason: str) -> None:
        """Record why the run ends, when no error ends it."""

    def ending(self) -> str:
        """One line that says at which step the run stopped and which step is saved. After :meth:`stop`."""

    def ends_by_itself(self, session: SessionT) -> bool:
        """Whether the loop itself ends at its next boundary. Between two loops, this call also saves the last step."""

    def save(self) -> None:
        """Save the last step while the services still run. Any thread."""

    def stop(self) -> None:
        """Stop the services, and save the last step."""

    def close(self, session: SessionT) -> None:
        """Close the session. Any thread."""


class ManagedSession(AbstractContextManager[SessionT]):
    """Opens a session, and ends the run when its block is left: threads stopped, last step saved, session closed.

    As a decorator, it runs each call of the function in a session of its own.
    """

    def __init__(self, run: Supervision[SessionT]) -> None:
        self._run = run
        self._session: SessionT | None = None
        self._signals = SignalWatch(run.stop_signals, self._on_signal, is_echoed=launcher_link.attempt() is not None)
        self._left = threading.Event()
        self._pid = os.getpid()
        self._patience: threading.Thread | None = None

    def __call__(self, function: Callable[P, T]) -> Callable[P, T | None]:
        """Wrap ``function`` in a session per call. The call returns ``None`` when end of input or a stop ends it."""

        @functools.wraps(function)
        def supervised(*args: P.args, **kwargs: P.kwargs) -> T | None:
            with ManagedSession(self._run):
                return function(*args, **kwargs)
            return None

        return supervised

    def __enter__(self) -> SessionT:
        self._pid = os.getpid()
        self._signals.start()
        launcher_link.answers(self._signals.watched)
        try:
            self._session = self._run.open()
            if self._signals.received:
                # The signal may have set the stop flag before the preparation cleared it: set the flag again.
                self._stop_at_boundary()
        except BaseException as error:
            # Raise an error of the preparation unchanged, even if its type means "end of input" during a run.
            self._end_quietly(error)
            if isinstance(error, Exception):
                self._end_by_error(error, was_open=False)
            raise
        return self._session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not has_threads(self._pid):
            # A child that was forked inside the block leaves the run, and the threads that end it, to its parent. While
            # the interpreter ends, a generator leaves its block, and the exit of the process has ended the run before.
            return False
        if self._signals.received:
            self._run.note_end(self._signals.reason)
        if error is not None and not isinstance(error, (Exception, StopRequested)):
            # Ctrl-C or sys.exit: this error itself tells the program that the run is over, so it passes on.
            is_interrupt = isinstance(error, KeyboardInterrupt)
            self._run.note_end("interrupt" if is_interrupt else "exit")
            has_stopped_well = self._end_quietly(error)
            if is_interrupt:
                self._end_by_interrupt(error, has_stopped_well=has_stopped_well)
            elif self._signals.received:
                self._say_ending()
            return False
        try:
            try:
                if isinstance(error, Exception):
                    self._run.request_stop(error)
            finally:
                # request_stop raises `error` at once if the program has already stopped the run.
                self._end()
        except BaseException as raised:
            if raised is error:
                # Raising it again has put our frames between those of the program.
                error.__traceback__ = traceback
            if isinstance(raised, Exception):
                self._end_by_error(raised, was_open=True)
            if raised is error:
                return False
            raise
        if self._signals.received:
            self._say_ending()
            self._signals.end_process(self._run.exit_code(self._signals.reason))
        reason = self._run.stop_reason
        if reason in (TIME_LIMIT, COMMAND):
            self._say_ending()
        exit_code = self._run.exit_code(reason or FINISHED)
        if exit_code is not None:
            raise SystemExit(exit_code)
        # Swallow the error: the coordinator took it for the end of the input, and no other error followed.
        return True

    def _end_by_interrupt(self, error: BaseException, *, has_stopped_well: bool) -> None:
        exit_code = self._run.exit_code("interrupt")
        if has_stopped_well and exit_code is not None:
            self._say_ending()
            raise SystemExit(exit_code) from error
        show_as_line(error, self._run.ending())

    def _end_by_error(self, error: Exception, *, was_open: bool) -> None:
        """End the process after ``error`` if a signal told it to end, or the program has chosen an exit code for it."""
        exit_code = self._run.exit_code(ERROR)
        if self._signals.received:
            # The program must not catch this and go on: the process was told to end.
            by = self._signals.name
            _log.error("ended by %s, and by an error, %s", by, described(error), exc_info=error)
            if was_open:
                self._say_ending()
            self._signals.end_process(exit_code)
        if exit_code is not None:
            end_by_error(error, exit_code)

    def _on_signal(self) -> None:
        self._stop_at_boundary()
        patience = threading.Thread(target=self._lose_patience, name="stepguard-signal-grace", daemon=True)
        patience.start()
        # Assign after the start: the main thread may leave the block now, and joins whatever it finds here.
        self._patience = patience

    def _lose_patience(self) -> None:
        """After the grace period, save and close the session of a loop that reaches no boundary by itself."""
        grace_secs, by = self._run.grace_secs, self._signals.name
        session = self._session
        is_loop = session is not None and self._run.ends_by_itself(session)
        if self._left.wait(min(grace_secs, threading.TIMEOUT_MAX)):
            return
        session = self._session
        if session is None:
            _log.error("the preparation goes on %g s after %s: the process ends", grace_secs, by)
            self._signals.end_process()
            return
        if is_loop:
            # Closing the session would end no wait, and would lose the step that is being done.
            _log.warning("the program goes on %g s after %s: its last step is saved when it is done", grace_secs, by)
            return
        _log.warning("the training loop goes on %g s after %s: its session is closed now", grace_secs, by)
        self._run.note_end(self._signals.reason)
        self._run.save()
        self._run.close(session)
        if not self._left.wait(_LEAVING_SECS):
            self._end_stuck_program()

    def _end_stuck_program(self) -> None:
        """End the process although its main thread waits for something that is neither a step nor a session."""
        _log.error("the program waits for something else than its session, and does not end: the process ends")
        try:
            self._run.stop()
        except Exception as error:  # noqa: BLE001 - nobody is left to raise it to
            _log.error("while stopping: %s", described(error))
        self._say_ending()
        self._signals.end_process()

    def _say_ending(self) -> None:
        """Say which step is saved. Ctrl-C says it as well: its error shows the line unless the program catches it."""
        _log.warning("%s", self._run.ending())

    def _stop_at_boundary(self) -> None:
        self._run.ask_stop(self._signals.reason)
        session = self._session
        if session is not None:
            self._run.stop_at_boundary(session)

    def _end(self) -> None:
        self._left.set()
        patience = self._patience
        if patience is not None:
            # The patience thread may be saving the last step.
            patience.join()
        try:
            self._run.stop()
        finally:
            try:
                if self._session is not None:
                    self._run.close(self._session)
                    self._session = None
            finally:
                self._signals.finish()
                launcher_link.answers(())

    def _end_quietly(self, error: BaseException) -> bool:
        """End the run, and return whether that succeeded."""
        try:
            self._end()
        except Exception as later:  # noqa: BLE001 - `error` is on its way out, and carries this one
            if later is not error:
                add_note(error, f"while stopping: {described(later)}")
            return False
        return True
