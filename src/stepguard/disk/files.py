"""Durable files: the only user of ``os.replace`` and ``os.fsync`` in the package.

Every function reaches the disk through this module's ``os`` name and nothing else, so that a test can put a
recording, failing or killing stand-in there (``monkeypatch.setattr(files, "os", ...)``) and see each call. This is
why it uses no pathlib methods.

Nothing in a logdir is trusted. Every file is opened here, without blocking, and only if it is a regular one: a FIFO
would hold a start for ever, and a link to ``/dev/zero`` would fill the memory. Files of our own (what is not part of a
checkpoint: lock, ledger, heartbeats, and whatever is written) are opened without following links, so that nothing
outside the logdir is written or read in their place; what belongs to a checkpoint may be a link, and is only read. What
is read as a whole has a bound.

What a power loss may undo, and so what the functions promise, is said once here: the content of a file is on disk
after ``fsync`` of the file; a name in a directory (created, renamed, removed) is on disk after ``fsync`` of that
directory; nothing else is, in whatever order it was done.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from stepguard.words import logger

_log = logger(__name__)

# Reads of this size keep the disk busy and the GIL free (both os.readinto and xxhash release it), and two of them
# fit into the cache of a core.
_BLOCK_BYTES = 1 << 20

# The number of bytes after which the disk is asked to start writing.
_WRITEBACK_BYTES = 16 << 20

DIGEST_KIND = "xxh3_128"

# The errors of file systems that cannot fsync a directory (some FUSE and network ones). Nothing better can be done
# there, and the files were fsynced. EIO and ENOSPC are real errors and are raised.
_NO_DIRECTORY_FSYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF})

# What one whole file that is read may hold at most: the manifest of a checkpoint with 100,000 files has 20 MiB.
MOST_BYTES = 64 << 20

_KINDS = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"), (stat.S_ISLNK, "a link"))

# What a filesystem answers that has no hard links, or has too many of one file.
_NO_HARD_LINK = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})


def fsync_file(path: Path) -> None:
    """Make the content of one file durable.

    A failed fsync must not be repeated: the kernel has dropped the pages, and the second call would succeed over lost
    bytes. Write the file again instead.
    """
    descriptor = open_regular(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> int:
    """Open a file of a checkpoint for reading; a link is followed. Raises OSError for what is no regular file."""
    return _open(path, os.O_RDONLY)


def open_own(path: Path, flags: int) -> int:
    """Open a file of our own, which is no link. Raises OSError for one, and for what is no regular file."""
    try:
        return _open(path, flags | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK) and os.path.islink(path):
            raise OSError(
                error.errno, "expected a file, found a link, which is not followed; remove it", path
            ) from None
        raise


def check_own_dir(path: Path) -> None:
    """Raise OSError unless ``path`` is a directory, and no link to one: FileNotFoundError if there is nothing."""
    mode = os.lstat(path).st_mode
    if not stat.S_ISDIR(mode):
        found = f"expected a directory, found {_kind(mode)}, which is not used; remove it"
        raise OSError(errno.ENOTDIR, found, os.fspath(path))


def make_own_dir(path: Path) -> None:
    """Create one directory of our own, if there is none. Its name is the caller's to make durable.

    Raises OSError if the name is taken by a link, also by one to a directory, or by a file.
    """
    try:
        os.mkdir(path)
    except FileExistsError:
        check_own_dir(path)


def _open(path: Path, flags: int) -> int:
    # Not blocking: else a FIFO waits here for somebody at its other end. Of a regular file it changes nothing.
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    # What is truncated must be known first.
    descriptor = os.open(path, flags & ~os.O_TRUNC, 0o666)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.ENODEV
            raise OSError(code, f"expected a regular file, found {_kind(status.st_mode)}", os.fspath(path))
        if flags & os.O_TRUNC and status.st_size:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISREG(mode):
        return "a file"
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")


def size_of(path: Path) -> int | None:
    """Return the size of a file in bytes; None if there is no regular file of that name. A link is followed."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable: every create, rename and removal in it so far."""
    if os.name == "nt":
        return  # Windows opens no directories; NTFS journals its names.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_FSYNC:
            raise
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Make a file, or a directory with everything in it, durable. The caller makes the name ``path`` durable."""
    for one, is_dir in reversed(_tree(path)):
        (fsync_dir if is_dir else fsync_file)(one)


def _tree(path: Path, gone: tuple[type[OSError], ...] = ()) -> list[tuple[Path, bool]]:
    """``path`` and everything below it, each with whether it is a directory, and each directory before its entries.

    Links are not followed. What raises one of ``gone`` is left out. Without recursion, which a logdir with thousands of
    directories in each other would not allow.
    """
    found: list[tuple[Path, bool]] = []
    waiting = [path]
    for one in waiting:
        try:
            is_dir = stat.S_ISDIR(os.lstat(one).st_mode)
            waiting += [one / name for name in sorted(os.listdir(one))] if is_dir else []
        except gone:
            continue
        found.append((one, is_dir))
    return found


def make_dirs(path: Path) -> None:
    """Create a directory and its missing parents, durably. An existing directory is left as it is."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        if path.parent == path:
            break
        path = path.parent
    for directory in reversed(missing):
        try:
            os.mkdir(directory)
        except FileExistsError:
            if not os.path.isdir(directory):
                raise  # A file has that name. The system's error carries the path.
        # Without this fsync, a power loss may remove a whole logdir with every fsynced file in it.
        fsync_dir(directory.parent)


def make_dir(path: Path) -> None:
    """Create one directory. The caller makes its name durable. Raises FileExistsError if the name exists."""
    os.mkdir(path)


def write(path: Path, content: bytes) -> None:
    """Write a file, neither atomically nor durably: for content that may be lost or half read without harm."""
    _write(path, content, durable=False)


def write_named(path: Path, content: bytes) -> None:
    """Write to a file, a link, a FIFO or a device that the user has named."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write_all(descriptor, content)
    finally:
        os.close(descriptor)


def write_durable(path: Path, content: bytes) -> None:
    """Write a file and fsync its content. The write is not atomic, and the name is not durable yet."""
    _write(path, content, durable=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file, durably: a reader, or a power loss, sees the old content or the new one, never a part.

    A kill leaves ``.<name>.<thread id>.tmp`` behind. Each thread writes a temporary file of its own, so that two
    threads may replace the same file.
    """
    aside = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    try:
        write_durable(aside, content)
        os.replace(aside, path)
    except BaseException:
        remove_quietly(aside)
        raise
    fsync_dir(path.parent)


def write_volatile(path: Path, content: bytes) -> None:
    """Replace a file. A reader sees the old content or the new one; a power loss may leave either, or neither."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write(aside, content, durable=False)
        os.replace(aside, path)
    except BaseException:
        remove_quietly(aside)
        raise


def append_lines(path: Path, lines: bytes, *, durable: bool) -> int:
    """Append whole lines to a file that several processes append to; created if it is missing. Returns its size.

    If a killed writer left an unfinished last line, a line end is written first. The unfinished line then stays a bad
    line of its own, and the lines after it are whole.
    """
    descriptor = open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            lines = b"\n" + lines
        # One call, so that the kernel lets no other writer in between. After a short write the caller retries it all.
        if os.write(descriptor, lines) < len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
        if durable:
            os.fsync(descriptor)
        return size + len(lines)
    finally:
        os.close(descriptor)


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
        self._descriptor = open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
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


class NewFile:
    """A file of any size that is digested while it is written, so that nobody has to read the file for its digest.

    Use it as a context manager. The file is not durable until `fsync_file` or `fsync_tree` is called for it. A
    background thread flushes the file while it is written, so that the later fsync is short. An error of that flush is
    raised by a later `write`, or at the end of the block.

    Inside `repeating`, a file that repeats an earlier one byte for byte is not written, but becomes another name of it.
    """

    def __init__(self, path: Path) -> None:
        import xxhash

        self.path = path
        self.size = 0
        self._hasher = xxhash.xxh3_128()
        self._descriptor = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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
        """The digest of the bytes written so far, in the form that `digest` returns."""
        return f"{DIGEST_KIND}:{self._hasher.hexdigest()}"

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
                _write_all(self._descriptor, block)
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
            if earlier is None or (size_of(earlier) or 0) < _LEAST_REPEATED_BYTES:
                return None
            descriptor = open_own(earlier, os.O_RDONLY)
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
            remove_quietly(aside)
            return False
        os.replace(aside, path)
        return True

    def blocks(self, size: int) -> Iterator[bytes]:
        """The first ``size`` bytes. Raises OSError if they cannot be read again."""
        assert self._descriptor is not None
        place = 0
        while place < size:
            block = os.pread(self._descriptor, min(size - place, _BLOCK_BYTES), place)
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
    """One ``fdatasync`` in a thread of its own, which the constructor starts."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="stepguard-writeback", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            # macOS and Windows have no fdatasync: there the fsync of the commit does all the work.
            getattr(os, "fdatasync", _nothing)(self._descriptor)
        except OSError as error:
            self._error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()

    def raise_error(self) -> None:
        """Raise the error of the fdatasync, if any. Call this only after the thread has ended."""
        if self._error is not None:
            raise self._error


def _nothing(descriptor: int) -> None:
    """Stand in for a system call that this system lacks."""


def move(source: Path, target: Path) -> None:
    """Rename within one filesystem, replacing a file of that name.

    The caller makes the new name durable with `fsync_dir` of the target's parent, once for many moves.
    """
    os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file, or a directory with everything in it. A missing name is not an error."""
    for one, is_dir in reversed(_tree(path, (FileNotFoundError, NotADirectoryError))):
        try:
            (os.rmdir if is_dir else os.unlink)(one)
        except FileNotFoundError:
            continue  # Another process or thread removed it first.


def remove_quietly(path: Path) -> None:
    """Remove a leftover; if that fails, log a warning and go on. The next sweep of the store removes it."""
    try:
        remove(path)
    except OSError as error:
        _log.warning("%s: a leftover could not be removed: %s", path, error)


def link_tree(source: Path, target: Path) -> None:
    """Give a file, or every file of a directory, a second name without copying the bytes.

    On filesystems without hard links the bytes are copied and fsynced. New directories are fsynced; the caller makes
    the name ``target`` durable.
    """
    found = _tree(source)
    for one, is_dir in found:
        if is_dir:
            os.mkdir(target / one.relative_to(source))
        else:
            _link(one, target / one.relative_to(source))
    for one, is_dir in reversed(found):
        if is_dir:
            fsync_dir(target / one.relative_to(source))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINK:
            raise
        _copy_durable(source, target)


def read_bytes(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """Read a whole small file of a checkpoint. Raises OSError if it is none, or has more than ``most`` bytes."""
    return _read(open_regular(path), path, most)


def read_own(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """Read a whole small file of our own. Raises OSError if it is none, or a link, or has more than ``most`` bytes."""
    return _read(open_own(path, os.O_RDONLY), path, most)


def read_end(path: Path, most: int) -> tuple[bytes, bool]:
    """Return the last bytes of a file of our own, ``most`` of them, and whether they are all."""
    descriptor = open_own(path, os.O_RDONLY)
    try:
        # As far as it went when it was opened: somebody may append faster than it is read.
        end = os.fstat(descriptor).st_size
        place = begin = max(0, end - most)
        blocks = []
        while block := os.pread(descriptor, min(end - place, _BLOCK_BYTES), place):
            blocks.append(block)
            place += len(block)
        return b"".join(blocks), begin == 0
    finally:
        os.close(descriptor)


def _read(descriptor: int, path: Path, most: int) -> bytes:
    try:
        blocks, size = [], 0
        while block := os.read(descriptor, _BLOCK_BYTES):
            blocks.append(block)
            size += len(block)
            if size > most:
                raise OSError(errno.EFBIG, f"expected at most {most} bytes, found more", os.fspath(path))
        return b"".join(blocks)
    finally:
        os.close(descriptor)


def digest(path: Path, *, on_block: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Return the size in bytes and the digest (``"xxh3_128:<hex>"``) of a file, read to its end.

    ``on_block`` is called after each block with its number of bytes.

    The file is read, not memory-mapped: under a memory map, a truncated file or a failed sector kills the process with
    SIGBUS instead of raising an error.
    """
    import xxhash

    hasher = xxhash.xxh3_128()
    size = 0
    descriptor = open_regular(path)
    try:
        buffer = bytearray(_BLOCK_BYTES)
        view = memoryview(buffer)
        while count := os.readv(descriptor, [view]):
            hasher.update(view[:count])
            size += count
            if on_block is not None:
                on_block(count)
    finally:
        os.close(descriptor)
    return size, f"{DIGEST_KIND}:{hasher.hexdigest()}"


def digest_bytes(content: bytes) -> str:
    """Return the digest of bytes, in the form that `digest` returns."""
    import xxhash

    return f"{DIGEST_KIND}:{xxhash.xxh3_128_hexdigest(content)}"


def _write(path: Path, content: bytes, *, durable: bool) -> None:
    descriptor = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        _write_all(descriptor, content)
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _copy_durable(source: Path, target: Path) -> None:
    reading = open_regular(source)
    try:
        writing = open_own(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            while block := os.read(reading, _BLOCK_BYTES):
                _write_all(writing, block)
            os.fsync(writing)
        finally:
            os.close(writing)
    finally:
        os.close(reading)
