"""The checkpoints in a logdir and their states, judged by names, sizes and manifests: the content of `ls`.

The directory is scanned once, and each manifest and the size of each file are read: 10,000 checkpoints take about a
second. Nothing is locked, so a training may write and prune meanwhile. A checkpoint that looks damaged is inspected
again, so that one being replaced or removed is never reported as damaged.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError, CheckpointError
from stepguard.store import Checkpoint, Manifest, leftovers, recovery, statefile, tensorflow_files, verification
from stepguard.store import layout as layouts
from stepguard.store.checkpoint import split_name
from stepguard.store.layout import Layout
from stepguard.store.manifest import SUFFIX as MANIFEST_SUFFIX

GOOD = "good"
"""The manifest is right, and every file that a restore needs is there with its size. `verify` reads bytes as well."""
UNVERIFIED = "unverified"
"""Complete by its names but without a manifest: TensorFlow's own tools wrote it."""
DAMAGED = "damaged"
"""A file is missing, or empty, or of another size than was committed, or the manifest itself is damaged."""
INCOMPLETE = "incomplete"
"""Files without a commit record: a checkpoint that is being written or removed, or that a kill left half done."""

JAX_FILES = ("_METADATA", "state.json")
"""The files by which a directory is known as a JAX checkpoint. Orbax's own have the first."""

UNKNOWN_ENGINE = "unknown"

_LOOKS = 3
_LOOK_SECS = 5.0


@dataclass(frozen=True, slots=True)
class ListedCheckpoint:
    """One checkpoint, with what is known about it. ``reasons`` say why it is not good; ``is_next`` marks the one that
    a restart would take, as far as is known without reading the data. ``is_unreadable`` says that the system could not
    read a file of it.
    """

    checkpoint: Checkpoint
    basename: str
    state: str
    engine: str
    size: int
    reasons: tuple[str, ...] = ()
    is_next: bool = False
    is_unreadable: bool = False

    @property
    def is_candidate(self) -> bool:
        """Whether a restart would consider it."""
        return self.state != INCOMPLETE


@dataclass(frozen=True, slots=True)
class LogdirContents:
    """The checkpoints of a logdir: for each basename, incomplete ones first, then from newest to oldest.

    ``missing`` are names that the state file has as the newest, and of which there is no file; ``quarantined`` counts
    what lies in quarantine; ``unreadable`` says what else of the logdir's own could not be read, and was passed over.
    """

    root: Path
    found: tuple[ListedCheckpoint, ...]
    missing: tuple[str, ...]
    quarantined: int
    unreadable: tuple[str, ...] = ()

    @property
    def is_unreadable(self) -> bool:
        """Whether the system could not read all of it."""
        return bool(self.unreadable) or any(one.is_unreadable for one in self.found)


def list_contents(root: Path) -> LogdirContents:
    """List a logdir. Raises OSError if that is impossible.

    A training may prune all listed checkpoints before they are inspected. The logdir is then listed again, for a while.
    """
    deadline = time.monotonic() + _LOOK_SECS
    kinds: Mapping[str, bool] = {}
    while True:
        before, kinds = kinds, _kinds(root)
        found = _list_once(root, kinds)
        if any(one.is_candidate for one in found.found) or kinds == before or time.monotonic() >= deadline:
            return found


def _kinds(root: Path) -> dict[str, bool]:
    """The names in a directory, each with whether it is itself a directory."""
    with os.scandir(root) as entries:
        return {entry.name: _is_dir(entry) for entry in entries}


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _list_once(root: Path, kinds: Mapping[str, bool]) -> LogdirContents:
    found: list[ListedCheckpoint] = []
    listed: set[str] = set()
    for basename in basenames(kinds):
        layout = Layout(root, basename, tensorflow_files)
        of_basename = _listed(layout)
        listed.update(one.checkpoint.name for one in of_basename)
        found += of_basename
    found = [*_unfinished(root, kinds, listed), *found]
    missing = _missing(root, kinds, listed)
    return LogdirContents(
        root, tuple(_marked(root, found)), missing, _count(root / recovery.QUARANTINE), _unreadable(root)
    )


def _unreadable(root: Path) -> tuple[str, ...]:
    found = []
    for path, look_at in ((root / statefile.FILE_NAME, _read_state), (root / recovery.QUARANTINE, _list_own)):
        try:
            look_at(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            found.append(f"{path}: could not be read: {error.strerror or error}")
    return tuple(found)


def _read_state(path: Path) -> list[str]:
    files.read_bytes(path)
    return []


def _list_own(path: Path) -> list[str]:
    files.check_own_dir(path)
    return os.listdir(path)


def list_one(root: Path, name: str) -> ListedCheckpoint:
    """The state of one checkpoint, which may never have been committed."""
    basename, step = split_name(name)
    layout = Layout(root, basename, tensorflow_files)
    entries = [layout.manifest(name), root / tensorflow_files.entry_file(name)]
    if any(map(os.path.lexists, entries)):
        times = [status.st_mtime for path in entries if (status := _stat(path)) is not None]
        is_committed = os.path.lexists(entries[0])
        candidate = Checkpoint(root, name, step, (times or [0.0])[0], is_committed)
        found = inspect(layout, candidate, lambda: layout.present(name))
        if found is not None:
            return found
    present = [name]
    checkpoint = Checkpoint(root, name, step, _newest_time(root, present), False)
    engine = _engine_of_files(root, name, present)
    reason = "it has no manifest: Stepguard has never committed it"
    return ListedCheckpoint(checkpoint, basename, INCOMPLETE, engine, _bytes(root, present), (reason,))


def newest(root: Path) -> tuple[ListedCheckpoint | None, ListedCheckpoint | None]:
    """The newest checkpoint of a logdir, and the newest good one; older ones are not read. Raises OSError."""
    first: list[ListedCheckpoint] = []
    good: list[ListedCheckpoint] = []
    for basename in basenames(os.listdir(root)):
        layout = Layout(root, basename, tensorflow_files)
        of_basename = []
        for candidate in recovery.newest_first(layout):
            place = layout.within(candidate.root)
            found = inspect(layout, candidate, functools.partial(place.present, candidate.name))
            if found is not None:
                of_basename.append(found)
                if found.state == GOOD:
                    good.append(found)
                    break
        first += of_basename[:1]
    return max(first, key=_time, default=None), max(good, key=_time, default=None)


def _time(one: ListedCheckpoint) -> float:
    return one.checkpoint.time


def basenames(names: Iterable[str]) -> list[str]:
    """The basenames of the checkpoints among the file names, sorted."""
    names = names if isinstance(names, Mapping) else set(names)
    found = set()
    for name in names:
        if name.startswith("."):
            replaced = name[len(layouts.REPLACED) :] if name.startswith(layouts.REPLACED) else ""
            if replaced and replaced + MANIFEST_SUFFIX not in names:
                found.add(split_name(replaced)[0])
        elif name.endswith(MANIFEST_SUFFIX):
            found.add(split_name(name[: -len(MANIFEST_SUFFIX)])[0])
        elif (entry := tensorflow_files.checkpoint_of_entry(name)) is not None:
            basename, step = split_name(entry)
            # Any file may end as an entry file does: without a step in its name there must be data beside it.
            if step is not None or basename == "model.ckpt" or tensorflow_files.data_file(basename) in names:
                found.add(basename)
    return sorted(one for one in found if one and not one.startswith("."))


def inspect(layout: Layout, candidate: Checkpoint, present: Callable[[], Sequence[str]]) -> ListedCheckpoint | None:
    """The state of one checkpoint by names and sizes; None if it has gone meanwhile.

    ``present`` returns the files of the checkpoint, and is called only if it has no manifest.
    """
    place = layout.within(candidate.root)
    found = _inspected(place, candidate, present)
    for _ in range(_LOOKS):
        if found.state != DAMAGED:
            break
        # The checkpoint may have been saved again, or removed, since it was listed.
        before = commit_id(place, candidate.name)
        if before is None:
            return None
        found = _inspected(place, candidate, lambda: place.present(candidate.name))
        if commit_id(place, candidate.name) == before:
            break
    return found


def commit_id(place: Layout, name: str) -> tuple[int, int] | None:
    """An identifier that differs between two commits of a name; None once the checkpoint is pruned.

    It is read from the manifest, which a replacement or a removal takes away first. A checkpoint kept aside while it is
    replaced counts as pruned once the new one exists.
    """
    if place.root.name.startswith(layouts.REPLACED) and commit_id(place.within(place.root.parent), name) is not None:
        return None
    for path in (place.manifest(name), place.root / tensorflow_files.entry_file(name)):
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            if not path.is_symlink():
                continue
            return 0, 0
        except OSError:
            return 0, 0  # It is there, and cannot be read.
        return status.st_ino, status.st_mtime_ns
    return None


def _listed(layout: Layout) -> list[ListedCheckpoint]:
    entries = layout.grouped()
    found = []
    for candidate in recovery.newest_first(layout):
        if candidate.root == layout.root:
            one = inspect(layout, candidate, entries.get(candidate.name, []).copy)
        else:
            one = inspect(layout, candidate, layout.within(candidate.root).present(candidate.name).copy)
        if one is not None:
            found.append(one)
    return found


def _inspected(place: Layout, candidate: Checkpoint, present: Callable[[], Sequence[str]]) -> ListedCheckpoint:
    try:
        manifest = verification.read_manifest(place, candidate.name)
    except CheckpointCorruptError as error:
        return _uncommitted(place, candidate, DAMAGED, present(), error)
    except CheckpointError as error:
        return _uncommitted(place, candidate, UNVERIFIED, present(), error)
    if manifest is not None:
        wrong = [
            damage
            for one in manifest.files
            if (damage := verification.size_damage(place, manifest.name, one)) is not None
        ]
        if not wrong or not verification.was_written_over(place, manifest):
            return _committed(place, candidate, manifest, wrong)
    entries = present()
    try:
        verification.verify_unmanifested(place, candidate.name, entries)
    except CheckpointCorruptError as error:
        return _uncommitted(place, candidate, DAMAGED, entries, error)
    # Between two renames of a commit it looks like this too.
    is_staged = os.path.lexists(place.stage(candidate.name))
    unfinished = ": it is being committed, or a kill has cut that short" if is_staged else ""
    return _uncommitted(place, candidate, UNVERIFIED, entries, f"it has no manifest{unfinished}")


def _uncommitted(
    place: Layout, candidate: Checkpoint, state: str, entries: Sequence[str], reason: str | CheckpointError
) -> ListedCheckpoint:
    engine = _engine_of_files(place.root, candidate.name, entries)
    size = _bytes(place.root, entries)
    is_unreadable = isinstance(reason, verification.CheckpointUnreadableError)
    return ListedCheckpoint(candidate, place.basename, state, engine, size, (str(reason),), is_unreadable=is_unreadable)


def _committed(
    place: Layout, candidate: Checkpoint, manifest: Manifest, wrong: Sequence[CheckpointCorruptError]
) -> ListedCheckpoint:
    checkpoint = replace(candidate, step=manifest.step, time=manifest.time, manifest=manifest)
    is_damaged = any(verification.prevents_restore(place, candidate.name, one) for one in wrong)
    state = DAMAGED if is_damaged else GOOD
    reasons = tuple(map(str, wrong))
    is_unreadable = any(isinstance(one, verification.CheckpointUnreadableError) for one in wrong)
    return ListedCheckpoint(
        checkpoint,
        place.basename,
        state,
        manifest.engine,
        manifest.size,
        reasons,
        is_unreadable=is_unreadable,
    )


def _marked(root: Path, found: Sequence[ListedCheckpoint]) -> list[ListedCheckpoint]:
    """Mark for each basename the checkpoint that a restart would take: one that it first finishes, or the newest."""
    chosen: dict[str, ListedCheckpoint] = {}
    for one in found:
        if one.state in (GOOD, UNVERIFIED):
            chosen.setdefault(one.basename, one)
    uncommitted = [one for one in found if one.state in (INCOMPLETE, UNVERIFIED)]
    cut_short = {basename: _cut_short(root, basename) for basename in {one.basename for one in uncommitted}}
    for one in uncommitted:
        if one.checkpoint.name == cut_short[one.basename]:
            chosen[one.basename] = one
    return [replace(one, is_next=True) if one is chosen.get(one.basename) else one for one in found]


def _cut_short(root: Path, basename: str) -> str | None:
    with contextlib.suppress(OSError):
        return leftovers.will_be_finished(Layout(root, basename, tensorflow_files))
    return None


def _unfinished(root: Path, kinds: Mapping[str, bool], listed: set[str]) -> list[ListedCheckpoint]:
    usual = {split_name(name)[0] for name in listed} | {"model.ckpt"}
    found: dict[str, tuple[str, list[str]]] = {}
    for entry, is_dir in kinds.items():
        of_data = tensorflow_files.checkpoint_of_data(entry)
        if entry.startswith(layouts.STAGE):
            name, reason = layouts.staged_name(entry), "it is being written, or a kill has cut that short"
        elif entry.startswith(layouts.PRUNED):
            name, reason = entry[len(layouts.PRUNED) :], "it is being removed, or a kill has cut that short"
        elif of_data is not None:
            name, reason = of_data, f"data without {tensorflow_files.entry_file(of_data)}"
        elif is_dir and split_name(entry)[0] in usual:
            name, reason = entry, "files without a manifest: it was never committed"
        else:
            continue
        if name and name not in listed:
            found.setdefault(name, (reason, []))[1].append(entry)
    rows = []
    for name, (reason, entries) in found.items():
        basename, step = split_name(name)
        checkpoint = Checkpoint(root, name, step, _newest_time(root, entries), False)
        engine = _engine_of_files(root, name, entries)
        rows.append(ListedCheckpoint(checkpoint, basename, INCOMPLETE, engine, _bytes(root, entries), (reason,)))
    return sorted(rows, key=lambda one: (one.basename, -(one.checkpoint.step or 0)))


def _missing(root: Path, kinds: Mapping[str, bool], listed: set[str]) -> tuple[str, ...]:
    state = statefile.read(root)
    if state is None or state.path.parent not in (Path(), root, root.absolute()) or state.newest in listed:
        return ()
    # It may have been committed since the directory was listed, or be the file of another tool.
    is_there = any(one.startswith(state.newest) for one in (*kinds, *os.listdir(root)))
    return () if is_there or statefile.read(root) != state else (state.newest,)


def _engine_of_files(root: Path, name: str, entries: Sequence[str]) -> str:
    inside = list(entries)
    for entry in entries:
        if entry.startswith(layouts.STAGE):
            inside += _listdir(root / entry)
    if tensorflow_files.entry_file(name) in inside or any(map(tensorflow_files.checkpoint_of_data, inside)):
        return "tensorflow"
    if name not in inside:
        return UNKNOWN_ENGINE
    places = [root / name, *(root / entry / name for entry in entries if entry.startswith(layouts.STAGE))]
    return "jax" if any((place / one).is_file() for place in places for one in JAX_FILES) else "torch"


def _stat(path: Path) -> os.stat_result | None:
    """None also for one whose inode cannot be read: whoever opens it says what is wrong."""
    try:
        return path.stat()
    except OSError:
        return None


def _listdir(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _count(path: Path) -> int:
    try:
        return len(_list_own(path))
    except OSError:
        return 0


def _bytes(root: Path, entries: Iterable[str]) -> int:
    return sum(_tree_bytes(root / entry) for entry in entries)


def _tree_bytes(path: Path) -> int:
    total, waiting = 0, [path]
    # Without recursion: there may be thousands of directories in each other.
    for one in waiting:
        try:
            size = files.size_of(one)
        except OSError:
            continue
        if size is not None:
            total += size
        else:
            waiting += [below for name in _listdir(one) if not os.path.islink(below := one / name)]
    return total


def _newest_time(root: Path, entries: Iterable[str]) -> float:
    times = [0.0]
    for entry in entries:
        try:
            times.append((root / entry).stat().st_mtime)
        except OSError:
            continue
    return max(times)
