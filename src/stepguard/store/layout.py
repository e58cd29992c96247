"""Which names in a directory belong to which checkpoint, and in which order they may be removed.

A checkpoint has a name such as ``model.ckpt-1200``; its files are siblings ``NAME.<suffix>`` (TensorFlow) or a
directory ``NAME/`` (PyTorch, JAX); its commit record is ``NAME.manifest.json``. What a framework's own saver writes,
without a manifest, has the names that the `SaverFiles` tell, which are handed in.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Protocol

from stepguard.disk import files
from stepguard.disk.schema import MOST_DIGITS
from stepguard.errors import CheckpointError
from stepguard.store import statefile
from stepguard.store.checkpoint import Checkpoint
from stepguard.store.manifest import SUFFIX as MANIFEST_SUFFIX
from stepguard.store.manifest import Manifest
from stepguard.words import logger

_log = logger(__name__)

STAGE = ".stage-"
"""The prefix of the directory in which the save NAME is being written."""
REPLACED = ".replaced-"
"""The prefix of the directory with the previous checkpoint NAME, while a new one replaces it."""
PRUNED = ".pruned-"
"""The prefix of the manifest of the checkpoint NAME while its files are being removed."""

# The store's own temporary files, each of which is then renamed over the previous version.
_ASIDE = re.compile(r"\.(?:checkpoint|rollback\.json|.+\.manifest\.json)(?:\.\d+)?\.tmp")

# A suffix without a further dot: "model.ckpt-12" must not take the files of a "model.ckpt-12.best".
_PLAIN_SUFFIX = re.compile(r"\.[^./]+")


class SaverFiles(Protocol):
    """The names of the files that a framework's own saver writes for a checkpoint; no method touches the disk.

    The entry file is the one by which a checkpoint without a manifest is known. `stepguard.store.tensorflow_files` has
    the names of TensorFlow.
    """

    def entry_file(self, name: str) -> str:
        """Return the entry file of the checkpoint ``name``."""

    def checkpoint_of_entry(self, file_name: str) -> str | None:
        """Return the checkpoint whose entry file has this name; None for any other file."""

    def without_old_shard(self, file_name: str) -> str:
        """Return the checkpoint that has this shard without a suffix, and any other name as it is."""

    def is_own(self, file_name: str, name: str) -> bool:
        """Whether the saver writes ``file_name`` for the checkpoint ``name``."""

    def is_data(self, file_name: str, name: str) -> bool:
        """Whether ``file_name`` is one of the files of the checkpoint ``name`` that hold its tensors."""

    def is_needed(self, file_name: str, name: str) -> bool:
        """Whether a restore of the checkpoint ``name`` reads ``file_name``."""

    def missing_data(self, name: str, present: Sequence[str]) -> str | None:
        """Return the first data file that the checkpoint ``name`` with the files ``present`` lacks; None if none."""

    def stated(self, names: Iterable[str], listed: Iterable[str]) -> list[str]:
        """Return the names as the state file has them, in a directory with the files ``listed``."""


# Longer than the tick of any file system's clock but FAT's, whose times have whole seconds.
_SETTLED_NSECS = 2_100_000_000


def staged_name(file_name: str) -> str:
    """Return the name of the checkpoint that is being written in the staging directory ``file_name``."""
    return file_name[len(STAGE) :].partition("~")[0]


def _is_same(one: Path, other: Path) -> bool:
    try:
        return files.read_bytes(one) == files.read_bytes(other)
    except OSError:
        return False


class Layout:
    """The names in the directory ``root`` that belong to checkpoints of one ``basename``.

    Without ``saver_files`` only committed checkpoints count.
    """

    def __init__(self, root: Path, basename: str, saver_files: SaverFiles | None) -> None:
        if not basename or "/" in basename or os.sep in basename or basename.startswith("."):
            raise ValueError(f"basename must be a file name that does not begin with a dot, got {basename!r}")
        self.root = root
        self.basename = basename
        self.saver_files = saver_files
        self._name_pattern = re.compile(re.escape(basename) + rf"(?:-([0-9]{{1,{MOST_DIGITS}}}))?")
        # When the directory had changed last as it was listed, and its names by checkpoint.
        self._listing: tuple[int | None, dict[str, list[str]]] | None = None

    def within(self, root: Path) -> Layout:
        """Return the same layout for another directory."""
        if root == self.root:
            return self
        return Layout(root, self.basename, self.saver_files)

    # --- names ---

    @staticmethod
    def is_aside(file_name: str) -> bool:
        """Whether ``file_name`` is a temporary state file or manifest, which a kill during its write leaves."""
        return _ASIDE.fullmatch(file_name) is not None

    def is_name(self, name: str) -> bool:
        """Whether ``name`` is the name of a checkpoint with this basename."""
        return self._name_pattern.fullmatch(name) is not None

    def step_of(self, name: str) -> int | None:
        """Return the step in a name; None if it has none. Raises ValueError if it is not the name of a checkpoint."""
        match = self._name_pattern.fullmatch(name)
        if match is None:
            raise ValueError(f"expected a checkpoint name {self.basename} or {self.basename}-<step>, got {name!r}")
        return None if match.group(1) is None else int(match.group(1))

    def stage(self, name: str, number: int = 0) -> Path:
        """Return the directory in which the checkpoint ``name`` is written, a different one for each ``number``."""
        return self.root / (STAGE + name + (f"~{number}" if number else ""))

    def replaced(self, name: str) -> Path:
        """Return the directory that keeps the previous checkpoint ``name`` while it is replaced."""
        return self.root / (REPLACED + name)

    def manifest(self, name: str) -> Path:
        """Return the manifest of the checkpoint ``name``."""
        return self.root / (name + MANIFEST_SUFFIX)

    def is_entry(self, file_name: str, name: str) -> bool:
        """Whether ``file_name`` is the entry file of the checkpoint ``name``."""
        return self.saver_files is not None and file_name == self.saver_files.entry_file(name)

    def may_hold(self, file_name: str, name: str) -> bool:
        """Whether an engine may write ``file_name`` for the checkpoint ``name``."""
        if file_name == name or self._is_savers(file_name, name):
            return True
        return file_name.startswith(name) and _PLAIN_SUFFIX.fullmatch(file_name[len(name) :]) is not None

    def is_needed(self, file_name: str, name: str) -> bool:
        """Whether a restore of the checkpoint ``name`` reads ``file_name``."""
        return self.saver_files is None or self.saver_files.is_needed(file_name, name)

    # --- what is there ---

    def entries(self) -> Iterator[os.DirEntry[str]]:
        """Return the entries of the directory; none if it is missing or is no directory."""
        try:
            with os.scandir(self.root) as found:
                yield from found
        except (FileNotFoundError, NotADirectoryError):
            return

    def candidates(self) -> list[Checkpoint]:
        """Return the possible checkpoints, newest first (by step, then by time), without opening any file."""
        found: dict[str, Checkpoint] = {}
        replaced: list[str] = []
        names: set[str] = set()
        for entry in self.entries():
            names.add(entry.name)
            if entry.name.startswith(REPLACED):
                if entry.is_symlink():
                    continue  # What is restored and moved must not be of another logdir.
                replaced.append(entry.name[len(REPLACED) :])
            else:
                self._note(found, entry)
        for name in self._removed(found, names):
            del found[name]
        for name in replaced:
            # The previous checkpoint counts only while its name is vacant; otherwise it is a leftover of a replacement.
            if name not in found:
                found.update({one.name: one for one in self._kept(name) if one.name == name})
        return sorted(found.values(), key=lambda one: (-1 if one.step is None else one.step, one.time), reverse=True)

    def _kept(self, name: str) -> list[Checkpoint]:
        """The previous checkpoint of ``name``, while a new one replaces it."""
        try:
            return self.within(self.replaced(name)).candidates()
        except OSError as error:
            _log.warning("%s: what is kept there cannot be read: %s", self.replaced(name), error)
            return []

    def _note(self, found: dict[str, Checkpoint], entry: os.DirEntry[str]) -> None:
        is_manifest = entry.name.endswith(MANIFEST_SUFFIX)
        if is_manifest:
            name: str | None = entry.name[: -len(MANIFEST_SUFFIX)]
        else:
            name = None if self.saver_files is None else self.saver_files.checkpoint_of_entry(entry.name)
        if name is None or not self.is_name(name) or (not is_manifest and name in found):
            return
        try:
            modified = entry.stat().st_mtime
        except FileNotFoundError:
            if not entry.is_symlink():
                return  # It was pruned after it was listed.
            modified = 0.0
        except OSError:
            modified = 0.0  # A later read reports the error.
        found[name] = Checkpoint(self.root, name, self.step_of(name), modified, is_manifest)

    def grouped(self) -> dict[str, list[str]]:
        """Return the names in the directory, from one listing, grouped by the checkpoint to which they may belong."""
        groups: dict[str, list[str]] = {}
        for entry in self.entries():
            if entry.name.startswith(self.basename):
                name = self.basename + entry.name[len(self.basename) :].partition(".")[0]
                if self.saver_files is not None:
                    name = self.saver_files.without_old_shard(name)
                groups.setdefault(name, []).append(entry.name)
        return groups

    def present(self, name: str, among: Iterable[str] | None = None) -> list[str]:
        """Return the sorted top-level names that belong to the checkpoint ``name``.

        They are its manifest, the files that the manifest lists, and those that a framework's own saver writes
        for that name. ``among`` are the names to search, if the directory was already listed.
        """
        path = self.manifest(name)
        listed: set[str] | None = set()
        try:
            records = Manifest.from_json(files.read_bytes(path), path).files
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (CheckpointError, OSError):
            # The list is lost, or of a newer Stepguard: files with its name and one suffix count as its own.
            listed = None
        else:
            listed = {one.name.split("/", 1)[0] for one in records}

        def belongs(one: str) -> bool:
            if one in (name, path.name) or self._is_savers(one, name):
                return True
            return self.may_hold(one, name) if listed is None else one in listed

        names = self._listed_near(name) if among is None else among
        return sorted(one for one in names if belongs(one))

    def _listed_near(self, name: str) -> Sequence[str]:
        """The names in the directory that may belong to the checkpoint ``name``.

        The directory is listed again only if it has changed: whoever looks at thousands of checkpoints, one after the
        other, would else list it thousands of times.
        """
        if not self.is_name(name):
            # Of another basename: a state file may lead to the end of another run.
            return [entry.name for entry in self.entries()]
        try:
            changed = os.stat(self.root).st_mtime_ns
        except OSError:
            changed = None
        if self._listing is None or changed is None or self._listing[0] != changed:
            began = time.time_ns()
            groups = self.grouped()
            # The clock of a file system is coarse: what changes right after the last change has the same time.
            is_settled = changed is not None and abs(began - changed) > _SETTLED_NSECS
            self._listing = (changed, groups) if is_settled else None
        else:
            groups = self._listing[1]
        return groups.get(name, ())

    def is_candidate(self, name: str, present: Sequence[str]) -> bool:
        """Whether `candidates` would list a checkpoint with these files."""
        return self.manifest(name).name in present or any(self.is_entry(one, name) for one in present)

    def missing_data(self, name: str, present: Sequence[str]) -> str | None:
        """Return the data file that a checkpoint without a manifest lacks, as its other files show; None if none."""
        if self.saver_files is None:
            return name
        # A directory of the checkpoint's name is of another framework.
        files_of = [one for one in present if one != name or files.size_of(self.root / name) is not None]
        return self.saver_files.missing_data(name, files_of)

    def is_data(self, file_name: str, name: str) -> bool:
        """Whether ``file_name`` is a data file of the checkpoint ``name`` as a framework's own saver writes it."""
        return self.saver_files is not None and self.saver_files.is_data(file_name, name)

    def stated(self, names: Iterable[str]) -> list[str]:
        """Return the names as the framework's own tools expect them in the state file."""
        if self.saver_files is None:
            return list(names)
        return self.saver_files.stated(names, (entry.name for entry in self.entries()))

    def _is_savers(self, file_name: str, name: str) -> bool:
        return self.saver_files is not None and self.saver_files.is_own(file_name, name)

    def removed(self) -> list[str]:
        """Return the names of checkpoints whose files a framework's own saver has removed.

        Such a saver does not know manifests: only the manifest is left, and the saver's state file no longer lists the
        checkpoint.
        """
        names = {entry.name for entry in self.entries()}
        manifests = [one.removesuffix(MANIFEST_SUFFIX) for one in names if one.endswith(MANIFEST_SUFFIX)]
        return self._removed(filter(self.is_name, manifests), names)

    def _removed(self, manifested: Iterable[str], names: AbstractSet[str]) -> list[str]:
        if self.saver_files is None:
            return []
        entry_file = self.saver_files.entry_file
        # Not one that has its entry file, nor a directory of another engine's: only the few others are read.
        lonely = [name for name in manifested if names.isdisjoint((name, entry_file(name)))]
        state = statefile.read(self.root) if lonely else None
        if state is None:
            return []
        return [name for name in lonely if name not in (state.newest, *state.names) and self._is_bare(name)]

    def _is_bare(self, name: str) -> bool:
        """Whether the manifest of ``name`` is a saver's, and none of the files that it lists exists.

        A saver writes files beside the manifest, of the old format too; another engine's files are in a directory.
        """
        try:
            listed = Manifest.from_json(files.read_bytes(self.manifest(name)), self.manifest(name)).files
        except (CheckpointError, OSError):
            return False
        is_savers = not any("/" in one.name for one in listed)
        return is_savers and not any(os.path.lexists(self.root / one.name) for one in listed)

    # --- moving ---

    def staged(self, name: str, entries: Iterable[Path]) -> list[Path]:
        """Return the staged entries of the checkpoint ``name`` in the order in which they become visible.

        Raises ValueError if one of them cannot be of that checkpoint.
        """
        for entry in entries:
            if not self.may_hold(entry.name, name):
                raise ValueError(f"{entry}: expected only {name}/ or files {name}.<suffix> in the staging directory")
        # The entry file makes a checkpoint visible to readers that ignore manifests, so the data comes first.
        return sorted(entries, key=lambda entry: (self.is_entry(entry.name, name), entry))

    def move_in(self, staged: Sequence[Path]) -> None:
        """Give the entries, in the order of `staged`, their places in the directory, durably."""
        for entry in staged[:-1]:
            files.move(entry, self.root / entry.name)
        if len(staged) > 1 and self.saver_files is not None:
            files.fsync_dir(self.root)
        for entry in staged[-1:]:
            files.move(entry, self.root / entry.name)
        # A manifest must never exist without its files.
        files.fsync_dir(self.root)

    # --- removing ---

    def put_back(self, name: str) -> None:
        """Give the previous checkpoint its name back, unless the new one that should replace it is complete.

        The previous one stays complete until the new one is.
        """
        kept, manifest = self.within(self.replaced(name)), self.manifest(name)
        if not self.is_name(name):
            return
        present, here = kept.present(name), self.present(name)
        # Else it was being kept when the kill came, and is whole here.
        is_half_done = not set(present) <= set(here) and _is_same(kept.manifest(name), manifest)
        if not present or (self.is_candidate(name, here) and not is_half_done):
            return
        self.remove(name, here)
        # The entry file last: until then the manifest tells that this is not done.
        for one in sorted(present, key=lambda one: (self.is_entry(one, name), one == manifest.name)):
            files.link_tree(kept.root / one, self.root / one)
            files.fsync_dir(self.root)

    def remove(self, name: str, present: Sequence[str], *, manifest_to: Path | None = None) -> None:
        """Remove files of a checkpoint in such an order that, after a kill at any point, the rest looks incomplete.

        With ``manifest_to`` the manifest is renamed to that path until the rest is gone, so that the removal can be
        finished later.
        """
        manifest = self.manifest(name)
        if manifest.name in present:
            # Manifest first: a half-deleted checkpoint must never look committed.
            if manifest_to is not None:
                files.move(manifest, manifest_to)
            else:
                files.remove(manifest)
            files.fsync_dir(self.root)
        rest = [one for one in present if one != manifest.name]
        for entry in [one for one in rest if self.is_entry(one, name)]:
            # Then the entry file, by which the framework's tools and Stepguard find a checkpoint without a manifest.
            files.remove(self.root / entry)
            files.fsync_dir(self.root)
            rest.remove(entry)
        for one in rest:
            files.remove(self.root / one)
        if manifest_to is not None:
            files.remove(manifest_to)

    def quarantine(self, name: str, target: Path) -> int:
        """Move the files of a damaged checkpoint to the directory ``target``, and return their number."""
        manifest = self.manifest(name).name
        present = self.present(name)
        # The entry file first and the manifest second, unlike in `remove`: the checkpoint is damaged, and without its
        # manifest that could no longer be seen.
        first = [one for one in present if self.is_entry(one, name)]
        order = [*first, *[one for one in present if one == manifest]]
        order += [one for one in present if one not in order]
        moved: list[str] = []
        try:
            for one in order:
                files.move(self.root / one, target / one)
                moved.append(one)
                if one in first:
                    files.fsync_dir(self.root)
        except OSError:
            # All or nothing: files that stay here would be taken for parts of the next checkpoint of this name.
            for one in reversed(moved):
                with contextlib.suppress(OSError):
                    files.move(target / one, self.root / one)
            raise
        return len(order)
