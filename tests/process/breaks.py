"""Something that happens at the n-th call by which a save changes the disk."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from stepguard.disk import appended_file, files, new_file

# Every function of ``os`` that changes what the disk holds, or that promises it.
CHANGES = frozenset(
    {
        "copy_file_range",
        "fdatasync",
        "fsync",
        "ftruncate",
        "link",
        "mkdir",
        "posix_fallocate",
        "pwrite",
        "pwritev",
        "rename",
        "replace",
        "rmdir",
        "sendfile",
        "sync_file_range",
        "truncate",
        "unlink",
        "write",
        "writev",
    }
)

Action = Callable[[str, tuple[Any, ...]], None]


class BreakingOs:
    """Stands where ``stepguard.disk`` finds ``os``, and does ``action`` in place of going on at one call.

    Calls are counted from :meth:`arm` on. ``action(name, arguments)`` is done before the call itself; what it raises
    is what the call raises. It is done at the call number ``at``, with ``onwards`` also at all that follow, and with
    ``every`` at each. With ``of_services`` the calls of the main thread do not count: it records each step of a loop,
    hundreds of which pass beside one save.
    """

    def __init__(
        self, action: Action, *, at: int | None, onwards: bool = False, every: bool = False, of_services: bool = False
    ) -> None:
        self._action = action
        self._first = 1 if every else at
        self._last = math.inf if every or onwards else at
        self._of_services = of_services
        self._armed = False
        self._counting = threading.Lock()
        self.calls: list[str] = []

    def arm(self) -> None:
        """Count from now on."""
        self._armed = True

    def __getattr__(self, name: str) -> Any:
        found = getattr(os, name)
        if name == "open":
            return self._open
        if name not in CHANGES:
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            self._count(name, arguments)
            return found(*arguments, **named)

        return call

    def _open(self, path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._count("open", (path,))
        return os.open(path, flags, *arguments, **named)

    def _count(self, name: str, arguments: tuple[Any, ...]) -> None:
        if not self._armed or (self._of_services and threading.current_thread() is threading.main_thread()):
            return
        with self._counting:
            self.calls.append(name)
            is_due = self._first is not None and self._last is not None
            is_due = is_due and self._first <= len(self.calls) <= self._last  # type: ignore[operator]
        if is_due:
            self._action(name, arguments)


def put_under_files(stand_in: Any, put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have ``stand_in`` stand where ``stepguard.disk`` finds ``os``; ``put`` may be a monkeypatch's ``setattr``."""
    for module in (files, new_file, appended_file):
        put(module, "os", stand_in)


def die(name: str, arguments: tuple[Any, ...]) -> None:
    """SIGKILL, and if it is a write: in the middle of it."""
    if name == "write":
        descriptor, content = arguments
        os.write(descriptor, bytes(content)[: len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> Action:
    """The disk answers with this errno; of what was to be written, half is on it."""

    def action(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "write":
            descriptor, content = arguments
            os.write(descriptor, bytes(content)[: len(content) // 2])
        raise OSError(number, os.strerror(number), f"in {name}")

    return action


def wait(secs: float) -> Action:
    """The disk is slow."""

    def action(name: str, arguments: tuple[Any, ...]) -> None:
        time.sleep(secs)

    return action
