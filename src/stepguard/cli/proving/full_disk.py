"""A full disk, as a limit of the system for the files of running processes; on Linux only.

The limit holds for any user, on any file system, and also for what TensorFlow writes in C++. A write fails with EFBIG
in place of ENOSPC; Python ignores the signal that comes with it. Only processes that train get the limit: it holds for
shared memory too, in which workers of a loader hand over their batches, and which a full disk leaves alone. A process
that is born meanwhile inherits the limit, so :meth:`FullDisk.spare` looks for such processes, and :meth:`FullDisk.end`
does so once more. What a training process itself puts into shared memory meanwhile fails nevertheless.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterable
from typing import Any

_Limits = tuple[int, int]


class FullDisk:
    """From now on the processes ``pids`` can write nothing to any file, until :meth:`end`."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._before: dict[int, _Limits] = {}
        for pid in pids:
            before = _limits(pid)
            if before is not None and _limit(pid, (0, before[1])):
                self._before[pid] = before

    @property
    def is_full(self) -> bool:
        """Whether any process has the limit."""
        return bool(self._before)

    def spare(self, pids: Iterable[int]) -> None:
        """Lift the limit of those of ``pids`` that have inherited it."""
        for pid in pids:
            if pid not in self._before:
                self._lift(pid)

    def end(self, pids: Iterable[int]) -> None:
        """Lift the limit of all, also of those of ``pids`` that have inherited it."""
        for pid in {*self._before, *pids}:
            self._lift(pid)

    def _lift(self, pid: int) -> None:
        now = _limits(pid)
        if now is not None and now[0] == 0 and self._before:
            before = self._before.get(pid) or next(iter(self._before.values()))
            _limit(pid, (before[0], now[1]))


def _limits(pid: int) -> _Limits | None:
    limit: Callable[..., Any] | None = getattr(resource, "prlimit", None)
    if limit is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            soft, hard = limit(pid, resource.RLIMIT_FSIZE)
            return soft, hard
    return None


def _limit(pid: int, limits: _Limits) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
        return True
    return False
