"""Power loss, simulated: what was not fsynced is dropped, in every way that is possible, after every single call.

A recorder stands where `stepguard.disk.files` finds ``os``. Its record is replayed on a model of a disk that keeps only
what is promised: the content of a file after its fsync, the names of a directory after the fsync of the directory. For
every prefix of the record the states that the disk may then be in are built as real files, and a real store is asked.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError, NoGoodCheckpointError
from stepguard.store import CheckpointStore, statefile, tensorflow_files

# ------------------------------------------------------------------------------------------------ the recorder


def call_site() -> str:
    """The lines of our package that led here: one place in the code where something is made durable."""
    frame = sys._getframe(2)
    lines: list[str] = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "stepguard" in path.parts:
            lines.append(f"{path.stem}.{frame.f_code.co_name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " > ".join(reversed(lines))


class RecordingOs:
    """Passes every call on to the real ``os``, and keeps a record of those that change the disk."""

    def __init__(self) -> None:
        self.record: list[tuple[Any, ...]] = []
        self._paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        existed = os.path.lexists(path)
        descriptor = os.open(path, flags, mode)
        self._paths[descriptor] = str(path)
        if not existed:
            self.record.append(("create", str(path)))
        elif flags & os.O_TRUNC:
            self.record.append(("truncate", str(path)))
        return descriptor

    def close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        os.close(descriptor)

    def write(self, descriptor: int, content: Any) -> int:
        self.record.append(("write", self._paths[descriptor], bytes(content)))
        return os.write(descriptor, content)

    def fsync(self, descriptor: int) -> None:
        # No real fsync: the disk here is the model.
        self.record.append(("fsync", self._paths[descriptor], call_site()))

    def replace(self, source: Any, target: Any) -> None:
        os.replace(source, target)
        self.record.append(("rename", str(source), str(target)))

    def link(self, source: Any, target: Any) -> None:
        os.link(source, target)
        self.record.append(("link", str(source), str(target)))

    def unlink(self, path: Any) -> None:
        os.unlink(path)
        self.record.append(("unlink", str(path)))

    def mkdir(self, path: Any, mode: int = 0o777) -> None:
        os.mkdir(path, mode)
        self.record.append(("mkdir", str(path)))

    def rmdir(self, path: Any) -> None:
        os.rmdir(path)
        self.record.append(("unlink", str(path)))

    def put(self, path: Path, content: bytes) -> None:
        """Write a file as an engine does: without any fsync."""
        descriptor = self.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.write(descriptor, content)
        self.close(descriptor)


class NoLinksOs(RecordingOs):
    """A filesystem without hard links."""

    def link(self, source: Any, target: Any) -> None:
        raise OSError(errno.EPERM, "no hard links here", str(target))


# ------------------------------------------------------------------------------------------------ the model of a disk


@dataclass
class File:
    content: bytes = b""
    durable: bytes = b""

    def after_power_loss(self) -> list[bytes]:
        if self.content == self.durable:
            return [self.content]
        half = self.content[: len(self.content) // 2]
        # Old content, new content, a part of it, and what a filesystem shows that had set the length and not the bytes.
        return list(dict.fromkeys([self.durable, self.content, half, b"\0" * len(self.content)]))


@dataclass
class Change:
    """One change of names that is not durable yet; ``needs`` is the change that cannot be missing if this was made."""

    name: str
    target: File | Folder | None
    vanishes: str | None = None
    needs: Change | None = None


@dataclass
class Folder:
    names: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        if change.target is None:
            del self.names[change.name]
        else:
            self.names[change.name] = change.target
        if change.vanishes is not None:
            del self.names[change.vanishes]
        self.pending.append(change)


class Disk:
    """Replays a record. ``top`` is a directory that was there, durably, before it began."""

    def __init__(self, top: Path) -> None:
        self.top = str(top)
        self.folder = Folder()

    def _find(self, path: str) -> File | Folder:
        here: File | Folder = self.folder
        for part in Path(path).relative_to(self.top).parts:
            assert isinstance(here, Folder)
            here = here.names[part]
        return here

    def _place(self, path: str) -> tuple[Folder, str]:
        folder = self._find(str(Path(path).parent))
        assert isinstance(folder, Folder)
        return folder, Path(path).name

    def load(self) -> None:
        """Take over what lies in the real directory as durable."""

        def read(path: Path) -> File | Folder:
            if path.is_dir():
                names = {one.name: read(one) for one in path.iterdir()}
                return Folder(dict(names), dict(names))
            return File(path.read_bytes(), path.read_bytes())

        folder = read(Path(self.top))
        assert isinstance(folder, Folder)
        self.folder = folder

    def apply(self, call: tuple[Any, ...]) -> None:
        kind, *arguments = call
        getattr(self, "_" + kind)(*arguments)

    def _create(self, path: str) -> None:
        folder, name = self._place(path)
        folder.change(Change(name, File()))

    def _mkdir(self, path: str) -> None:
        folder, name = self._place(path)
        folder.change(Change(name, Folder()))

    def _truncate(self, path: str) -> None:
        found = self._find(path)
        assert isinstance(found, File)
        found.content = b""

    def _write(self, path: str, content: bytes) -> None:
        found = self._find(path)
        assert isinstance(found, File)
        found.content += content

    def _fsync(self, path: str, _: str) -> None:
        found = self._find(path)
        if isinstance(found, File):
            found.durable = found.content
        else:
            found.durable = dict(found.names)
            found.pending.clear()

    def _rename(self, source: str, target: str) -> None:
        moved = self._find(source)
        old, old_name = self._place(source)
        new, new_name = self._place(target)
        if old is new:
            new.change(Change(new_name, moved, vanishes=old_name))
            return
        arrival = Change(new_name, moved)
        new.change(arrival)
        # It may be found in both directories, but no filesystem loses it from both.
        old.change(Change(old_name, None, needs=arrival))

    def _link(self, source: str, target: str) -> None:
        folder, name = self._place(target)
        folder.change(Change(name, self._find(source)))

    def _unlink(self, path: str) -> None:
        folder, name = self._place(path)
        folder.change(Change(name, None))

    def _ack(self, *_: Any) -> None:
        pass

    # --- the states after a power loss ---

    def _folders(self, folder: Folder) -> Iterator[Folder]:
        """All folders that some state may show."""
        seen: set[int] = set()
        todo = [folder]
        while todo:
            one = todo.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            yield one
            shown = [*one.durable.values(), *one.names.values(), *(change.target for change in one.pending)]
            todo += [inner for inner in shown if isinstance(inner, Folder)]

    def states(self, seed: int) -> Iterator[dict[str, bytes | None]]:
        """Trees (path: content, None for a directory) that the disk may hold if the power fails now."""
        changes = [change for folder in self._folders(self.folder) for change in folder.pending]
        still_pending = {id(change) for change in changes}
        count = len(changes)
        picks: list[tuple[bool, ...]]
        if count <= 5:
            picks = list(itertools.product((False, True), repeat=count))
        else:
            chance = random.Random(seed)
            picks = [(False,) * count, (True,) * count]
            picks += [tuple(one == other for other in range(count)) for one in range(count)]
            picks += [tuple(one != other for other in range(count)) for one in range(count)]
            picks += [tuple(chance.random() < 0.5 for _ in changes) for _ in range(12)]
        for pick in picks:
            made = {id(change) for change, happened in zip(changes, pick, strict=True) if happened}
            for change in changes:
                if id(change) in made and change.needs is not None and id(change.needs) in still_pending:
                    made.add(id(change.needs))
            for variant in range(4):
                tree: dict[str, bytes | None] = {}
                if not self._draw(self.folder, "", made, variant, tree) and variant:
                    break  # No file is dirty: all variants are the same.
                yield tree

    def _draw(self, folder: Folder, prefix: str, made: set[int], variant: int, tree: dict[str, bytes | None]) -> bool:
        names = dict(folder.durable)
        for change in folder.pending:
            if id(change) not in made:
                continue
            if change.target is None:
                names.pop(change.name, None)
            else:
                names[change.name] = change.target
            if change.vanishes is not None:
                names.pop(change.vanishes, None)
        is_dirty = False
        for name, found in names.items():
            if isinstance(found, Folder):
                tree[prefix + name] = None
                is_dirty |= self._draw(found, f"{prefix}{name}/", made, variant, tree)
            else:
                contents = found.after_power_loss()
                is_dirty |= len(contents) > 1
                tree[prefix + name] = contents[min(variant, len(contents) - 1)]
        return is_dirty


# ------------------------------------------------------------------------------------------------ the scenarios

Content = dict[str, bytes]


@dataclass
class Scene:
    """A run that was recorded, and what a store may answer after it was cut short."""

    top: Path
    make_store: Callable[[Path], CheckpointStore]
    start: dict[str, bytes | None]
    record: list[tuple[Any, ...]]
    versions: list[tuple[str, Content]]
    """Everything that was saved, oldest first."""
    damage_is_expected: bool = False
    keeps_acknowledged: bool = True
    has_state_file: bool = True


def tensorflow_content(name: str, version: int) -> Content:
    return {
        f"{name}.data-00000-of-00002": b"first shard %d " % version * 9,
        f"{name}.data-00001-of-00002": b"second shard %d " % version * 9,
        f"{name}.index": b"index %d " % version * 3,
        f"{name}.meta": b"meta %d " % version * 3,
    }


def directory_content(name: str, version: int) -> Content:
    return {f"{name}/model.bin": b"model %d " % version * 9, f"{name}/optimiser/state.bin": b"state %d " % version * 9}


def put_all(recorder: RecordingOs, place: Path, content: Content) -> None:
    for name, value in content.items():
        for parent in reversed(Path(name).parents[:-1]):
            if not (place / parent).is_dir():
                recorder.mkdir(place / parent)
        recorder.put(place / name, value)


def save(store: CheckpointStore, recorder: RecordingOs, step: int | None, content: Content) -> None:
    name = store.name(step)
    put_all(recorder, store.stage(name), content)
    store.commit(name, step)


def record_saves(top: Path, recorder: RecordingOs, *, layout: str, steps: list[int | None]) -> Scene:
    make_content = tensorflow_content if layout == "tensorflow" else directory_content

    def make_store(root: Path) -> CheckpointStore:
        return CheckpointStore(root, saver_files=tensorflow_files if layout == "tensorflow" else None, max_to_keep=2)

    versions: list[tuple[str, Content]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "os", recorder)
        store = make_store(top / "runs" / "logdir")
        for version, step in enumerate(steps):
            content = make_content(store.name(step), version)
            versions.append((store.name(step), content))
            save(store, recorder, step, content)
            recorder.record.append(("ack", version))
            store.prune()
    return Scene(top, make_store, {}, recorder.record, versions)


def record_saves_in_place(top: Path, recorder: RecordingOs, *, steps: list[int]) -> Scene:
    """A program's own saver writes, without a stage. Of a name that is written again only what is good is good."""

    def make_store(root: Path) -> CheckpointStore:
        return CheckpointStore(root)

    (top / "runs" / "logdir").mkdir(parents=True)
    start = tree_of(top)
    versions: list[tuple[str, Content]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "os", recorder)
        store = make_store(top / "runs" / "logdir")
        for version, step in enumerate(steps):
            name = store.name(step)
            content = directory_content(name, version)
            versions.append((name, content))
            store.uncommit(name)
            put_all(recorder, store.root, content)
            store.commit_in_place(name, step)
            recorder.record.append(("ack", version))
    are_new = len(set(steps)) == len(steps)
    return Scene(top, make_store, start, recorder.record, versions, keeps_acknowledged=are_new, has_state_file=are_new)


def record_quarantine(top: Path, recorder: RecordingOs, *, layout: str) -> Scene:
    """The newest of three is damaged, and found so."""
    scene = record_saves(top, RecordingOs(), layout=layout, steps=[1, 2])
    root = top / "runs" / "logdir"
    damaged = next(path for path in sorted(root.rglob("*")) if path.is_file() and "-2" in str(path.relative_to(root)))
    damaged.write_bytes(b"X" + damaged.read_bytes()[1:])
    start = tree_of(top)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "os", recorder)
        recovery = scene.make_store(root).newest_good()
    assert recovery.checkpoint is not None
    assert recovery.checkpoint.step == 1
    record = [("ack", 0), *recorder.record]
    return Scene(
        top, scene.make_store, start, record, scene.versions[:1], damage_is_expected=True, has_state_file=False
    )


SCENES: dict[str, Callable[[Path], Scene]] = {
    "tensorflow files, with pruning": lambda top: record_saves(
        top, RecordingOs(), layout="tensorflow", steps=[1, 2, 3]
    ),
    "directories, with pruning": lambda top: record_saves(top, RecordingOs(), layout="directory", steps=[1, 2, 3]),
    "tensorflow files of one name": lambda top: record_saves(
        top, RecordingOs(), layout="tensorflow", steps=[None, None]
    ),
    "directories of one name": lambda top: record_saves(top, RecordingOs(), layout="directory", steps=[None, None]),
    "one name, without hard links": lambda top: record_saves(top, NoLinksOs(), layout="directory", steps=[None, None]),
    "a saver that writes in place": lambda top: record_saves_in_place(top, RecordingOs(), steps=[1, 2]),
    "a saver that writes in place again": lambda top: record_saves_in_place(top, RecordingOs(), steps=[1, 2, 2]),
    "quarantine": lambda top: record_quarantine(top, RecordingOs(), layout="tensorflow"),
}


# ------------------------------------------------------------------------------------------------ the check


def tree_of(top: Path) -> dict[str, bytes | None]:
    return {path.relative_to(top).as_posix(): None if path.is_dir() else path.read_bytes() for path in top.rglob("*")}


def materialise(tree: dict[str, bytes | None], top: Path) -> None:
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir()
    for name, content in sorted(tree.items()):
        if content is None:
            (top / name).mkdir()
        else:
            (top / name).write_bytes(content)


def content_of(root: Path, name: str) -> Content:
    found = {}
    for path in root.rglob("*"):
        inside = path.relative_to(root).as_posix()
        if path.is_file() and inside.startswith((name + ".", name + "/")) and not inside.endswith(".manifest.json"):
            found[inside] = path.read_bytes()
    return found


def complaint(scene: Scene, tree: dict[str, bytes | None], acknowledged: int, top: Path) -> str | None:
    """What is wrong with the store's answers on this disk; None if all is well."""
    materialise(tree, top)
    root = top / "runs" / "logdir"
    store = scene.make_store(root)
    try:
        recovery = store.newest_good(quarantine=False) if root.is_dir() else None
    except NoGoodCheckpointError as error:
        return str(error)
    if recovery is not None and recovery.damaged and not scene.damage_is_expected and scene.keeps_acknowledged:
        return f"damage: {recovery.message()}"
    good = recovery.checkpoint if recovery is not None else None
    if good is None and not (root / statefile.FILE_NAME).exists():
        return None if acknowledged < 0 or not scene.keeps_acknowledged else "no checkpoint, although one was promised"
    for candidate in store.candidates():
        try:
            store.verify(candidate)
        except CheckpointCorruptError as error:
            if not scene.damage_is_expected:
                return f"a checkpoint that never was: {error}"
            continue
        content = content_of(candidate.root, candidate.name)
        matching = [one for one, version in enumerate(scene.versions) if version == (candidate.name, content)]
        if not matching:
            return f"{candidate.path} was taken for good, with content that nobody saved"
        if candidate == good and matching[0] < acknowledged and scene.keeps_acknowledged:
            return f"{candidate.path} is older than the last that was acknowledged"
    if scene.has_state_file and (acknowledged >= 0 or (root / statefile.FILE_NAME).exists()):
        state = statefile.read(root)
        committed = {path.name.removesuffix(".manifest.json") for path in root.rglob("*.manifest.json")}
        if state is None or state.newest not in committed:
            return f"the state file says {state}, committed are {committed}"
        if max(one for one, version in enumerate(scene.versions) if version[0] == state.newest) < acknowledged:
            return f"the state file names the old {state.newest}"
    return None


State = tuple[int, frozenset[tuple[str, bytes | None]]]


def first_complaint(scene: Scene, record: list[tuple[Any, ...]], work: Path, found_good: set[State]) -> str | None:
    """Replay a record and ask about every state; None if all are well. ``found_good`` are states known already."""
    materialise(scene.start, scene.top)
    disk = Disk(scene.top)
    disk.load()
    acknowledged = -1
    for number, call in enumerate(record):
        disk.apply(call)
        if call[0] == "ack":
            acknowledged = call[1]
        for tree in disk.states(seed=number):
            state = (acknowledged, frozenset(tree.items()))
            if state in found_good:
                continue
            if (wrong := complaint(scene, tree, acknowledged, work)) is not None:
                return f"after call {number} {call[:2]}: {wrong}"
            found_good.add(state)
    return None


@pytest.fixture(scope="module")
def fast_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in memory where there is one: thousands of small trees are made, and nothing must last."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("powerloss")
        return
    path = Path(tempfile.mkdtemp(prefix="stepguard-", dir=memory))
    yield path
    shutil.rmtree(path)


@dataclass
class Stage:
    """A recorded scene, with the states in which all was well."""

    scene: Scene
    work: Path
    found_good: set[State] = field(default_factory=set)

    def complaint(self, without: set[int] = frozenset()) -> str | None:  # type: ignore[assignment]
        record = [call for number, call in enumerate(self.scene.record) if number not in without]
        return first_complaint(self.scene, record, self.work, self.found_good)

    def fsyncs(self) -> list[int]:
        return [number for number, call in enumerate(self.scene.record) if call[0] == "fsync"]


@pytest.fixture(scope="module")
def stages(fast_path: Path) -> dict[str, Stage]:
    found = {}
    for number, (name, record) in enumerate(SCENES.items()):
        top = fast_path / f"disk{number}"
        top.mkdir()
        found[name] = Stage(record(top), fast_path / f"after{number}")
    return found


@pytest.mark.parametrize("name", SCENES)
def test_power_loss_after_any_call_leaves_what_was_acknowledged(name: str, stages: dict[str, Stage]) -> None:
    stage = stages[name]
    assert stage.complaint() is None
    assert len(stage.found_good) > 20, "the simulation looked at next to nothing"


# Where one name is written again, the fsyncs of equal content stand in for each other.
@pytest.mark.parametrize("name", [name for name in SCENES if "name" not in name and "again" not in name])
def test_leaving_out_any_single_fsync_of_a_run_is_noticed(name: str, stages: dict[str, Stage]) -> None:
    stage = stages[name]
    assert stage.fsyncs()
    unnoticed = [stage.scene.record[number] for number in stage.fsyncs() if stage.complaint({number}) is None]
    assert unnoticed == []


def test_taking_any_single_fsync_out_of_the_code_is_noticed(stages: dict[str, Stage]) -> None:
    noticed: dict[str, bool] = {}
    for stage in stages.values():
        by_site: dict[str, set[int]] = {}
        for number in stage.fsyncs():
            by_site.setdefault(stage.scene.record[number][2], set()).add(number)
        for site, numbers in by_site.items():
            if not noticed.get(site):
                noticed[site] = stage.complaint(numbers) is not None
    assert len(noticed) > 15
    assert [site for site, was_noticed in noticed.items() if not was_noticed] == []
