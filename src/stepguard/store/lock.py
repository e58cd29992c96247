"""The chief's lock: one live process is the chief of a logdir.

The protocol: a chief takes an exclusive ``flock`` on ``.stepguard.lock`` without waiting, and writes its process id and
host into the file. Another process gets LogdirInUseError at once. Only if the process named in the file is gone does
`acquire` try again, for at most 5 s, because a dying child may still hold the lock. No deadlock is possible, because no
process waits for a lock in the kernel. Within a process the holds share one descriptor, guarded by ``_guard``; nothing
waits while it has that lock, and it is re-entrant because the garbage collector may release a hold at any time.

A kill leaves no lock: ``flock`` ends with the last descriptor of the open file. A forked child would keep the lock
alive. Therefore children of ``os.fork`` close the descriptor at once (also those of ``multiprocessing``, such as the
workers of a PyTorch DataLoader, which survive the kill of their parent), and programs started by ``exec`` never get it
(close-on-exec). A child that C code has forked keeps it.

Why not the alternatives: POSIX record locks (``fcntl.lockf``) are lost as soon as any code of the process opens and
closes the file, which a copy or a search of the logdir does; and a file that merely exists is left behind by a kill.
The file itself stays, empty, after a release, because removing it would let two processes lock two files of one name.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, TracebackType
from typing import final

from stepguard.disk import files, schema, system
from stepguard.errors import LogdirInUseError
from stepguard.words import logger

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

_log = logger(__name__)

FILE_NAME = ".stepguard.lock"

# How long `acquire` waits for a lock whose holder is gone, because children of the holder may still be dying.
_DYING_SECS = 5.0
_LOOK_SECS = 0.05
_MOST_BYTES = 4096

_NOTE: schema.Kinds = {
    "host": (str, NoneType),
    "pid": (int, NoneType),
    "start": (int, NoneType),
    "since": (float, NoneType),
}

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
# EBADF: NFS locks for writing only what is open for writing.
_UNSUPPORTED = frozenset({errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class _Held:
    """The one descriptor by which this process holds a logdir, and the number of holds that share it."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor: int | None = descriptor
        self.path = path
        self.holds = 0

    def is_alive(self) -> bool:
        """Whether other processes would lock the same file; not so if the logdir was removed and made again."""
        if self.descriptor is None:
            return False
        try:
            return os.path.samestat(os.fstat(self.descriptor), self.path.stat())
        except OSError:
            return False


@final
class LogdirHold:
    """One store's hold of the chief's lock. Give it back with `release`, or use it as a context manager.

    The holds of one process share the lock, so that several Supervisors can use one logdir in turn, even if an earlier
    one was never stopped. The garbage collector gives back a hold that is no longer referenced.
    """

    def __init__(
        self, logdir: Path, held: _Held | None, *, is_first: bool = True, is_to_be_locked: bool = False
    ) -> None:
        self.logdir = logdir
        # Whether the lock must still be taken, because the disk had no room for its file.
        self._is_to_be_locked = is_to_be_locked
        # Whether no other store of this process was chief here, so that unfinished files are not being written now.
        self.is_first = is_first
        self.is_locked = held is not None
        self._held = held
        self._finalizer = self._released_with(held) if held is not None else None

    def renew(self) -> bool:
        """Lock the file again if other processes would now lock another one; return whether that was so. Any thread.

        This happens if the logdir was cleared, or removed and made again. After `release` this does nothing.

        Raises LogdirInUseError if another process has locked it since, and OSError if it cannot be opened.
        """
        with _guard:
            if self._is_to_be_locked:
                self._lock_late()
                return False
            finalizer = self._finalizer
            if self._held is None or finalizer is None or not finalizer.alive or self._held.is_alive():
                return False
            try:
                held = _hold(self.logdir)
            except LogdirInUseError as error:
                if (error.host, error.pid) == (os.uname().nodename, os.getpid()):
                    return False  # The lock is our own; this file system does not identify a file reliably.
                raise
            held.holds += 1
            self._held, self._finalizer = held, self._released_with(held)
            finalizer()
            return True

    def _lock_late(self) -> None:
        try:
            held = _hold(self.logdir)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            return
        held.holds += 1
        self._held, self._finalizer = held, self._released_with(held)
        self._is_to_be_locked, self.is_locked = False, True

    def _released_with(self, held: _Held) -> weakref.finalize[[_Held], LogdirHold]:
        finalizer = weakref.finalize(self, _release, held)
        # The kernel does it when the process ends. A thread that opens files on a disk that hangs may hold the guard.
        finalizer.atexit = False
        return finalizer

    def release(self) -> None:
        """Give the hold back. Repeated calls do nothing. Any thread."""
        self._is_to_be_locked = False
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> LogdirHold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


# Re-entrant, because the garbage collector may release a hold inside any of the sections below. Files are opened while
# it is held, because a fork by another thread between the open and its record would give the lock to a child.
_guard = threading.RLock()
_held_by_path: dict[str, _Held] = {}


def acquire(logdir: Path) -> LogdirHold:
    """Become the chief of ``logdir``, which must exist. Any thread.

    If the process named in the lock file is gone but the lock is still held, this waits up to 5 s.

    Raises LogdirInUseError, which names the other process, if there is already a chief, and OSError if the logdir
    cannot be written. If the file system has no locks, or no room for the lock file, this warns and goes on;
    ``is_locked`` of the hold is then false. `LogdirHold.renew` locks it once there is room.
    """
    deadline = time.monotonic() + _DYING_SECS
    while True:
        try:
            return _acquire(logdir)
        except LogdirInUseError:
            note = _note(logdir)
            if not _is_gone(note) or time.monotonic() >= deadline:
                raise _in_use(logdir, note) from None  # The same, of a moment ago: it would be told twice.
        time.sleep(_LOOK_SECS)


def _acquire(logdir: Path) -> LogdirHold:
    failure: OSError | None = None
    with _guard:
        held: _Held | None = None
        try:
            held = _hold(logdir)
        except OSError as error:
            if error.errno not in _UNSUPPORTED | _NO_ROOM:
                raise
            failure = error
        is_first = held is None or held.holds == 0
        if held is not None:
            held.holds += 1
    has_no_room = failure is not None and failure.errno in _NO_ROOM
    if has_no_room:
        _log.warning(
            "%s: there is no room to lock it (%s); it is locked at a save, as soon as there is", logdir, failure
        )
    elif held is None:
        _log.warning(
            "%s: its filesystem has no file locks (%s); make sure that only one process trains here", logdir, failure
        )
    return LogdirHold(logdir, held, is_first=is_first, is_to_be_locked=has_no_room)


def _hold(logdir: Path) -> _Held:
    """The descriptor that holds ``logdir``; opened if there is none, or if its file is gone. Needs the guard."""
    key = os.path.realpath(logdir)
    held = _held_by_path.get(key)
    if held is None or not held.is_alive():
        try:
            held = _lock(logdir)
        except BlockingIOError:
            raise _in_use(logdir, _note(logdir)) from None
        _held_by_path[key] = held
    return held


def _lock(logdir: Path) -> _Held:
    if fcntl is None:  # pragma: no cover - Windows
        raise OSError(errno.ENOSYS, "this system has no flock")
    path = logdir / FILE_NAME
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        pid = os.getpid()
        start = system.process_start(pid)
        holder = {"host": os.uname().nodename, "pid": pid, "start": start, "since": time.time()}
        _describe(descriptor, json.dumps(holder).encode("utf-8"))
    except BaseException:
        os.close(descriptor)
        raise
    return _Held(descriptor, path)


def _open(path: Path) -> int:
    try:
        return files.open_own(path, os.O_RDWR | os.O_CREAT)
    except PermissionError:
        # In a directory that several users may write to, the file may be another one's: reading is enough to lock it.
        if not os.access(path.parent, os.W_OK):
            raise
        return files.open_own(path, os.O_RDONLY)


def _describe(descriptor: int, content: bytes) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
    except OSError as error:
        # Only the lock matters; a full disk must not keep a chief from releasing it.
        _log.debug("the lock is held, but its holder could not be noted: %s", error)


def _release(held: _Held) -> None:
    with _guard:
        held.holds -= 1
        if held.holds > 0 or held.descriptor is None:
            return
        descriptor, held.descriptor = held.descriptor, None
        for key in [key for key, one in _held_by_path.items() if one is held]:
            del _held_by_path[key]
        _describe(descriptor, b"")
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Note:
    """The contents of the lock file: facts about the holder."""

    host: str | None = None
    pid: int | None = None
    start: int | None = None
    since: float | None = None


def _note(logdir: Path) -> _Note:
    try:
        return _Note(**schema.checked(schema.parse(files.read_own(logdir / FILE_NAME, most=_MOST_BYTES)), _NOTE))
    except (OSError, ValueError):
        return _Note()  # The file is just being written. That the lock is held is known without it.


def _is_gone(note: _Note) -> bool:
    is_here = note.pid is not None and note.host == os.uname().nodename
    return is_here and not system.is_running(note.pid or 0, note.start)


def _in_use(logdir: Path, note: _Note) -> LogdirInUseError:
    who = f"process {note.pid} on {note.host}" if note.pid is not None else "another process"
    if note.since is not None and note.since >= 0:
        who += f" since {time.strftime('%Y-%m-%d %H:%M:%S %z', time.localtime(note.since))}"
    if _is_gone(note):
        who += f", which has ended; its lock is still held by {_still_holding(logdir)}"
    return LogdirInUseError(
        f"{logdir}: expected no other process that trains or prunes here, found {who}; stop it, or give this run "
        f"another logdir; a program that only evaluates opens its session with start_standard_services=False",
        logdir=logdir,
        host=note.host,
        pid=note.pid,
        since=note.since,
    )


def _still_holding(logdir: Path) -> str:
    try:
        found = system.with_open(os.stat(logdir / FILE_NAME))
    except OSError:
        found = []
    return ", ".join(found) or "a process that cannot be seen from here"


def _forget_in_child() -> None:
    # The child closes its copy of the descriptor. This does not unlock the parent's, and a kill of the parent then
    # frees the lock at once, even if the child lives on.
    for held in _held_by_path.values():
        if held.descriptor is not None:
            os.close(held.descriptor)
            held.descriptor = None
    _held_by_path.clear()
    _guard.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_forget_in_child)
