"""Puts in order what a killed chief has left: saves, replacements and removals that it did not finish.

A save whose files are all on the disk, as its manifest describes them, is finished: only its last renames are missing.
Any other save is removed. A half-written checkpoint never becomes a committed one, because every byte is compared with
the manifest first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from stepguard.disk import files
from stepguard.errors import CheckpointError
from stepguard.store import layout as layouts
from stepguard.store import verification
from stepguard.store.layout import Layout
from stepguard.store.manifest import FileRecord, Manifest
from stepguard.words import logger

_log = logger(__name__)


def put_in_order(layout: Layout) -> list[Path]:
    """Finish or remove what is unfinished, and return the hidden paths that are gone. See `CheckpointStore.sweep`."""
    gone = []
    names = sorted(entry.name for entry in layout.entries())
    # The saves first: the previous checkpoint of a name counts only if the new one cannot be finished.
    for one in sorted(names, key=lambda one: not one.startswith(layouts.STAGE)):
        try:
            if _put_in_order(layout, one):
                gone.append(layout.root / one)
        except OSError as error:
            _log.warning("%s: left behind by a run that was killed, and could not be removed: %s", one, error)
    return gone


def will_be_finished(layout: Layout) -> str | None:
    """Return the name of the save that `put_in_order` would finish, judged by sizes only: no data are read."""
    for entry in layout.entries():
        if entry.name.startswith(layouts.STAGE) and not entry.is_symlink():
            name = layouts.staged_name(entry.name)
            if _unfinished_save(layout, name, layout.root / entry.name, _has_recorded_size) is not None:
                return name
    return None


def _put_in_order(layout: Layout, one: str) -> bool:
    """Handle the hidden name ``one``; return whether there was anything to do."""
    path = layout.root / one
    if os.path.islink(path) and one.startswith((layouts.PRUNED, layouts.STAGE, layouts.REPLACED)):
        pass  # Nothing is moved or removed that lies outside the logdir.
    elif one.startswith(layouts.PRUNED):
        _finish_removal(layout, one[len(layouts.PRUNED) :], path)
    elif one.startswith(layouts.STAGE):
        name = layouts.staged_name(one)
        if not _finish_save(layout, name, path) and not layout.is_candidate(name, layout.present(name)):
            _finish_removal(layout, name, path / layout.manifest(name).name)
    elif one.startswith(layouts.REPLACED):
        layout.put_back(one[len(layouts.REPLACED) :])
    elif not layout.is_aside(one):
        return False
    files.remove(path)
    return True


def _finish_save(layout: Layout, name: str, stage: Path) -> bool:
    """Commit the save ``name`` if every file that its manifest in ``stage`` lists is there or already in place.

    Only the last save before the kill: an older one had failed, and the run has saved without it.
    """
    found = _unfinished_save(layout, name, stage, _is_as_recorded)
    if found is None:
        return False
    manifest, staged = found
    record = stage / layout.manifest(name).name
    in_place = {one.name.split("/", 1)[0] for one in manifest.files} - staged
    # What the save has not yet cleared away of the previous checkpoint of its name.
    layout.remove(name, [one for one in layout.present(name) if one not in in_place])
    layout.move_in(layout.staged(name, [stage / one for one in staged]))
    files.move(record, layout.manifest(name))
    files.fsync_dir(layout.root)
    _log.info("%s: a kill had cut its commit short; every byte of it is there, and it is committed now", name)
    return True


def _unfinished_save(
    layout: Layout, name: str, stage: Path, is_there: Callable[[Path, FileRecord], bool]
) -> tuple[Manifest, set[str]] | None:
    """The manifest of a save that lacks only renames, and its files that are still in ``stage``."""
    record = stage / layout.manifest(name).name
    manifest = _unfinished(layout, name, record)
    if manifest is None or not _is_newest(layout, manifest):
        return None
    # Not whatever else lies there, such as the `.nfs*` of a file that an NFS client has open.
    staged = {entry.name for entry in stage.iterdir()} & {one.name.split("/", 1)[0] for one in manifest.files}
    for one in manifest.files:
        place = stage if one.name.split("/", 1)[0] in staged else layout.root
        if not is_there(place, one):
            return None
    return manifest, staged


def _is_newest(layout: Layout, manifest: Manifest) -> bool:
    for one in layout.candidates():
        if one.is_committed:
            try:
                other = verification.read_manifest(layout.within(one.root), one.name)
            except (CheckpointError, OSError):
                continue  # Damage does not matter here.
            if other is not None and other.name != manifest.name and other.time >= manifest.time:
                return False
    return True


def _finish_removal(layout: Layout, name: str, record: Path) -> None:
    """Remove the files of a checkpoint that has no manifest, if they are those that ``record`` describes."""
    manifest = _unfinished(layout, name, record)
    if manifest is None:
        return
    for one in manifest.files:
        is_there = files.size_of(layout.root / one.name) is not None
        if is_there and not _is_as_recorded(layout.root, one):
            return  # Another checkpoint of that name was written since.
    layout.remove(name, sorted({one.name.split("/", 1)[0] for one in manifest.files}))


def _unfinished(layout: Layout, name: str, record: Path) -> Manifest | None:
    """The manifest in the file ``record``, unless a checkpoint of that name is committed."""
    path = layout.manifest(name)
    if not layout.is_name(name) or os.path.lexists(path):
        return None
    try:
        return Manifest.from_json(files.read_bytes(record), path)
    except (CheckpointError, OSError):
        return None


def _has_recorded_size(place: Path, one: FileRecord) -> bool:
    return files.size_of(place / one.name) == one.size


def _is_as_recorded(place: Path, one: FileRecord) -> bool:
    return _has_recorded_size(place, one) and files.digest(place / one.name)[1] == one.digest
