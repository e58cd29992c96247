"""A bound on the bytes that are sent in a second, and the moment at which sending is given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from stepguard.remote.objects import RemoteError


class StoppedError(RemoteError):
    """The transfer was given up, because the run has ended."""


class Pace:
    """Lets ``max_bytes_per_sec`` through, ``None`` any number. One transfer at a time; :meth:`stop` from any thread."""

    def __init__(self, max_bytes_per_sec: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_sec = max_bytes_per_sec
        self._clock = clock
        self._free_at = clock()
        self._stopped = threading.Event()

    @property
    def is_stopped(self) -> bool:
        """Whether transfers are to be given up."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Give up the transfer that waits or sends now, and every later one."""
        self._stopped.set()

    def wait(self, secs: float) -> bool:
        """Wait; return whether :meth:`stop` was called meanwhile."""
        return self._stopped.wait(secs)

    def take(self, count: int, *, url: str = "") -> None:
        """Wait until ``count`` more bytes may be sent. Raises StoppedError after :meth:`stop`."""
        now = self._clock()
        # What was not sent for a while is not made up for.
        self._free_at = max(self._free_at, now)
        wait_secs = self._free_at - now
        if self._bytes_per_sec is not None:
            self._free_at += count / self._bytes_per_sec
        if self._stopped.wait(wait_secs) if wait_secs > 0 else self._stopped.is_set():
            raise StoppedError(f"{url}: the transfer was given up, because the run ends", url=url)
