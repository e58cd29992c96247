"""Ctrl-C waits for the end of the step: a step that it cut in two would leave a model that belongs to no step."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

from stepguard.torch.boundary import Boundary

_log = logging.getLogger(__name__)


class InterruptHold:
    """Raises KeyboardInterrupt at the next boundary; at the second Ctrl-C at once. Main thread only.

    A handler of the program's own is left alone. Between steps Ctrl-C is Python's own, but not in one of several
    processes, ``is_one_of_many``, whose loop goes on: the others may have begun a step that takes all of them.
    """

    def __init__(self, boundary: Boundary, *, is_one_of_many: bool) -> None:
        self._boundary = boundary
        self._is_one_of_many = is_one_of_many
        self._is_installed = False
        self.is_held = False

    def start(self) -> None:
        """Take Python's default handler out, if that is the one."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._is_installed = True

    def finish(self) -> None:
        """Put Python's default handler back, and raise what is still held: nobody came to a boundary after it."""
        if not self._is_installed or threading.current_thread() is not threading.main_thread():
            return
        self._is_installed = False
        if signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.raise_if_held()

    def raise_if_held(self, cause: BaseException | None = None) -> None:
        """At a boundary: raise what was held back."""
        if self.is_held and threading.current_thread() is threading.main_thread():
            self.is_held = False
            raise KeyboardInterrupt from cause

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if (self._boundary.is_mine or self._is_awaited()) and not self.is_held:
            self.is_held = True
            _log.warning("Ctrl-C: stopping at the end of this step; a second one stops now, and loses the step")
            return
        if self._boundary.is_mine:
            self._boundary.mark_torn()
        self.is_held = False
        signal.default_int_handler(number, frame)

    def _is_awaited(self) -> bool:
        return self._is_one_of_many and self._boundary.steps > 0 and not self._boundary.is_resting
