"""The program's own function that is called after each commit, on a thread of its own.

The protocol: the writer's thread puts what it has committed into a queue and goes on at once. The hook's thread takes
one after the other and calls the function. Nobody waits for it but the end of the run, until its deadline. Until a call
has returned, its checkpoint is not pruned. An error of the function is a warning. A kill loses the calls that have not
been made: the next start does not make them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stepguard.errors import described
from stepguard.words import listed, logger

_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Committed:
    """What was committed: the path that a framework restores, its step, the metrics of that step and its names."""

    path: Path
    step: int | None
    metrics: Mapping[str, float]
    names: tuple[str, ...]


class CommitHook:
    """Calls ``function`` with each :class:`Committed`. Any thread; ``warn`` is called by the hook's own.

    Args:
        function: the program's.
        warn: is told of its errors.
    """

    def __init__(self, function: Callable[[Committed], object], warn: Callable[[str], None]) -> None:
        self._function = function
        self._warn = warn
        self._changed = threading.Condition()
        # The first is the one at hand.
        self._waiting: deque[Committed] = deque()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def tell(self, committed: Committed) -> None:
        """Have the function called with ``committed``, after those before it."""
        with self._changed:
            self._waiting.append(committed)
            self._changed.notify_all()
            if self._thread is None:
                self._is_closed = False
                thread = threading.Thread(target=self._run, name="stepguard-on-commit", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    # Python 3.12 and later start no threads while the process exits.
                    self._waiting.clear()
                    self._warn(f"on_commit is not called with {committed.path.name}: {error}")
                else:
                    self._thread = thread

    @property
    def unfinished(self) -> list[str]:
        """The names of the checkpoints with which the function has not been called to its end."""
        with self._changed:
            return [one.path.name for one in self._waiting]

    def close(self, deadline: float) -> None:
        """Wait for the calls that are due, until ``deadline`` (monotonic clock), and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            secs = min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
            is_done = self._changed.wait_for(lambda: not self._waiting, secs)
            thread, self._thread = self._thread, None
        if is_done and thread is not None:
            thread.join()
        elif not is_done:
            _log.warning("on_commit: the run ends before it was called to its end with %s", listed(self.unfinished))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                one = self._waiting[0]
            try:
                self._function(one)
            # Also what ends a thread without a word, and with it all later calls.
            except (Exception, SystemExit) as error:  # noqa: BLE001 - the program's own code must not end the training
                self._warn(f"on_commit has failed for {one.path}: {described(error)}")
            finally:
                with self._changed:
                    self._waiting.popleft()
                    self._changed.notify_all()
