"""A directory as a remote place: another disk, or a file system of the network.

An object is written aside and renamed, after an fsync of its content. The conditions of `create` and `replace` are
checked under an exclusive ``flock`` of the file ``.stepguard.conditions``, which NFS 4 and the cluster file systems
keep across machines; a file system without locks has no conditional writes. The lock is held for the time of one small
write, and no other lock is taken meanwhile. A kill gives it back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from stepguard.disk import files
from stepguard.disk.new_file import NewFile
from stepguard.remote.objects import BLOCK_BYTES, ConditionError, NoConditionsError, RemoteError, RemoteObject

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

_CONDITIONS = ".stepguard.conditions"
# What is being written has such a name, and is no object.
_ASIDE = ".mirror-part-"


class DirectoryRemote:
    """The files below a directory as objects. Links in it are no objects, and are never followed."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        # The file system in which the directory was found first. Another one there later means that it was unmounted.
        self._device: int | None = None

    @property
    def url(self) -> str:
        """The path."""
        return str(self.root)

    def reopen(self) -> None:
        """Do nothing: a directory has no credentials."""

    def objects(self, prefix: str = "") -> list[RemoteObject]:
        """Return the files whose paths begin with ``prefix``. A missing directory has none."""
        with self._asked():
            return sorted(self._below("", prefix), key=lambda one: one.key)

    def _below(self, place: str, prefix: str) -> Iterator[RemoteObject]:
        try:
            entries = list(os.scandir(self.root / place))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            key = f"{place}{entry.name}"
            if entry.name.startswith(_ASIDE) or entry.name == _CONDITIONS:
                continue
            if entry.is_dir(follow_symlinks=False):
                if key.startswith(prefix) or prefix.startswith(key + "/"):
                    yield from self._below(key + "/", prefix)
            elif entry.is_file(follow_symlinks=False) and key.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):
                    yield _described(key, entry.stat(follow_symlinks=False))

    def head(self, key: str) -> RemoteObject | None:
        """Return size, time and tag of a file; ``None`` if there is none."""
        with self._asked():
            try:
                return _described(key, os.stat(self.root / key, follow_symlinks=False))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read(self, key: str) -> Iterator[bytes]:
        """Return the content of a file in blocks."""
        with self._asked():
            descriptor = files.open_own(self.root / key, os.O_RDONLY)
            try:
                while block := os.read(descriptor, BLOCK_BYTES):
                    yield block
            finally:
                os.close(descriptor)

    def write(self, key: str, blocks: Iterable[bytes], size: int) -> bool:
        """Write a file aside, fsync it, and rename it. A file system proves nothing about what it has stored."""
        target = self._made(key)
        aside = target.with_name(f"{_ASIDE}{os.getpid()}-{target.name}"[:250])
        try:
            with NewFile(aside) as file:
                for block in blocks:
                    with self._asked():
                        file.write(block)
            with self._asked():
                if file.size != size:
                    raise RemoteError(f"{target}: expected {size} bytes, got {file.size}", url=self.url)
                files.fsync_file(aside)
                files.move(aside, target)
                files.fsync_dir(target.parent)
        except BaseException:
            files.remove_quietly(aside)
            raise
        return False

    def put(self, key: str, content: bytes) -> str | None:
        """Replace a small file durably, and return its tag."""
        target = self._made(key)
        with self._asked():
            files.write_atomic(target, content)
        found = self.head(key)
        return None if found is None else found.tag

    def create(self, key: str, content: bytes) -> str | None:
        """Write a small file that must not exist. Raises ConditionError if it does."""
        with self._locked():
            if self.head(key) is not None:
                raise ConditionError(f"{self.root / key} exists already", url=self.url)
            return self.put(key, content)

    def replace(self, key: str, content: bytes, tag: str | None) -> str | None:
        """Write a small file that must still have this tag. Raises ConditionError if it has another."""
        with self._locked():
            found = self.head(key)
            if found is None or found.tag != tag:
                raise ConditionError(f"{self.root / key} is another one than was expected", url=self.url)
            return self.put(key, content)

    def copy(self, source: str, target: str) -> None:
        """Copy a file; on most file systems this is a second name for the same bytes."""
        goal = self._made(target)
        with self._asked():
            files.remove(goal)
            files.link_tree(self.root / source, goal)
            files.fsync_dir(goal.parent)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files, and the directories that become empty."""
        parents = set()
        with self._asked():
            for key in keys:
                files.remove(self.root / key)
                parents.add((self.root / key).parent)
            for parent in parents - {self.root}:
                with contextlib.suppress(OSError):
                    os.rmdir(parent)

    def _made(self, key: str) -> Path:
        target = self.root / key
        with self._asked():
            self._check_device()
            files.make_dirs(target.parent)
            if self._device is None:
                self._device = self.root.stat().st_dev
        return target

    def _check_device(self) -> None:
        """Raise RemoteError if the file system is gone: a new directory would fill the disk below the mount point."""
        place = next(one for one in (self.root, *self.root.parents) if one.exists())
        if self._device is not None and place.stat().st_dev != self._device:
            raise RemoteError(f"{self.root}: its file system is gone; mount it again", url=self.url)

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        """A block whose system errors are those of the place; a missing file stays FileNotFoundError."""
        try:
            yield
        except (FileNotFoundError, RemoteError):
            raise
        except OSError as error:
            failure = RemoteError(f"{error.filename or self.root}: {error.strerror or error}", url=self.url)
            failure.errno = error.errno
            raise failure from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self._made(_CONDITIONS)
        if fcntl is None:  # pragma: no cover - Windows
            raise NoConditionsError(f"{self.root}: this system has no file locks", url=self.url)
        with self._asked():
            descriptor = files.open_own(path, os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                raise NoConditionsError(f"{self.root}: no file locks here ({error})", url=self.url) from error
            yield
        finally:
            os.close(descriptor)


def _described(key: str, status: os.stat_result) -> RemoteObject:
    # A rename gives another inode, so that the tag changes within the tick of a file system's clock as well.
    tag = f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
    return RemoteObject(key, status.st_size, status.st_mtime, tag)
