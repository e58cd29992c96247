"""The way of a checkpoint's files to their names: written in a staging directory, digested, and the way cleared."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from stepguard.disk import files, new_file
from stepguard.store import layout as layouts
from stepguard.store.layout import Layout
from stepguard.store.manifest import FileRecord
from stepguard.words import logger

_log = logger(__name__)

_MOST_STAGES = 10


class NameTakenError(OSError):
    """A checkpoint cannot get its name, because existing files of that name cannot be removed.

    A checkpoint of another step can still be saved.
    """


class Staging:
    """The staging directories of one store. For one thread at a time, in the process of the chief."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._stages: dict[str, Path] = {}

    def begin(self, name: str) -> Path:
        """Return an empty directory for the files of the checkpoint ``name``."""
        stage = self._stages[name] = self._vacant_stage(name)
        files.make_dir(stage)
        return stage

    def of(self, name: str) -> Path:
        """Return the directory that :meth:`begin` made for ``name``."""
        return self._stages.get(name, self._layout.stage(name))

    def _vacant_stage(self, name: str) -> Path:
        """The path of a staging directory that does not exist. An old one is removed first.

        If it cannot be removed (it belongs to another user, or an NFS client has a file in it open), another path is
        returned.
        """
        for number in range(_MOST_STAGES):
            stage = self._layout.stage(name, number)
            try:
                files.remove(stage)
            except OSError as error:
                if number == _MOST_STAGES - 1:
                    raise
                _log.debug("%s: could not be removed: %s", stage, error)
            else:
                break
        return stage

    def repeating(self, name: str, before: str | None) -> contextlib.AbstractContextManager[None]:
        """A block in which the staged files of ``name`` share their bytes with equal ones of the checkpoint ``before``.

        See `stepguard.disk.new_file.repeating`.
        """
        stage = self.of(name)

        def earlier(path: Path) -> Path | None:
            if before is None or before == name or stage not in path.parents:
                return None
            # What comes after the checkpoint's name: a suffix, or a file in its directory.
            inside = path.relative_to(stage).as_posix()
            return self._layout.root / (before + inside[len(name) :]) if inside.startswith(name) else None

        return new_file.repeating(earlier)

    def discard(self, stage: Path) -> None:
        """Remove a staging directory and its contents. It is no error if it is already gone."""
        root = self._layout.root
        if stage.parent != root or not stage.name.startswith(layouts.STAGE):
            raise ValueError(f"expected a staging directory of {root}, got {stage}")
        files.remove(stage)

    def end(self, name: str) -> None:
        """Remove what is left of the staging directory of ``name``, and of the checkpoint that it has replaced."""
        files.remove_quietly(self._stages.pop(name, self._layout.stage(name)))
        files.remove_quietly(self._layout.replaced(name))


def records(place: Path, entries: Sequence[str], digests: Mapping[str, tuple[int, str]]) -> tuple[FileRecord, ...]:
    """Return the records of all files of these ``entries`` of the directory ``place``, for a manifest.

    A file that is not in ``digests`` is read. Raises OSError if a file has another size than was written.
    """
    found = []
    for path in sorted(path for entry in entries for path in _files_below(place / entry)):
        inside = path.relative_to(place).as_posix()
        size, digest = digests.get(inside) or files.digest(path)
        if size != files.size_of(path):
            raise OSError(errno.EIO, f"expected the {size} bytes that were written, found another size", str(path))
        found.append(FileRecord(inside, size, digest))
    return tuple(found)


def set_aside(layout: Layout, name: str, incoming: Sequence[str]) -> None:
    """Clear the way for a checkpoint whose name is taken, so that the previous one can still be restored.

    Raises NameTakenError, with nothing removed that could be restored, if something in the way cannot be read or
    removed.
    """
    root = layout.root
    present = layout.present(name)
    if layout.is_candidate(name, present):
        replaced = layout.replaced(name)
        files.remove(replaced)
        files.make_dir(replaced)
        for one in present:
            files.link_tree(root / one, replaced / one)
        files.fsync_dir(replaced)
        files.fsync_dir(root)
    # Leftovers of a failed save, onto which no directory could be renamed, or files of another engine.
    present += [one for one in incoming if one not in present and os.path.lexists(root / one)]
    try:
        layout.remove(name, present)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NameTakenError(error.errno, f"{name} is in the way: {error.strerror}", error.filename) from error


def _files_below(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        return [path]
    return [Path(directory, name) for directory, _, names in os.walk(path) for name in names]
