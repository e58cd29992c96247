"""The signals of the launcher, taken one by one where it waits, so that none is lost and none comes in between."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""A request to stop."""
_OTHERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGWINCH)


@dataclass(frozen=True, slots=True)
class Received:
    """A signal. ``is_from_kernel``: not sent by a process; of SIGINT, SIGQUIT and SIGHUP that means by the terminal."""

    number: int
    is_from_kernel: bool


class SignalQueue:
    """Blocks the signals while it is entered; `take` gives them. The main thread, in a program without other threads.

    What the launcher itself was told to ignore, as `nohup` does with SIGHUP, stays ignored.
    """

    def __init__(self) -> None:
        ignored = {one for one in STOPS if signal.getsignal(one) is signal.SIG_IGN}
        self._taken = {*STOPS, *_OTHERS} - ignored
        self._mask: Iterable[int] = ()

    def __enter__(self) -> SignalQueue:  # noqa: PYI034 - typing.Self came with Python 3.11
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._taken)
        # One that is ignored by default may not even be queued.
        for number in (signal.SIGCHLD, signal.SIGWINCH):
            signal.signal(number, _nothing)
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGCHLD, signal.SIGWINCH):
            signal.signal(number, signal.SIG_DFL)
        self.unblock()

    def unblock(self) -> None:
        """As it was before: also for a program that is started, which inherits the mask."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def take(self, timeout_secs: float) -> Received | None:
        """The next signal; None when none came in time."""
        if hasattr(signal, "sigtimedwait"):
            info = signal.sigtimedwait(self._taken, max(0.0, timeout_secs))
            return None if info is None else Received(info.si_signo, info.si_code > 0)
        return self._take_elsewhere(timeout_secs)

    def _take_elsewhere(self, timeout_secs: float) -> Received | None:
        """Without a time limit in the system call, and without a word on who sent it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        signal.setitimer(signal.ITIMER_REAL, max(0.001, timeout_secs))
        number = signal.sigwait({*self._taken, signal.SIGALRM})
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        if number == signal.SIGALRM:
            return None
        # One alarm that came at the same time would cut the next wait short, which does no harm.
        return Received(number, number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP))


def _nothing(number: int, frame: FrameType | None) -> None:
    """Never called: the signal is blocked."""
