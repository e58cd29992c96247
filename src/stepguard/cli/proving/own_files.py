"""Whether files in the program's own logdirs change while it is proven, also those that no trial can protect."""

from __future__ import annotations

import os
from collections.abc import Iterable

_MOST_FILES = 20_000

_Listing = dict[str, tuple[int, int]]
"""By path, the size and the time of the last change in nanoseconds."""


class OwnFiles:
    """What is in the logdirs that the program gives to its Supervisors, each listed when it is first heard of."""

    def __init__(self) -> None:
        self._before: dict[str, _Listing] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no logdir has been listed yet."""
        return not self._before

    def list_new(self, logdirs: Iterable[str]) -> None:
        """List those that were not listed before."""
        for one in logdirs:
            if one not in self._before:
                self._before[one] = _listing(one)

    def changed(self) -> list[str]:
        """The files that have come, gone or changed since they were listed."""
        found = []
        for logdir, before in self._before.items():
            now = _listing(logdir)
            found += [path for path in before.keys() | now.keys() if before.get(path) != now.get(path)]
        return sorted(found)


def _listing(logdir: str) -> _Listing:
    """Of a very large logdir, the first files only; of one that is no local directory, nothing."""
    found: _Listing = {}
    for folder, names, files in os.walk(logdir):
        names.sort()
        for name in sorted(files):
            path = os.path.join(folder, name)
            try:
                status = os.lstat(path)
            except OSError:
                continue
            found[path] = status.st_size, status.st_mtime_ns
            if len(found) >= _MOST_FILES:
                return found
    return found
