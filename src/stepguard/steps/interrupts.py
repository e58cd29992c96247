"""Holds Ctrl-C back until the end of the step: a step cut in two would leave a model that belongs to no step."""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType

from stepguard.steps.boundary import Boundary
from stepguard.words import logger

_log = logger(__name__)

# The sessions whose handlers are installed, the last one in charge. For the main thread.
_installed: list[weakref.ref[InterruptHold]] = []


class InterruptHold:
    """Raises KeyboardInterrupt at the next boundary; a second Ctrl-C raises it at once. Main thread only.

    A signal handler of the program's own is not replaced. Between loops, Ctrl-C raises at once as usual. With several
    processes (``request_stop`` is given) it does not, because the others may already have begun a step that needs this
    process. Then Ctrl-C requests a stop, and is raised after the last step of all processes.
    """

    def __init__(self, boundary: Boundary, request_stop: Callable[[], object] | None = None) -> None:
        self._boundary = boundary
        self._request_stop = request_stop
        # Whether a second Ctrl-C has come, after which this process waits for nothing.
        self.is_impatient = False
        self._is_installed = False
        self.is_held = False
        """Whether a Ctrl-C is held back."""

    def start(self) -> None:
        """Replace the handler of SIGINT, if it is Python's default handler or that of another session.

        The other session may have been left open for good, as by a cell of a notebook that is run again.
        """
        if self._is_installed or threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGINT)
        if before is signal.default_int_handler or isinstance(getattr(before, "__self__", None), InterruptHold):
            signal.signal(signal.SIGINT, self._handle)
            self._is_installed = True
            _installed.append(weakref.ref(self))

    def finish(self) -> None:
        """Put the handler before back, and raise a Ctrl-C that is still held, since no boundary came after it."""
        if not self._is_installed or threading.current_thread() is not threading.main_thread():
            return
        self._is_installed = False
        _installed[:] = [one for one in _installed if one() not in (None, self)]
        if signal.getsignal(signal.SIGINT) == self._handle:
            other = _installed[-1]() if _installed else None
            signal.signal(signal.SIGINT, signal.default_int_handler if other is None else other._handle)
        self.raise_if_held()

    def raise_if_held(self, cause: BaseException | None = None) -> None:
        """Raise a Ctrl-C that was held back. Called at a boundary."""
        if self.is_held and threading.current_thread() is threading.main_thread():
            self.is_held = False
            raise KeyboardInterrupt from cause

    def _handle(self, number: int, frame: FrameType | None) -> None:
        boundary = self._boundary
        is_first = not self.is_held and not self.is_impatient
        if is_first and self._request_stop is not None:
            self.is_held = True
            _log.warning("Ctrl-C: stopping after the step at which all processes can; a second one stops now")
            self._request_stop()
            return
        if is_first and (boundary.is_mine or boundary.is_changing_hands):
            self.is_held = True
            _log.warning("Ctrl-C: stopping at the end of this step; a second one stops now, and loses the step")
            return
        if is_first and boundary.is_away_here:
            self.is_held = True
            _log.warning("Ctrl-C: stopping before the next step, or at the end of the session; a second one stops now")
            return
        if boundary.is_mine:
            boundary.mark_torn()
        self.is_impatient |= self.is_held
        self.is_held = False
        signal.default_int_handler(number, frame)
