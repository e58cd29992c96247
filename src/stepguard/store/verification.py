"""Verifies that a checkpoint contains the bytes that were committed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError
from stepguard.store import statefile
from stepguard.store.checkpoint import Checkpoint
from stepguard.store.layout import Layout
from stepguard.store.manifest import FileRecord, Manifest
from stepguard.words import logger

_log = logger(__name__)

# Errors that mean that this process, or the machine, has no resources left; they say nothing about the file.
_OF_THE_PROCESS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR})

# Errors that mean that bytes are lost, whoever reads them: a bad sector, a bad checksum, a bad structure.
_OF_THE_MEDIUM = frozenset({errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO), errno.ESTALE})


class CheckpointUnreadableError(CheckpointCorruptError):
    """The system could not read a file of a checkpoint, because of ``error``.

    For a search this is damage. It proves less than a wrong digest, because a disk may recover.
    """

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path}: could not be read: {error.strerror or error}", path=path)
        self.error = error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A block that reads the file ``path`` of a checkpoint, in which a system error means that the file is damaged.

    Errors about this process's own resources are raised unchanged. Only this function makes that decision.

    Raises CheckpointUnreadableError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _OF_THE_PROCESS:
            raise
        raise CheckpointUnreadableError(path, error) from error


def is_of_files(error: OSError, checkpoint: Path) -> bool:
    """Whether ``error``, raised while a framework restored ``checkpoint``, concerns its files and not the program."""
    if error.errno in _OF_THE_PROCESS or error.errno is None:
        return False
    is_inside = isinstance(error.filename, (str, bytes)) and os.fsdecode(error.filename).startswith(str(checkpoint))
    return error.errno in _OF_THE_MEDIUM or is_inside


def read_manifest(layout: Layout, name: str) -> Manifest | None:
    """Return the manifest of the checkpoint ``name``; None if it has none.

    Raises CheckpointCorruptError if it is damaged or unreadable, and CheckpointError if a newer Stepguard wrote it.
    """
    path = layout.manifest(name)
    try:
        with reading(path):
            content = files.read_bytes(path)
    except CheckpointUnreadableError as error:
        if isinstance(error.error, FileNotFoundError) and not os.path.islink(path):
            return None
        if isinstance(error.error, IsADirectoryError):
            raise CheckpointCorruptError(f"{path}: expected a manifest, found a directory", path=path) from error.error
        raise
    manifest = Manifest.from_json(content, path)
    step = layout.step_of(name) if layout.is_name(name) else None
    if step is not None and manifest.step != step:
        raise CheckpointCorruptError(f"{path}: expected the step {step}, found {manifest.step}", path=path)
    return manifest


def verify(layout: Layout, checkpoint: Checkpoint) -> Checkpoint:
    """Verify a checkpoint, and return it with its manifest. Raises as `CheckpointStore.verify` does.

    Damage to a file that no restore reads gives only a warning.
    """
    manifest = read_manifest(layout, checkpoint.name)
    if manifest is None:
        verify_unmanifested(layout, checkpoint.name, layout.present(checkpoint.name))
        return replace(checkpoint, is_committed=False, manifest=None)
    spare: list[CheckpointCorruptError] = []
    try:
        for damage in damages(layout, manifest):
            if prevents_restore(layout, manifest.name, damage):
                raise damage
            spare.append(damage)
    except CheckpointCorruptError:
        if not was_written_over(layout, manifest):
            raise
        verify_unmanifested(layout, checkpoint.name, layout.present(checkpoint.name))
        return replace(checkpoint, is_committed=False, manifest=None)
    for damage in spare:
        _log.warning("%s", damage)
    return replace(checkpoint, step=manifest.step, time=manifest.time, is_committed=True, manifest=manifest)


def damages(
    layout: Layout, manifest: Manifest, *, on_block: Callable[[int], None] | None = None
) -> Iterator[CheckpointCorruptError]:
    """Compare every file with the manifest, and yield (not raise) an error for each file that differs.

    All sizes are compared before the first digest, because most damage is a truncated file, which is found without
    reading gigabytes. ``on_block`` is called with the number of bytes after each block that was read.
    """
    right_size = []
    for record in manifest.files:
        damage = size_damage(layout, manifest.name, record)
        if damage is None:
            right_size.append(record)
        else:
            yield damage
    for record in right_size:
        damage = _digest_damage(layout, manifest.name, record, on_block)
        if damage is not None:
            yield damage


def prevents_restore(layout: Layout, name: str, damage: CheckpointCorruptError) -> bool:
    """Whether ``damage``, which `damages` has found, means that the checkpoint ``name`` must not be restored."""
    return damage.path is None or layout.is_needed(damage.path.name, name)


def size_damage(layout: Layout, name: str, record: FileRecord) -> CheckpointCorruptError | None:
    """Compare the size of one file of the checkpoint ``name`` with the manifest, without reading the file."""
    path = layout.root / record.name
    try:
        with reading(path):
            size = files.size_of(path)
    except CheckpointUnreadableError as error:
        return error
    if size == record.size:
        return None
    found = "none" if size is None else f"{size} bytes"
    return _damage(layout, name, path, f"expected a file of {record.size} bytes, found {found}")


def was_written_over(layout: Layout, manifest: Manifest) -> bool:
    """Whether TensorFlow's own tools have overwritten a committed checkpoint.

    Then all its files are newer than its manifest, and the state file, which these tools write last, is newer still.
    Neither damage nor copied files look like this. Only TensorFlow's own checksums can then verify the files.
    """
    if layout.saver_files is None:
        return False
    names = [one.name for one in manifest.files if layout.is_data(one.name, manifest.name)]
    if not names:
        return False  # The checkpoint is of another framework.
    try:
        committed = layout.manifest(manifest.name).stat().st_mtime_ns
        written = [(layout.root / name).stat().st_mtime_ns for name in names]
        stated = (layout.root / statefile.FILE_NAME).stat().st_mtime_ns
    except OSError:
        return False
    state = statefile.read(layout.root)
    is_listed = state is not None and manifest.name in (state.newest, *state.names)
    return is_listed and committed < min(written) and max(written) <= stated


def verify_unmanifested(layout: Layout, name: str, present: Sequence[str]) -> None:
    """Check that the files ``present`` of a checkpoint without a manifest are complete and not empty.

    Raises CheckpointCorruptError if not.
    """
    if not layout.is_candidate(name, present):
        path = layout.manifest(name)
        raise CheckpointCorruptError(f"{path}: expected the manifest of a checkpoint, found none", path=path)
    for one in present:
        path = layout.root / one
        if not layout.is_needed(one, name):
            continue
        with reading(path):
            size, is_dir = files.size_of(path), os.path.isdir(path)
        if size is None and not is_dir:
            raise CheckpointCorruptError(f"{path}: expected a regular file, found none", path=path)
        if size == 0:
            raise CheckpointCorruptError(f"{path}: expected a file with content, found 0 bytes", path=path)
    missing = layout.missing_data(name, present)
    if missing is not None:
        path = layout.root / missing
        raise CheckpointCorruptError(f"{path}: expected a file, found none", path=path)


def _digest_damage(
    layout: Layout, name: str, record: FileRecord, on_block: Callable[[int], None] | None
) -> CheckpointCorruptError | None:
    path = layout.root / record.name
    try:
        with reading(path):
            _, digest = files.digest(path, on_block=on_block)
    except CheckpointUnreadableError as error:
        if isinstance(error.error, FileNotFoundError):
            return _damage(layout, name, path, "expected a file, found none")
        return error
    if digest == record.digest:
        return None
    return _damage(layout, name, path, f"expected the digest {record.digest}, found {digest}")


def _damage(layout: Layout, name: str, path: Path, found: str) -> CheckpointCorruptError:
    spare = "" if layout.is_needed(path.name, name) else "; the checkpoint can be restored without it"
    return CheckpointCorruptError(f"{path}: {found}{spare}", path=path)
