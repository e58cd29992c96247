"""Proof that a checkpoint holds the bytes that were committed."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from stepguard import files
from stepguard.errors import CheckpointCorruptError
from stepguard.store import statefile
from stepguard.store.checkpoint import Checkpoint
from stepguard.store.layout import Layout
from stepguard.store.manifest import FileRecord, Manifest

_log = logging.getLogger(__name__)

# What the system answers when this process, or the machine, can open nothing more: it says nothing of the file.
_OF_THE_PROCESS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR})

# What it answers for bytes that are gone, wherever they are read: a bad sector, a bad checksum, a bad structure.
_OF_THE_MEDIUM = frozenset({errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO), errno.ESTALE})


class CheckpointUnreadableError(CheckpointCorruptError):
    """The system could not read a file of a checkpoint: ``error`` is what it answered.

    For a search this is damage. It proves less than a wrong digest does, since a disk may come back.
    """

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path}: could not be read: {error.strerror or error}", path=path)
        self.error = error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What an error of the system in the block means, the only place that says so: that the file ``path`` of a
    checkpoint is damaged, whatever the error, unless it is one of this process, which is raised as itself.

    Raises CheckpointUnreadableError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _OF_THE_PROCESS:
            raise
        raise CheckpointUnreadableError(path, error) from error


def is_of_files(error: OSError, checkpoint: Path) -> bool:
    """Whether an error that a framework met while it restored ``checkpoint`` is one of its files, and not one of the
    program.
    """
    if error.errno in _OF_THE_PROCESS or error.errno is None:
        return False
    is_inside = isinstance(error.filename, (str, bytes)) and os.fsdecode(error.filename).startswith(str(checkpoint))
    return error.errno in _OF_THE_MEDIUM or is_inside


def read_manifest(layout: Layout, name: str) -> Manifest | None:
    """Return the manifest of the checkpoint ``name``, None if it has none.

    Raises CheckpointCorruptError if it is damaged or cannot be read, and CheckpointError if a newer Stepguard wrote it.
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
    """Prove a checkpoint good, and return it with its manifest. Raises as `CheckpointStore.verify` says.

    Damage of a file that no restore reads is only warned of.
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
    """Compare every file with the manifest, and yield an error for each that differs, unraised.

    All sizes come before the first digest: most damage is a file cut short, and is seen without reading gigabytes.
    ``on_block`` is told how many bytes were read, again and again.
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
    """Whether a damage that `damages` has found makes the checkpoint ``name`` one that is not to be restored."""
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
    """Whether TensorFlow's own tools have since saved under the name of a committed checkpoint.

    All of it is then newer than its manifest, and the state file, which they write last, newer still; damage is not
    like that, nor are files that were copied over it. Their checksums are then the proof that is left.
    """
    if layout.entry_suffix is None:
        return False
    names = [one.name for one in manifest.files if layout.is_data(one.name, manifest.name)]
    if not names:
        return False  # It is of another framework.
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
    """Look whether the files of a checkpoint without a manifest, ``present``, are all there and not empty.

    Raises CheckpointCorruptError.
    """
    if not layout.is_candidate(name, present):
        path = layout.manifest(name)
        raise CheckpointCorruptError(f"{path}: expected the manifest of a checkpoint, found none", path=path)
    for one in present:
        path = layout.root / one
        with reading(path):
            is_empty = layout.is_needed(one, name) and files.size_of(path) == 0
        if is_empty:
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
