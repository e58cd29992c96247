"""SIGTERM during a run: stop at the next step boundary, save a last checkpoint, and end the process by the signal.

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

# A second SIGTERM within this time of the first is the same one, passed on by a launcher.
_ECHO_SECS = 0.5


class SigtermWatch:
    """Calls ``on_sigterm`` at the first SIGTERM, and ends the process at once at the second.

    The watch does nothing outside the main thread, or if the program has its own SIGTERM handler or wake-up descriptor.
    ``is_echoed`` says that a launcher may pass on a signal which the process itself has already received. Call
    :meth:`start` and :meth:`finish` in the same thread.
    """

    def __init__(self, on_sigterm: Callable[[], None], *, is_echoed: bool = False) -> None:
        self._on_sigterm = on_sigterm
        self._is_echoed = is_echoed
        self._received = 0
        self._first_at = 0.0
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None

    @property
    def received(self) -> bool:
        """Whether a SIGTERM has arrived."""
        return self._received > 0

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
        signal.signal(signal.SIGTERM, _wake)

    def finish(self) -> None:
        """Stop watching, and restore the default action of SIGTERM."""
        if self._ends is None:
            return
        reader, writer = self._ends
        self._ends = None
        if signal.getsignal(signal.SIGTERM) is _wake:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        # Closing alone may not end the thread's read, because a forked process may hold another copy of the writer.
        writer.shutdown(socket.SHUT_RDWR)
        writer.close()
        if self._thread is not None:
            self._thread.join()
        reader.close()

    def _forget_in_child(self) -> None:
        """Close the socket in a forked child: the parent would take the child's signals for its own."""
        if self._ends is None:
            return
        ends, self._ends, self._thread = self._ends, None, None
        if signal.getsignal(signal.SIGTERM) is _wake:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
        for end in ends:
            end.close()

    def _watch(self, reader: socket.socket) -> None:
        while numbers := reader.recv(64):
            for number in numbers:
                if number == signal.SIGTERM:
                    self._sigterm()

    def _sigterm(self) -> None:
        now = time.monotonic()
        if self._received and now < self._first_at + _ECHO_SECS and self._is_echoed:
            # A signal to all processes of a job also reaches the launcher, which passes it on to this process.
            return
        self._received += 1
        if self._received == 1:
            self._first_at = now
            _log.warning("SIGTERM: stopping at the next step boundary; a second one ends the process at once")
            self._on_sigterm()
        else:
            # The code that a shell reports for a process ended by SIGTERM. Exit from here, because the main thread may
            # never return to Python.
            os._exit(128 + signal.SIGTERM)


def end_by_sigterm(exit_code: int | None = None) -> None:
    """End the process by SIGTERM, so that the sender sees that it was obeyed; or with ``exit_code`` if given."""
    # No Python code runs after this, so flush the standard streams and the log files now.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    logging.shutdown()
    if exit_code is not None:
        os._exit(exit_code)
    os.kill(os.getpid(), signal.SIGTERM)
    # The kernel does not deliver the signal to the first process of a container.
    os._exit(128 + signal.SIGTERM)


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
    # Block SIGTERM until the child has closed the socket: the parent would take the child's signal for its own.
    _mask_before_fork.value = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}) if _watches else None


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
