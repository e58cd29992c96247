"""Signals that stop a run: at the next step boundary it saves a last checkpoint, and the process ends by the signal.

SIGTERM is one by default. So is SIGUSR1, which would otherwise kill the process: Slurm (``--signal=USR1@60``) and
others send it as a warning some time before the end of a job. A signal that the program handles is left to it.

The protocol: a Python signal handler runs in the main thread, between two bytecodes. It never runs while that thread
waits in native code for input that only a stop would end. The interpreter's C handler, however, writes the number of
each signal to a file descriptor (a socket) at once, and the thread ``stepguard-signals`` blocks in a read of the other
end. That thread calls ``on_signal``, which only sets flags and starts threads. It must not wait for the main thread,
because :meth:`SignalWatch.finish` runs there, shuts the socket down to end the read, and joins the watch thread. Only
the C handler writes to the socket, and it never blocks: a full socket drops the byte. A second SIGTERM or SIGINT ends
the process from the watch thread, since the main thread may never return to Python; like any kill, it leaves the newest
committed checkpoint. A forked child closes its copies of the socket before it can receive a signal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn

from stepguard.disk import system
from stepguard.stops import REASON_OF
from stepguard.words import logger

_log = logger(__name__)

# Sent once each, by a scheduler or a person who means it: a second one ends the process. Warnings may be repeated.
_URGENT = (signal.SIGTERM, signal.SIGINT)
# A second signal within this time of the first is the same one, passed on by a launcher.
_ECHO_SECS = 0.5


class SignalWatch:
    """Calls ``on_signal`` at the first of ``signals``, and ends the process at once at the second SIGTERM or SIGINT.

    The watch leaves a signal that the program handles alone, and does nothing outside the main thread, or if the
    program has a wake-up descriptor of its own. ``is_echoed`` says that a launcher may pass on a signal which the
    process itself has already received. Call :meth:`start` and :meth:`finish` in the same thread.
    """

    def __init__(
        self, signals: Sequence[signal.Signals], on_signal: Callable[[], None], *, is_echoed: bool = False
    ) -> None:
        self._signals = signals
        self._on_signal = on_signal
        self._is_echoed = is_echoed
        # The signal that has asked for the stop; and when the first of each urgent one came.
        self._number: signal.Signals | None = None
        self._first_at: dict[int, float] = {}
        # What was there before, for each signal that is watched.
        self._before: dict[signal.Signals, Any] = {}
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None

    @property
    def received(self) -> bool:
        """Whether one of the signals has arrived."""
        return self._number is not None

    @property
    def name(self) -> str:
        """The name of the first signal, such as "SIGTERM"."""
        return (self._number or signal.SIGTERM).name

    @property
    def reason(self) -> str:
        """The reason of the stop as the ledger says it."""
        return REASON_OF[self._number or signal.SIGTERM]

    @property
    def watched(self) -> list[signal.Signals]:
        """The signals that are watched now."""
        return list(self._before)

    def start(self) -> None:
        """Watch for the signals, except for those that the program handles."""
        if threading.current_thread() is not threading.main_thread():
            return
        free = [one for one in self._signals if _is_free(one)]
        for one in set(self._signals) - set(free):
            _log.debug("%s has a handler of the program's own: it is left alone", one.name)
        if not free:
            return
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        if previous != -1:
            signal.set_wakeup_fd(previous)
            reader.close()
            writer.close()
            _log.debug("the wake-up descriptor for signals is in use: they keep their default actions")
            return
        self._ends = (reader, writer)
        _watches.add(self)
        self._thread = threading.Thread(target=self._watch, args=(reader,), name="stepguard-signals", daemon=True)
        self._thread.start()
        for number in free:
            self._before[number] = signal.signal(number, _wake)

    def finish(self) -> None:
        """Stop watching, and restore the default actions."""
        if self._ends is None:
            return
        reader, writer = self._ends
        self._ends = None
        self._put_default_actions_back()
        signal.set_wakeup_fd(-1)
        # Closing alone may not end the thread's read, because a forked process may hold another copy of the writer.
        writer.shutdown(socket.SHUT_RDWR)
        writer.close()
        if self._thread is not None:
            self._thread.join()
        reader.close()

    def _put_default_actions_back(self) -> bool:
        """Restore the default actions; return whether one of the signals was still handled by this watch."""
        handled = [one for one in self._before if signal.getsignal(one) is _wake]
        for number in handled:
            signal.signal(number, self._before[number])
        self._before = {}
        return bool(handled)

    def end_process(self, exit_code: int | None = None) -> None:
        """End the process by the signal that was received, or with ``exit_code`` if given."""
        end_by_signal(self._number or signal.SIGTERM, exit_code)

    def _forget_in_child(self) -> None:
        """Close the socket in a forked child: the parent would take the child's signals for its own."""
        if self._ends is None:
            return
        ends, self._ends, self._thread = self._ends, None, None
        if self._put_default_actions_back():
            signal.set_wakeup_fd(-1)
        for end in ends:
            end.close()

    def _watch(self, reader: socket.socket) -> None:
        while numbers := reader.recv(64):
            for number in numbers:
                # The descriptor tells of every signal that Python handles.
                if number in self._before:
                    self._received(signal.Signals(number))

    def _received(self, number: signal.Signals) -> None:
        now = time.monotonic()
        first_at = self._first_at.setdefault(number, now)
        if first_at == now or number not in _URGENT:
            self._ask(number)
        elif not self._is_echoed or now >= first_at + _ECHO_SECS:
            # The code that a shell reports for a process ended by the signal. Exit from here, because the main thread
            # may never return to Python. An echo is a signal to all processes of a job, which also reaches the
            # launcher, and is passed on by it.
            os._exit(128 + number)

    def _ask(self, number: signal.Signals) -> None:
        if self._number is not None:
            return
        self._number = number
        at_once = "; a second one ends the process at once" if number in _URGENT else ""
        _log.warning("%s: stopping at the next step boundary%s", number.name, at_once)
        self._on_signal()


def _is_free(number: signal.Signals) -> bool:
    """Whether a watch may have the signal: the program does not handle it, and leaves Ctrl-C to Python."""
    if number == signal.SIGINT:
        return signal.getsignal(number) is signal.default_int_handler
    if number == signal.SIGTERM:
        # Libraries that handle it in native code, such as JAX's preemption service, wait for a loop that asks them.
        return signal.getsignal(number) is signal.SIG_DFL
    return has_default_action(number)


def has_default_action(number: signal.Signals) -> bool:
    """Whether nothing in this process handles the signal. ``faulthandler.register`` does so unknown to `signal`."""
    if signal.getsignal(number) is not signal.SIG_DFL:
        return False
    return not system.is_caught(number)


def end_by_signal(number: signal.Signals, exit_code: int | None = None) -> None:
    """End the process by the signal, so that the sender sees that it was obeyed; or with ``exit_code`` if given."""
    # No Python code runs after this, so flush the standard streams and the log files now.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    logging.shutdown()
    if exit_code is not None:
        os._exit(exit_code)
    if threading.current_thread() is threading.main_thread():
        # Python's own handler of SIGINT would raise an error instead.
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    # The kernel does not deliver the signal to the first process of a container.
    os._exit(128 + number)


def end_by_error(error: Exception, exit_code: int) -> NoReturn:
    """Show ``error`` as the interpreter shows one that nothing has caught, and end the program with ``exit_code``.

    Raises:
        SystemExit: always; it ends the program unless that catches it.
    """
    sys.excepthook(type(error), error, error.__traceback__)
    raise SystemExit(exit_code) from error


def show_as_line(error: BaseException, line: str) -> None:
    """Make ``error`` print ``line`` instead of a traceback if nothing catches it. The exit code stays the same."""
    error.__dict__["stepguard_line"] = line
    hook = sys.excepthook
    if not isinstance(hook, _LineHook):
        sys.excepthook = _LineHook(hook)


class _LineHook:
    """An exception hook for the errors of `show_as_line`; it passes all others to the previous hook."""

    def __init__(self, before: Callable[[type[BaseException], BaseException, TracebackType | None], object]) -> None:
        self._before = before

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        line = getattr(error, "stepguard_line", None)
        if line is None:
            self._before(kind, error, traceback)
            return
        print("; ".join([line, *getattr(error, "__notes__", ())]), file=sys.stderr)


def _wake(number: int, frame: FrameType | None) -> None:
    """Do nothing: with a Python handler installed, the interpreter writes each signal to the wake-up descriptor."""


_watches: weakref.WeakSet[SignalWatch] = weakref.WeakSet()
_mask_before_fork = threading.local()


def _before_fork() -> None:
    # Block the signals until the child has closed the socket: the parent would take the child's signal for its own.
    _mask_before_fork.value = signal.pthread_sigmask(signal.SIG_BLOCK, set(REASON_OF)) if _watches else None


def _after_fork_in_parent() -> None:
    mask = getattr(_mask_before_fork, "value", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    for watch in list(_watches):
        watch._forget_in_child()
    _after_fork_in_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
