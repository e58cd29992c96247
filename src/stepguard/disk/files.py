"""Durable files: this module, `new_file` and `appended_file` are the only users of ``os.replace`` and ``os.fsync``.

Every function of the three reaches the disk through the ``os`` name of its module and nothing else, so that a test can
put a recording, failing or killing stand-in there (``monkeypatch.setattr(files, "os", ...)``) and see each call. This
is why they use no pathlib methods. Only the flush of the drive, which macOS needs after an fsync, is in `system`.

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

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from stepguard.disk import system
from stepguard.words import logger

_log = logger(__name__)

# Reads of this size keep the disk busy and the GIL free (both os.readinto and xxhash release it), and two of them
# fit into the cache of a core.
BLOCK_BYTES = 1 << 20

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
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync(descriptor: int) -> None:
    os.fsync(descriptor)
    system.flush_drive(descriptor)


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
        _fsync(descriptor)
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
        write_all(descriptor, content)
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
            _fsync(descriptor)
        return size + len(lines)
    finally:
        os.close(descriptor)


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
        while block := os.pread(descriptor, min(end - place, BLOCK_BYTES), place):
            blocks.append(block)
            place += len(block)
        return b"".join(blocks), begin == 0
    finally:
        os.close(descriptor)


def _read(descriptor: int, path: Path, most: int) -> bytes:
    try:
        blocks, size = [], 0
        while block := os.read(descriptor, BLOCK_BYTES):
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
        buffer = bytearray(BLOCK_BYTES)
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
        write_all(descriptor, content)
        if durable:
            _fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of ``content`` to an open file: the system may take only a part of it at a time."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _copy_durable(source: Path, target: Path) -> None:
    reading = open_regular(source)
    try:
        writing = open_own(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            while block := os.read(reading, BLOCK_BYTES):
                write_all(writing, block)
            _fsync(writing)
        finally:
            os.close(writing)
    finally:
        os.close(reading)
