"""Looks at what a program on trial does in its own logdir: what it reads is noted, and what it would change is refused.

An audit hook of Python hears of each file that Python code opens, moves or removes, before that is done. It hears of
nothing that C++ or another program does, nor for which directory ``os.open(name, dir_fd=...)`` is meant. The hook runs
on the thread that does the work, takes no lock, and hears nothing of what it does itself on that thread.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from stepguard.disk import system

# By audit event, what it changes: the places of a path, and of the descriptor of the directory that the path is in.
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.removexattr": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.setxattr": ((0, None),),
    # What a symbolic link names is not touched by making the link.
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
    "shutil.rmtree": ((0, 1),),
    "sqlite3.connect": ((0, None),),
}
_READS = ("os.listdir", "os.scandir")
# These take a whole directory away, with a logdir below it.
_WHOLE = ("os.rename", "shutil.rmtree")


class LogdirGuard:
    """Guards the logdirs that the program has given to its Supervisors, from the first :meth:`number` on. Any thread.

    ``tell(kind, path)`` is called at the first time of each "read" and "write"; a write then raises PermissionError.
    """

    def __init__(self, tell: Callable[[str, str], object]) -> None:
        self._tell = tell
        self._given: list[str] = []
        self._real: list[str] = []
        self._told: set[tuple[str, str]] = set()
        self._own = threading.local()
        sys.addaudithook(self._hear)

    def number(self, given: str) -> int:
        """The number of a logdir, from 0; it is guarded from now on."""
        if given not in self._given:
            self._real.append(os.path.realpath(given))
            self._given.append(given)
        return self._given.index(given)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        is_open = event == "open"
        if not (is_open or event in _CHANGES or event in _READS) or getattr(self._own, "is_telling", False):
            return
        if is_open:
            path, mode, flags = arguments
            is_write = bool(flags & (os.O_WRONLY | os.O_RDWR)) if mode is None else any(one in mode for one in "wax+")
            self._look("write" if is_write else "read", event, None if isinstance(path, int) else path)
        elif event in _READS:
            self._look("read", event, arguments[0])
        else:
            for place, directory in _CHANGES[event]:
                its_directory = arguments[directory : directory + 1] if directory is not None else ()
                self._look("write", event, arguments[place], *its_directory)

    def _look(self, kind: str, event: str, path: Any, directory: Any = None) -> None:
        name = _absolute(path, directory)
        if name is None or not self._is_guarded(event, name):
            return
        # Many programs make their logdir before they make their Supervisor. What is not there cannot be removed.
        if (event == "os.mkdir" and name in self._real) or (event == "shutil.rmtree" and not os.path.lexists(name)):
            return
        if (kind, name) not in self._told:
            self._told.add((kind, name))
            with self._telling():
                self._tell(kind, name)
        if kind == "write":
            raise PermissionError(
                f"{name}: this is a trial of `stepguard prove`, and the program itself writes into its own logdir, "
                f"which the trial must not change; give the program another logdir for the proof"
            )

    def _is_guarded(self, event: str, name: str) -> bool:
        # The file that a symbolic link names is the one that is opened.
        names = {name, os.path.realpath(name)} if event in ("open", "os.truncate", "sqlite3.connect") else {name}
        return any(_is_in(one, real) or (event in _WHOLE and _is_in(real, one)) for real in self._real for one in names)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        self._own.is_telling = True
        try:
            yield
        finally:
            self._own.is_telling = False


def _is_in(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip(os.sep) + os.sep)


def _absolute(path: Any, directory: Any) -> str | None:
    """The path with all links but a last one followed; ``None`` for what has no name.

    ``path`` may be a descriptor, and ``directory`` that of the directory which a relative path begins at.
    """
    if isinstance(path, int):
        return system.path_of(path)
    if not isinstance(path, (str, bytes, os.PathLike)):
        return None
    text = os.fsdecode(path)
    if isinstance(directory, int) and directory >= 0 and not os.path.isabs(text):
        place = system.path_of(directory)
        if place is None:
            return None
        text = os.path.join(place, text)
    parent, name = os.path.split(os.path.abspath(text))
    return os.path.join(os.path.realpath(parent), name)
