"""Follows a trace while it is written: each look reads what was added since the one before, and not the whole trace."""

from __future__ import annotations

import os
from pathlib import Path

from stepguard.disk import files
from stepguard.watching import trace


class TraceTail:
    """The end of the trace of one process. One thread.

    ``step`` is that of the last record, and ``started`` when its newest start was, in Unix seconds; ``None`` if there
    is none yet.
    """

    def __init__(self, logdir: Path, role: str) -> None:
        self.step: int | None = None
        self.started: float | None = None
        self._path = trace.path_of(logdir, role)
        self._older = self._path.with_name(role + trace.BEFORE)
        self._file: tuple[int, int] | None = None
        self._end = 0
        self._shapes: dict[int, tuple[str, ...]] = {}

    def look(self) -> None:
        """Read what is new. What cannot be read is passed over."""
        # A file that was full has another name now, and perhaps an end that was not read yet.
        for path in (self._path,) if _identity(self._path) == self._file else (self._older, self._path):
            try:
                self._read(path)
            except OSError:
                continue

    def _read(self, path: Path) -> None:
        descriptor = files.open_own(path, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            # Another file has its name now, or a start has cut off the end of it.
            if _identified(status) != self._file or status.st_size < self._end:
                self._file, self._end, self._shapes = _identified(status), 0, {}
            content = os.pread(descriptor, trace.MOST_READ, self._end)
        finally:
            os.close(descriptor)
        parsed = trace.parse(content, shapes=self._shapes, is_begun=self._end > 0)
        self._end += parsed.end
        for one in parsed.items:
            self.step = one.step
            if isinstance(one, trace.Start):
                self.started = one.time


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        return _identified(os.lstat(path))
    except OSError:
        return None


def _identified(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
