"""A full disk, as a limit of the system for the files of running processes; on Linux only.

The limit holds for any user, on any file system, and also for what TensorFlow writes in C++. A write fails with EFBIG
in place of ENOSPC; Python ignores the signal that comes with it. Only processes that train get the limit: it holds for
shared memory too, in which workers of a loader hand over their batches, and which a full disk leaves alone. A process
that is born meanwhile inherits the limit, so :meth:`FullDisk.spare` looks for such processes, and :meth:`FullDisk.end`
does so once more. What a training process itself puts into shared memory meanwhile fails nevertheless.
"""

from __future__ import annotations

from collections.abc import Iterable

from stepguard.disk import system

_Limits = tuple[int, int]


class FullDisk:
    """From now on the processes ``pids`` can write nothing to any file, until :meth:`end`."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._before: dict[int, _Limits] = {}
        for pid in pids:
            before = system.file_size_limits(pid)
            if before is not None and system.limit_file_sizes(pid, (0, before[1])):
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
        now = system.file_size_limits(pid)
        if now is not None and now[0] == 0 and self._before:
            before = self._before.get(pid) or next(iter(self._before.values()))
            system.limit_file_sizes(pid, (before[0], now[1]))
