"""Replaces damaged files of a committed checkpoint by good ones from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError
from stepguard.store import verification
from stepguard.store.layout import Layout
from stepguard.store.manifest import FileRecord


def mend(layout: Layout, name: str, fetch: Callable[[FileRecord, Path], None]) -> list[str]:
    """Replace the damaged files of the checkpoint ``name``. See `CheckpointStore.mend`.

    Each is fetched into a staging directory, fsynced, and renamed into its place: a kill leaves the damaged file or the
    good one. The file gets another inode, so that another checkpoint that shares the damaged one is not changed.
    """
    manifest = verification.read_manifest(layout, name)
    if manifest is None:
        return []
    records = {layout.root / one.name: one for one in manifest.files}
    damaged = [one.path for one in verification.damages(layout, manifest)]
    stage = layout.stage(name)
    mended: list[str] = []
    files.remove(stage)
    try:
        for path in damaged:
            record = records.get(path) if path is not None else None
            if path is None or record is None:
                continue
            aside = stage / record.name
            files.make_dirs(aside.parent)
            fetch(record, aside)
            if files.digest(aside) != (record.size, record.digest):
                raise CheckpointCorruptError(
                    f"{aside}: expected what the manifest says, found something else", path=path
                )
            files.fsync_file(aside)
            files.make_dirs(path.parent)
            files.move(aside, path)
            files.fsync_dir(path.parent)
            mended.append(record.name)
    finally:
        files.remove_quietly(stage)
    return mended
