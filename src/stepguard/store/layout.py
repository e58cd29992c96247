"""Which names in a directory belong to which checkpoint, and in which order they may be removed.

A checkpoint has a name such as ``model.ckpt-1200``; its files are siblings ``NAME.<suffix>`` (TensorFlow) or a
directory ``NAME/`` (PyTorch, JAX); its commit record is ``NAME.manifest.json``. The entry file (TensorFlow:
``NAME.index``) is the one by which a checkpoint without a manifest is known.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from stepguard.disk import files
from stepguard.disk.schema import MOST_DIGITS
from stepguard.errors import CheckpointCorruptError, CheckpointError
from stepguard.log import logger
from stepguard.store import statefile
from stepguard.store.checkpoint import Checkpoint
from stepguard.store.manifest import SUFFIX as MANIFEST_SUFFIX
from stepguard.store.manifest import Manifest

_log = logger(__name__)

STAGE = ".stage-"
"""The prefix of the directory in which the save NAME is being written."""
REPLACED = ".replaced-"
"""The prefix of the directory with the previous checkpoint NAME, while a new one replaces it."""
PRUNED = ".pruned-"
"""The prefix of the manifest of the checkpoint NAME while its files are being removed."""

# The store's own temporary files, each of which is then renamed over the previous version.
_ASIDE = re.compile(r"\.(?:checkpoint|.+\.manifest\.json)(?:\.\d+)?\.tmp")

# The suffixes of files that TensorFlow's own tools write.
_TENSORFLOW_SUFFIX = re.compile(r"\.(?:index|meta|data-\d{5,}-of-\d{5,})|-\d{5,}-of-\d{5,}")
_TENSORFLOW_META = ".meta"
_TENSORFLOW_DATA = re.compile(r"\.data-(\d{5,})-of-(\d{5,})")
# The shards of the old format (V1); unsharded data is one file with the name of the checkpoint.
_OLD_SHARD = re.compile(r"-(\d{5,})-of-(\d{5,})")

# A suffix without a further dot: "model.ckpt-12" must not take the files of a "model.ckpt-12.best".
_PLAIN_SUFFIX = re.compile(r"\.[^./]+")


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
    """The names in the directory ``root`` that belong to checkpoints of one ``basename``."""

    def __init__(self, root: Path, basename: str, entry_suffix: str | None) -> None:
        if not basename or "/" in basename or os.sep in basename or basename.startswith("."):
            raise ValueError(f"basename must be a file name that does not begin with a dot, got {basename!r}")
        if entry_suffix is not None and not _PLAIN_SUFFIX.fullmatch(entry_suffix):
            raise ValueError(f"entry_suffix must be a dot and a suffix such as '.index', got {entry_suffix!r}")
        self.root = root
        self.basename = basename
        self.entry_suffix = entry_suffix
        self._name_pattern = re.compile(re.escape(basename) + rf"(?:-([0-9]{{1,{MOST_DIGITS}}}))?")
        # When the directory had changed last as it was listed, and its names by checkpoint.
        self._listing: tuple[int | None, dict[str, list[str]]] | None = None

    def within(self, root: Path) -> Layout:
        """Return the same layout for another directory."""
        if root == self.root:
            return self
        return Layout(root, self.basename, self.entry_suffix)

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
        return self.entry_suffix is not None and file_name == name + self.entry_suffix

    def may_hold(self, file_name: str, name: str) -> bool:
        """Whether an engine may write ``file_name`` for the checkpoint ``name``."""
        if file_name == name or self._is_old_shard(file_name, name):
            return True
        return file_name.startswith(name) and _PLAIN_SUFFIX.fullmatch(file_name[len(name) :]) is not None

    def is_needed(self, file_name: str, name: str) -> bool:
        """Whether a restore of the checkpoint ``name`` reads ``file_name``.

        TensorFlow's restore does not read the meta graph, which people often remove because it is a large part of a
        small checkpoint.
        """
        return self.entry_suffix is None or file_name != name + _TENSORFLOW_META

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
        suffix = MANIFEST_SUFFIX if is_manifest else self.entry_suffix
        if suffix is None or not entry.name.endswith(suffix):
            return
        name = entry.name[: -len(suffix)]
        if not self.is_name(name) or (not is_manifest and name in found):
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
                stem = entry.name[len(self.basename) :].partition(".")[0]
                if self.entry_suffix is not None and (shard := _OLD_SHARD.search(stem)) and shard.end() == len(stem):
                    stem = stem[: shard.start()]
                groups.setdefault(self.basename + stem, []).append(entry.name)
        return groups

    def present(self, name: str, among: Iterable[str] | None = None) -> list[str]:
        """Return the sorted top-level names that belong to the checkpoint ``name``.

        They are its manifest, the files that the manifest lists, and files as TensorFlow's own tools write them for
        that name. ``among`` are the names to search, if the directory was already listed.
        """
        path = self.manifest(name)
        listed: set[str] | None = set()
        try:
            records = Manifest.from_json(files.read_bytes(path), path).files
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (CheckpointCorruptError, OSError):
            listed = None  # The list of its files is lost; files with its name and one suffix count as its own.
        else:
            listed = {one.name.split("/", 1)[0] for one in records}

        def belongs(one: str) -> bool:
            if one in (name, path.name) or self.is_entry(one, name) or self._is_tensorflow(one, name):
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
        has_entry = any(self.is_entry(one, name) for one in present)
        if not has_entry and name in present and files.size_of(self.root / name) is not None:
            return None
        pattern, infix = (_TENSORFLOW_DATA, ".data") if has_entry else (_OLD_SHARD, "")
        shards = [match for one in present if (match := pattern.fullmatch(one[len(name) :]))]
        if not shards:
            return f"{name}.data-00000-of-00001"
        for total in sorted({match.group(2) for match in shards}):
            held = {int(match.group(1)) for match in shards if match.group(2) == total}
            for number in range(int(total)):
                if number not in held:
                    return f"{name}{infix}-{number:05d}-of-{total}"
        return None

    def is_data(self, file_name: str, name: str) -> bool:
        """Whether ``file_name`` is a data file of the checkpoint ``name`` as TensorFlow's own tools write it."""
        if file_name == name or self.is_entry(file_name, name) or self._is_old_shard(file_name, name):
            return True
        return file_name.startswith(name) and _TENSORFLOW_DATA.fullmatch(file_name[len(name) :]) is not None

    def stated(self, names: Iterable[str]) -> list[str]:
        """Return the names as TensorFlow's state file has them: with a pattern for shards of the old format."""
        if self.entry_suffix is None:
            return list(names)
        totals = {}
        for entry in self.entries():
            match = _OLD_SHARD.search(entry.name)
            if match is not None and match.end() == len(entry.name):
                totals[entry.name[: match.start()]] = match.group(2)
        return [self._stated(name, totals.get(name)) for name in names]

    def _stated(self, name: str, total: str | None) -> str:
        if total is None or os.path.exists(self.root / f"{name}{self.entry_suffix}"):
            return name
        return f"{name}-?????-of-{total}"

    def _is_old_shard(self, file_name: str, name: str) -> bool:
        if self.entry_suffix is None or not file_name.startswith(name):
            return False
        return _OLD_SHARD.fullmatch(file_name[len(name) :]) is not None

    def _is_tensorflow(self, file_name: str, name: str) -> bool:
        if self.entry_suffix is None or not file_name.startswith(name):
            return False
        return _TENSORFLOW_SUFFIX.fullmatch(file_name[len(name) :]) is not None

    def removed(self) -> list[str]:
        """Return the names of checkpoints whose files a framework's own saver has removed.

        Such a saver does not know manifests: only the manifest is left, and the saver's state file no longer lists the
        checkpoint.
        """
        names = {entry.name for entry in self.entries()}
        manifests = [one.removesuffix(MANIFEST_SUFFIX) for one in names if one.endswith(MANIFEST_SUFFIX)]
        return self._removed(filter(self.is_name, manifests), names)

    def _removed(self, manifested: Iterable[str], names: AbstractSet[str]) -> list[str]:
        suffix = self.entry_suffix
        if suffix is None:
            return []
        # Not one that has its entry file, nor a directory of another engine's: only the few others are read.
        lonely = [name for name in manifested if names.isdisjoint((name, name + suffix))]
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
            # Then the entry file, by which TensorFlow's tools and Stepguard find a checkpoint without a manifest.
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
