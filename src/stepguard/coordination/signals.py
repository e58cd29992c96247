"""SIGTERM during a run: stop at the next step boundary, save a last checkpoint, and end the process by the signal.

SIGUSR1 does the same where nothing else handles it, instead of killing the process: Slurm (``--signal=USR1@60``) and
others send it as a warning some time before the end of a job.

The protocol: a Python signal handler runs in the main thread, between two bytecodes. It never runs while that thread
waits in native code for input that only a stop would end. The interpreter's C handler, however, writes the number of
each signal to a file descriptor (a socket) at once, and the thread ``stepguard-sigterm`` blocks in a read of the other
end. That thread calls ``on_sigterm``, which only sets flags and starts threads. It must not wait for the main thread,
because :meth:`SigtermWatch.finish` runs there, shuts the socket down to end the read, and joins the watch thread. Only
the C handler writes to the socket, and it never blocks: a full socket drops the byte. A second SIGTERM ends the process
from the watch thread, since the main thread may never return to Python; like any kill, it leaves the newest committed
checkpoint. A forked child closes its copies of the socket before it can receive a SIGTERM.
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
from collections.abc import Callable
from types import FrameType, TracebackType

from stepguard.words import logger

_log = logger(__name__)

_REASONS = {signal.SIGTERM: "sigterm", signal.SIGUSR1: "sigusr1"}
# A second SIGTERM within this time of the first is the same one, passed on by a launcher.
_ECHO_SECS = 0.5


class SigtermWatch:
    """Calls ``on_sigterm`` at the first SIGTERM or SIGUSR1, and ends the process at once at the second SIGTERM.

    The watch does nothing outside the main thread, or if the program has its own SIGTERM handler or wake-up descriptor.
    ``is_echoed`` says that a launcher may pass on a signal which the process itself has already received. Call
    :meth:`start` and :meth:`finish` in the same thread.
    """

    def __init__(self, on_sigterm: Callable[[], None], *, is_echoed: bool = False) -> None:
        self._on_sigterm = on_sigterm
        self._is_echoed = is_echoed
        # The signal that has asked for the stop; the number of SIGTERMs, and when the first of these came.
        self._number: signal.Signals | None = None
        self._sigterms = 0
        self._first_at = 0.0
        self._watched: list[signal.Signals] = []
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None

    @property
    def received(self) -> bool:
        """Whether one of the signals has arrived."""
        return self._number is not None

    @property
    def reason(self) -> str:
        """The reason of the stop as the ledger says it: the name of the first signal."""
        return _REASONS[self._number or signal.SIGTERM]

    def start(self) -> None:
        """Watch for SIGTERM, unless the program handles it."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            _log.debug("SIGTERM has a handler of the program's own: it is left alone")
            return
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        if previous != -1:
            signal.set_wakeup_fd(previous)
            reader.close()
            writer.close()
            _log.debug("the wake-up descriptor for signals is in use: SIGTERM keeps its default action")
            return
        self._ends = (reader, writer)
        _watches.add(self)
        self._thread = threading.Thread(target=self._watch, args=(reader,), name="stepguard-sigterm", daemon=True)
        self._thread.start()
        for number in _REASONS:
            if number == signal.SIGTERM or has_default_action(number):
                signal.signal(number, _wake)
                self._watched.append(number)

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
        """Restore the default actions; return whether SIGTERM was still handled by this watch."""
        is_handled = signal.getsignal(signal.SIGTERM) is _wake
        for number in self._watched:
            if signal.getsignal(number) is _wake:
                signal.signal(number, signal.SIG_DFL)
        return is_handled

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
                if number == signal.SIGTERM:
                    self._sigterm()
                elif number in self._watched:
                    self._ask(signal.Signals(number))

    def _sigterm(self) -> None:
        now = time.monotonic()
        if self._sigterms and now < self._first_at + _ECHO_SECS and self._is_echoed:
            # A signal to all processes of a job also reaches the launcher, which passes it on to this process.
            return
        self._sigterms += 1
        if self._sigterms == 1:
            self._first_at = now
            self._ask(signal.SIGTERM)
        else:
            # The code that a shell reports for a process ended by SIGTERM. Exit from here, because the main thread may
            # never return to Python.
            os._exit(128 + signal.SIGTERM)

    def _ask(self, number: signal.Signals) -> None:
        if self._number is not None:
            return
        self._number = number
        second = "one" if number == signal.SIGTERM else "signal, SIGTERM,"
        _log.warning(
            "%s: stopping at the next step boundary; a second %s ends the process at once", number.name, second
        )
        self._on_sigterm()


def has_default_action(number: signal.Signals) -> bool:
    """Whether nothing in this process handles the signal. ``faulthandler.register`` does so unknown to `signal`."""
    if signal.getsignal(number) is not signal.SIG_DFL:
        return False
    try:
        # Bytes: a decoder may have to be imported, and a process without its user's rights may not reach it.
        with open("/proc/self/status", "rb") as status:
            caught = next(line.split()[1] for line in status if line.startswith(b"SigCgt:"))
    except (OSError, StopIteration):
        return True  # Not Linux.
    return not int(caught, 16) >> (number - 1) & 1


def end_by_signal(number: signal.Signals, exit_code: int | None = None) -> None:
    """End the process by the signal, so that the sender sees that it was obeyed; or with ``exit_code`` if given."""
    # No Python code runs after this, so flush the standard streams and the log files now.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    logging.shutdown()
    if exit_code is not None:
        os._exit(exit_code)
    os.kill(os.getpid(), number)
    # The kernel does not deliver the signal to the first process of a container.
    os._exit(128 + number)


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


_watches: weakref.WeakSet[SigtermWatch] = weakref.WeakSet()
_mask_before_fork = threading.local()


def _before_fork() -> None:
    # Block the signals until the child has closed the socket: the parent would take the child's signal for its own.
    _mask_before_fork.value = signal.pthread_sigmask(signal.SIG_BLOCK, set(_REASONS)) if _watches else None


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
