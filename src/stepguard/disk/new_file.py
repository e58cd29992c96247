"""A file that is digested while it is written in parts, and that may share its bytes with an earlier one."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from stepguard.disk import files

# The number of bytes after which the disk is asked to start writing.
_WRITEBACK_BYTES = 16 << 20


class NewFile:
    """A file of any size that is digested while it is written, so that nobody has to read the file for its digest.

    Use it as a context manager. The file is not durable until `fsync_file` or `fsync_tree` of `files` is called for it.
    A background thread flushes the file while it is written, so that the later fsync is short. An error of that flush
    is raised by a later `write`, or at the end of the block.

    Inside `repeating`, a file that repeats an earlier one byte for byte is not written, but becomes another name of it.
    """

    def __init__(self, path: Path) -> None:
        import xxhash

        self.path = path
        self.size = 0
        self._hasher = xxhash.xxh3_128()
        self._descriptor = files.open_own(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        # The earlier file, as long as all that was written is equal to its beginning; then none of it is in this one.
        self._earlier = _Earlier.of(path)
        self._writeback: _Writeback | None = None
        self._writeback_began_at = 0

    def __enter__(self) -> NewFile:  # noqa: PYI034 - typing.Self came with Python 3.11
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        writeback, self._writeback = self._writeback, None
        try:
            if error_type is None:
                self._end_repeating()
        except BaseException:
            os.close(self._descriptor)
            raise
        finally:
            if self._earlier is not None:
                self._earlier.close()
        if writeback is not None:
            # Wait before the close: a closed descriptor number may be reused by another file.
            writeback.wait()
        os.close(self._descriptor)
        if writeback is not None and error_type is None:
            writeback.raise_error()

    @property
    def digest(self) -> str:
        """The digest of the bytes written so far, in the form that `files.digest` returns."""
        return f"{files.DIGEST_KIND}:{self._hasher.hexdigest()}"

    def write(self, block: Any) -> None:
        """Append bytes, or a contiguous array of bytes. A block of about a megabyte is best: it stays in the cache."""
        self._hasher.update(block)
        view = memoryview(block)
        if self._earlier is not None:
            if self._earlier.has(view, self.size):
                self.size += view.nbytes
                return
            self._copy_repeated()
        while view:
            count = os.write(self._descriptor, view)
            view = view[count:]
            self.size += count
        if self.size - self._writeback_began_at >= _WRITEBACK_BYTES:
            self._begin_writeback()

    def _end_repeating(self) -> None:
        """Make this file another name of the earlier one, if it has repeated all of it."""
        earlier = self._earlier
        if earlier is not None and not (earlier.size == self.size and earlier.link(self.path)):
            self._copy_repeated()

    def _copy_repeated(self) -> None:
        """Write what was not written, because the earlier file had it."""
        earlier, self._earlier = self._earlier, None
        assert earlier is not None
        try:
            for block in earlier.blocks(self.size):
                files.write_all(self._descriptor, block)
        finally:
            earlier.close()

    def _begin_writeback(self) -> None:
        if self._writeback is not None:
            if self._writeback.is_running:
                return
            # The kernel reports a failed page only once, here, so the fsync of the commit would succeed.
            self._writeback.raise_error()
        self._writeback = _Writeback(self._descriptor)
        self._writeback_began_at = self.size


_earlier_of: ContextVar[Callable[[Path], Path | None]] = ContextVar("earlier_of", default=lambda _: None)

# A smaller file gains nothing, and damage to it would be that of all checkpoints that share it.
_LEAST_REPEATED_BYTES = 1 << 20


@contextlib.contextmanager
def repeating(earlier_of: Callable[[Path], Path | None]) -> Iterator[None]:
    """A block in which a new file of this thread that equals the one that ``earlier_of`` names shares its bytes.

    Each block is compared with the earlier file, and written only from the first difference on: what is shared was read
    and found right at that moment.
    """
    token = _earlier_of.set(earlier_of)
    try:
        yield
    finally:
        _earlier_of.reset(token)


class _Earlier:
    """An earlier file, which a new one may repeat."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor
        self.size = size

    @classmethod
    def of(cls, path: Path) -> _Earlier | None:
        """The earlier file of the new one at ``path``; None if there is none, or if it is too small."""
        earlier = _earlier_of.get()(path)
        try:
            if earlier is None or (files.size_of(earlier) or 0) < _LEAST_REPEATED_BYTES:
                return None
            descriptor = files.open_own(earlier, os.O_RDONLY)
        except OSError:
            return None
        return cls(earlier, descriptor, os.fstat(descriptor).st_size)

    def has(self, view: memoryview, place: int) -> bool:
        """Whether these bytes are in the file at that place. What cannot be read is not there."""
        assert self._descriptor is not None
        try:
            # Two of bytes are compared at once, a view and bytes one by one.
            return os.pread(self._descriptor, view.nbytes, place) == view.tobytes()
        except OSError:
            return False

    def link(self, path: Path) -> bool:
        """Replace the file at ``path`` by another name of this one; whether that was possible."""
        assert self._descriptor is not None
        aside = path.with_name(f".{path.name[:200]}.same.tmp")
        try:
            os.link(self._path, aside)
        except OSError:
            return False
        # It may have been replaced or mended since it was opened.
        if not os.path.samestat(os.fstat(self._descriptor), os.stat(aside)):
            files.remove_quietly(aside)
            return False
        os.replace(aside, path)
        return True

    def blocks(self, size: int) -> Iterator[bytes]:
        """The first ``size`` bytes. Raises OSError if they cannot be read again."""
        assert self._descriptor is not None
        place = 0
        while place < size:
            block = os.pread(self._descriptor, min(size - place, files.BLOCK_BYTES), place)
            if not block:
                raise OSError(errno.EIO, "the file became shorter while it was read", os.fspath(self._path))
            place += len(block)
            yield block

    def close(self) -> None:
        """Close the file. Repeated calls do nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class _Writeback:
    """One ``fdatasync`` in a thread of its own, which the constructor starts if the system can start one."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._error: OSError | None = None
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, name="stepguard-writeback", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = (
                None  # Python 3.12 and later start no threads while the process exits: the fsync does it all.
            )

    def _run(self) -> None:
        try:
            # macOS and Windows have no fdatasync: there the fsync of the commit does all the work.
            getattr(os, "fdatasync", _nothing)(self._descriptor)
        except OSError as error:
            self._error = error

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def raise_error(self) -> None:
        """Raise the error of the fdatasync, if any. Call this only after the thread has ended."""
        if self._error is not None:
            raise self._error


def _nothing(descriptor: int) -> None:
    """Stand in for a system call that this system lacks."""
