"""A file of our own that grows by whole records, while the run goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

from stepguard.disk import files


class AppendedFile:
    """A file of our own that one process appends to, each record by one ``write``. Any thread.

    A SIGKILL loses no record, and at most cuts the last one short; nothing is fsynced. ``keep`` is how many bytes of an
    existing file are kept. There is no ``close``: the file is closed when nobody holds it any more, so that a thread
    that still appends cannot meet another file under the same descriptor.

    A lock lasts for one write, because a write that was taken in part is cut off again, and another thread's record
    must not be behind it then. The system writes what several threads append one after the other in any case.
    """

    __slots__ = ("_descriptor", "_is_sealed", "_lock", "path", "size")

    def __init__(self, path: Path, *, keep: int) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._is_sealed = False
        self._descriptor = files.open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        size = os.fstat(self._descriptor).st_size
        self.size = min(keep, size)
        """How many bytes of whole records there are."""
        if size > keep:
            os.ftruncate(self._descriptor, keep)

    def append(self, record: bytes) -> None:
        """Append one record, whole or not at all. Raises OSError; after that, nothing more can be appended."""
        with self._lock:
            if self._is_sealed:
                raise self._full()
            try:
                count = os.write(self._descriptor, record)
            except OSError:
                self._is_sealed = True
                raise
            if count < len(record):
                self._is_sealed = True
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self.size)
                raise self._full()
            self.size += count

    def seal(self) -> int:
        """Let nothing more be appended. Returns how many bytes of whole records there are."""
        with self._lock:
            self._is_sealed = True
            return self.size

    def _full(self) -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(self.path))

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        # The constructor may have failed before there was one.
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            _close(descriptor)
