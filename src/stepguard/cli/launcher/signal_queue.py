"""The launcher takes its signals one by one where it waits, so that none is lost and none interrupts its work.

The signals are blocked, and `SignalQueue.take` waits for one of them or for SIGALRM, which its own timer sends. It does
not use `system.signal_within`: when the launcher is stopped (SIGSTOP, Ctrl-Z, a debugger) past the time limit of that
call, it returns a signal that nobody sent.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType

from stepguard.disk import system

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""The signals that ask to stop."""
_OTHERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGWINCH)
_FROM_A_TERMINAL = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)

_SHORTEST_SECS = 0.001  # a timer of 0 never rings


@dataclass(frozen=True, slots=True)
class Received:
    """A signal. ``is_from_kernel``: no process has sent it; SIGINT, SIGQUIT and SIGHUP then come from the terminal."""

    number: int
    is_from_kernel: bool


class SignalQueue:
    """Blocks the signals while it is entered; `take` gives them. The main thread, in a program without other threads.

    What the launcher itself was told to ignore, as `nohup` does with SIGHUP, stays ignored.
    """

    def __init__(self) -> None:
        ignored = {one for one in STOPS if signal.getsignal(one) is signal.SIG_IGN}
        self._taken = {*STOPS, *_OTHERS, signal.SIGALRM} - ignored
        self._mask: Iterable[int] = ()
        self._stopped_secs = 0.0

    def __enter__(self) -> SignalQueue:  # noqa: PYI034 - typing.Self came with Python 3.11
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._taken)
        # A signal that is ignored by default may not even be queued.
        for number in (signal.SIGCHLD, signal.SIGWINCH):
            signal.signal(number, _nothing)
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGCHLD, signal.SIGWINCH):
            signal.signal(number, signal.SIG_DFL)
        # A late alarm is still queued, and would end this process. Ignoring the signal drops it.
        before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, before)
        self.unblock()

    def unblock(self) -> None:
        """Restore the previous mask. A program that is started inherits it."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def awake(self) -> float:
        """A monotonic clock, in seconds, that stands still while this process is stopped.

        Deadlines use this clock: a launcher that was stopped for longer than a grace period must still grant it.
        """
        return time.monotonic() - self._stopped_secs

    def take(self, timeout_secs: float) -> Received | None:
        """The next signal; None when none came in time."""
        timeout_secs = max(_SHORTEST_SECS, timeout_secs)
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, timeout_secs)
        received = self._wait()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        # A wait that ended late: this process was stopped meanwhile, or the machine is busy.
        self._stopped_secs += max(0.0, time.monotonic() - began - timeout_secs)
        # An alarm that rang together with a signal cuts the next wait short, which does no harm.
        return None if received.number == signal.SIGALRM else received

    def _wait(self) -> Received:
        number, is_from_kernel = system.wait_for_signal(self._taken)
        # Where the system does not say who has sent it, these come from the terminal as a rule.
        return Received(number, number in _FROM_A_TERMINAL if is_from_kernel is None else is_from_kernel)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Never called: the signal is blocked."""
