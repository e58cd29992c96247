"""Logdirs that somebody, or a disk, has prepared: what is no file, links that lead outside, and crafted records."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError, CheckpointError, LogdirInUseError, NoGoodCheckpointError
from stepguard.store import CheckpointStore, Manifest, NameTakenError, lock, statefile, tensorflow_files
from stepguard.store.layout import SaverFiles
from stepguard.store.manifest import SUFFIX

# Whatever blocks, blocks for ever.
SOON_SECS = 60


@contextmanager
def in_time() -> Iterator[None]:
    """What takes longer is interrupted, and fails."""

    def late(*_: object) -> None:
        raise AssertionError(f"still not done after {SOON_SECS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SOON_SECS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


KINDS: dict[str, SaverFiles | None] = {"tensorflow": tensorflow_files, "directory": None}
kinds = pytest.mark.parametrize("kind", KINDS)


def open_store(root: Path, kind: str = "directory", **options: Any) -> CheckpointStore:
    return CheckpointStore(root, saver_files=KINDS[kind], engine=kind, **options)


def put(stage: Path, name: str, kind: str, tag: object) -> None:
    if kind == "directory":
        (stage / name).mkdir()
        (stage / name / "model.bin").write_bytes(f"{name} {tag} ".encode() * 20)
        return
    for suffix in (".data-00000-of-00001", ".index", ".meta"):
        (stage / f"{name}{suffix}").write_bytes(f"{name}{suffix} {tag} ".encode() * 20)


def save(store: CheckpointStore, step: int, tag: object = "") -> None:
    name = store.name(step)
    put(store.stage(name), name, store.engine, tag)
    store.commit(name, step)


def good_step(store: CheckpointStore) -> int | None:
    found = store.newest_good().checkpoint
    return None if found is None else found.step


def data_of(root: Path, name: str, kind: str) -> Path:
    return root / name / "model.bin" if kind == "directory" else root / f"{name}.data-00000-of-00001"


# ------------------------------------------------------------------------------------------------ what is no file


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def a_directory(path: Path) -> None:
    path.mkdir()


def a_huge_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


NO_FILES = [a_fifo, a_link_to_zeros, a_link_to_itself, a_directory, a_huge_file]
no_files = pytest.mark.parametrize("make", NO_FILES)


@no_files
@kinds
@pytest.mark.parametrize("what", ["manifest", "data"])
def test_what_is_no_file_in_a_checkpoint_is_damage_and_the_one_before_it_is_taken(
    make: Callable[[Path], None], kind: str, what: str, tmp_path: Path
) -> None:
    store = open_store(tmp_path, kind)
    save(store, 1)
    save(store, 2)
    path = tmp_path / f"model.ckpt-2{SUFFIX}" if what == "manifest" else data_of(tmp_path, "model.ckpt-2", kind)
    path.unlink()
    make(path)
    with in_time():
        recovery = store.newest_good()
        assert recovery.checkpoint is not None
        assert recovery.checkpoint.step == 1
        assert "model.ckpt-2" in recovery.message()
        assert not os.path.lexists(tmp_path / f"model.ckpt-2{SUFFIX}")
        # The step that was lost is done again, and saved under the same name.
        save(store, 2, "again")
    assert good_step(store) == 2


@no_files
def test_a_state_file_that_is_none_is_no_hint_and_no_save_fails_for_it(
    make: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    (tmp_path / statefile.FILE_NAME).unlink()
    make(tmp_path / statefile.FILE_NAME)
    with in_time(), caplog.at_level(logging.WARNING):
        assert good_step(store) == 1
        for step in (2, 3):
            save(store, step)
    assert good_step(store) == 3
    # A directory cannot be replaced; one warning says so.
    assert len(caplog.records) == (1 if make is a_directory else 0)


@no_files
def test_a_lock_that_is_no_file_is_refused_with_a_sentence(make: Callable[[Path], None], tmp_path: Path) -> None:
    if make is a_huge_file:
        pytest.skip("it is a file, and locked as any other")
    make(tmp_path / lock.FILE_NAME)
    with in_time(), pytest.raises(OSError, match=r"expected a|Is a directory"):
        open_store(tmp_path).acquire()


# ------------------------------------------------------------------------------------------------ links


def outside(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A logdir, a file outside of it, and a directory outside of it."""
    logdir, file, directory = tmp_path / "logdir", tmp_path / "precious", tmp_path / "elsewhere"
    logdir.mkdir()
    directory.mkdir()
    file.write_bytes(b"precious")
    return logdir, file, directory


def test_no_link_in_a_logdir_leads_to_a_write_outside(tmp_path: Path) -> None:
    logdir, file, directory = outside(tmp_path)
    store = open_store(logdir)
    save(store, 1)
    save(store, 2)
    data_of(logdir, "model.ckpt-2", "directory").write_bytes(b"damaged")
    (logdir / lock.FILE_NAME).symlink_to(file)
    (logdir / "quarantine").symlink_to(directory)
    for name in (".stage-model.ckpt-2", ".replaced-model.ckpt-2", f".pruned-model.ckpt-9{SUFFIX}"):
        (logdir / name).symlink_to(directory)
    for name in (f".model.ckpt-2{SUFFIX}.tmp", ".checkpoint.1.tmp"):
        (logdir / name).symlink_to(file)
    with pytest.raises(OSError, match="found a link"):
        store.acquire()
    assert good_step(store) == 1
    store.sweep()
    save(store, 3)
    assert file.read_bytes() == b"precious"
    assert os.listdir(directory) == []
    assert good_step(store) == 3


@kinds
@pytest.mark.parametrize("place", [".stage-{}", ".replaced-{}", "quarantine/{}"])
def test_a_link_to_another_logdir_moves_nothing_in_either_direction(place: str, kind: str, tmp_path: Path) -> None:
    store, other = open_store(tmp_path / "mine", kind), open_store(tmp_path / "other", kind)
    save(store, 1)
    save(other, 9)
    link = tmp_path / "mine" / place.format("model.ckpt-9")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "other")
    # What a move to quarantine that a kill has cut short would have left, and the link would take.
    left = "model.ckpt-9.data-00001-of-00002" if kind == "tensorflow" else "model.ckpt-9"
    if link.parent.name == "quarantine":
        (tmp_path / "mine" / left).write_bytes(b"left")
        files.remove(tmp_path / "other" / left)
    before = sorted(tmp_path.glob("other/**/*"))
    assert good_step(store) == 1
    store.sweep()
    assert good_step(store) == 1
    assert sorted(tmp_path.glob("other/**/*")) == before


@kinds
def test_a_save_is_finished_although_an_nfs_client_has_left_a_file_beside_it(kind: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, kind)
    save(store, 1)
    save(store, 2)
    stage = tmp_path / ".stage-model.ckpt-2"
    stage.mkdir()
    for path in tmp_path.glob("model.ckpt-2*"):
        path.rename(stage / path.name)
    (stage / ".nfs000000000001").write_bytes(b"open elsewhere")
    store.sweep()
    assert good_step(store) == 2


def test_the_logdir_itself_may_be_a_link(tmp_path: Path) -> None:
    logdir, _, directory = outside(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(directory)
    store = open_store(link)
    with store.acquire():
        save(store, 1)
    assert good_step(open_store(directory)) == 1
    assert os.listdir(logdir) == []


# ------------------------------------------------------------------------------------------------ what the system says


class Answering:
    """The real ``os``, but that calls with a path in which ``part`` occurs are answered with an error."""

    CALLS = frozenset({"open", "stat", "lstat", "replace", "unlink", "rmdir", "link", "listdir"})

    def __init__(self, part: str, number: int, calls: frozenset[str] = CALLS) -> None:
        self.part, self.number, self.calls = part, number, calls

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.calls:
            return real

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if self.part in str(path):
                raise OSError(self.number, os.strerror(self.number), str(path))
            return real(path, *arguments, **options)

        return call


@kinds
@pytest.mark.parametrize("number", [errno.EBADMSG, errno.EUCLEAN, errno.ESTALE])
@pytest.mark.parametrize("part", [f"model.ckpt-2{SUFFIX}", "model.ckpt-2"])
def test_an_inode_that_nothing_can_be_done_with_costs_a_step_back_and_not_each_save(
    number: int, part: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    store = open_store(tmp_path, kind)
    save(store, 1)
    save(store, 2)
    monkeypatch.setattr(files, "os", Answering(str(tmp_path / part), number))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            recovery = store.newest_good()
            assert recovery.checkpoint is not None
            assert recovery.checkpoint.step == 1
            assert "could not be read" in recovery.message()
            assert "left where it is" in recovery.message()
    # It cannot be moved, and no start leaves another empty place for it.
    assert not list((tmp_path / "quarantine").iterdir())
    with pytest.raises((NameTakenError, OSError)):
        save(store, 2)
    save(store, 3)
    assert good_step(store) == 3


def test_what_a_killed_chief_left_and_cannot_be_removed_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    for name in (".stage-model.ckpt-2", ".stage-model.ckpt-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".nfs0001").touch()
    monkeypatch.setattr(files, "os", Answering("model.ckpt-2/.nfs", errno.EBUSY, frozenset({"unlink"})))
    with caplog.at_level(logging.WARNING):
        assert store.sweep() == [tmp_path / ".stage-model.ckpt-3"]
    assert ".stage-model.ckpt-2" in caplog.text
    # A save of that name takes another place for it.
    save(store, 2)
    assert good_step(store) == 2


# ------------------------------------------------------------------------------------------------ kills


@kinds
def test_what_was_committed_and_is_not_in_the_state_file_is_counted_by_the_next_run(kind: str, tmp_path: Path) -> None:
    first = open_store(tmp_path, kind, max_to_keep=2)
    for step in (1, 2):
        save(first, step)
    before = (tmp_path / statefile.FILE_NAME).read_bytes()
    for step in (3, 4):
        save(first, step)
    # Killed before the state file, and before anything was removed.
    (tmp_path / statefile.FILE_NAME).write_bytes(before)
    second = open_store(tmp_path, kind, max_to_keep=2)
    with second.acquire():
        assert good_step(second) == 4
        assert [one.step for one in second.adopt_earlier()] == [3, 4]
    assert [one.step for one in second.candidates()] == [4, 3]


@kinds
def test_what_a_kill_kept_from_being_removed_is_removed_by_the_next_run(kind: str, tmp_path: Path) -> None:
    first = open_store(tmp_path, kind, max_to_keep=2)
    for step in (1, 2, 3):
        save(first, step)
    # The state file lists 2 and 3; killed before 1 was removed.
    reader = open_store(tmp_path, kind, max_to_keep=2)
    reader.adopt_earlier()
    assert [one.step for one in reader.candidates()] == [3, 2, 1], "one who does not hold the logdir removes nothing"
    second = open_store(tmp_path, kind, max_to_keep=2)
    with second.acquire():
        assert good_step(second) == 3
        second.adopt_earlier()
    assert [one.step for one in second.candidates()] == [3, 2]


def test_those_that_stay_for_ever_stay_when_a_kill_came_before_others_were_removed(tmp_path: Path) -> None:
    now = [0.0]

    def store() -> CheckpointStore:
        return open_store(tmp_path, max_to_keep=1, keep_every_n_hours=2, clock=lambda: now[0])

    first = store()
    for hour in range(6):
        now[0] = 1000.0 + hour * 3600
        save(first, hour)
        if hour < 5:
            first.prune()
    second = store()
    with second.acquire():
        assert good_step(second) == 5
        second.adopt_earlier()
    found = [one.step for one in second.candidates()]
    first.prune()
    assert found == [one.step for one in first.candidates()], "what the run would have removed by itself"
    assert len(found) > 1


def test_those_of_a_run_that_kept_all_are_not_removed_by_one_that_keeps_few(tmp_path: Path) -> None:
    first = open_store(tmp_path, max_to_keep=0)
    for step in range(5):
        save(first, step)
    second = open_store(tmp_path, max_to_keep=1)
    with second.acquire():
        second.newest_good()
        second.adopt_earlier()
    assert len(second.candidates()) == 5


@kinds
def test_a_quarantine_that_a_kill_cut_short_is_finished(kind: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, kind)
    save(store, 1)
    save(store, 2)
    place = tmp_path / "quarantine" / "model.ckpt-2"
    place.mkdir(parents=True)
    for one in (f"model.ckpt-2{SUFFIX}", "model.ckpt-2.index"):
        if (tmp_path / one).exists():
            (tmp_path / one).rename(place / one)
    store.sweep()
    assert not [one.name for one in tmp_path.iterdir() if one.name.startswith("model.ckpt-2")]
    assert data_of(place, "model.ckpt-2", kind).exists()
    assert good_step(store) == 1


@kinds
def test_what_was_kept_while_another_should_take_its_place_has_its_name_again(kind: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, kind)
    save(store, 1)
    save(store, 2, "old")
    content = data_of(tmp_path, "model.ckpt-2", kind).read_bytes()
    kept = tmp_path / ".replaced-model.ckpt-2"
    kept.mkdir()
    for one in list(tmp_path.iterdir()):
        if one.name.startswith("model.ckpt-2"):
            one.rename(kept / one.name)
    store.sweep()
    assert not kept.exists()
    assert data_of(tmp_path, "model.ckpt-2", kind).read_bytes() == content
    assert good_step(store) == 2


def test_what_a_programs_own_saver_has_removed_is_removed_and_its_manifest_goes(tmp_path: Path) -> None:
    store = open_store(tmp_path, "tensorflow", max_to_keep=5)
    for step in (1, 2, 3):
        save(store, step)
    # As the saver does it: the files, and then its own state file.
    for suffix in (".data-00000-of-00001", ".index", ".meta"):
        (tmp_path / f"model.ckpt-2{suffix}").unlink()
    assert 2 in [one.step for one in store.candidates()], "as long as the state file lists it, it was lost"
    statefile.write(tmp_path, "model.ckpt-3", ["model.ckpt-1", "model.ckpt-3"])
    assert [one.step for one in store.candidates()] == [3, 1]
    store.sweep()
    assert not (tmp_path / f"model.ckpt-2{SUFFIX}").exists()


# ------------------------------------------------------------------------------------------------ the lock


HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from stepguard.store import CheckpointStore
hold = CheckpointStore(sys.argv[1]).acquire()
# As C code does that forks: the child has the descriptor, and knows nothing of ours.
opened = {os.path.realpath(f"/proc/self/fd/{one}"): int(one) for one in os.listdir("/proc/self/fd")}
descriptor = next(one for name, one in opened.items() if name.endswith(".lock"))
sleep = f"import time; time.sleep({sys.argv[2]})"
child = subprocess.Popen([sys.executable, "-c", sleep], pass_fds=[descriptor], stdout=subprocess.DEVNULL)
print(os.getpid(), child.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def a_dead_holder(logdir: Path, child_lives_secs: float) -> tuple[int, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(logdir), str(child_lives_secs)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        pid, child = map(int, process.stdout.readline().split())
    return pid, child


def test_a_lock_that_dies_with_the_children_of_a_dead_chief_is_waited_for(tmp_path: Path) -> None:
    a_dead_holder(tmp_path, 1.5)
    with open_store(tmp_path).acquire() as hold:
        assert hold.is_locked


def test_a_lock_that_a_child_of_a_dead_chief_keeps_names_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_DYING_SECS", 0.3)
    pid, child = a_dead_holder(tmp_path, 60)
    try:
        with pytest.raises(LogdirInUseError, match=rf"process {pid} .*has ended.* {child} ") as caught:
            open_store(tmp_path).acquire()
        assert caught.value.pid == pid
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    "content",
    [
        b'{"host": 5, "pid": "x", "since": "never"}',
        b'{"pid": 1e999}',
        b'{"pid": -1, "since": -1e14, "host": "\\u001b[31m"}',
        b"[" * 3000,
        b'{"since": 1e15}',
        b"\xff",
    ],
)
def test_whatever_the_lock_says_of_its_holder_the_logdir_is_in_use(content: bytes, tmp_path: Path) -> None:
    program = HOLDER.replace("os.kill(os.getpid(), 9)", "time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        (tmp_path / lock.FILE_NAME).write_bytes(content)
        with in_time(), pytest.raises(LogdirInUseError) as caught:
            open_store(tmp_path).acquire()
        assert "\x1b" not in str(caught.value)
    finally:
        holder.kill()
        holder.communicate()


def test_a_lock_for_which_there_is_no_room_is_taken_when_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(files, "os", Answering(lock.FILE_NAME, errno.ENOSPC, frozenset({"open"})))
        hold = store.acquire()
    assert not hold.is_locked
    assert "no room" in caplog.text
    with hold:
        save(store, 1)
        assert hold.is_locked
    assert good_step(store) == 1


# ------------------------------------------------------------------------------------------------ crafted records


def crafted(body: dict[str, Any]) -> bytes:
    """A manifest with a digest that is right."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii")
    return json.dumps({**body, "digest": files.digest_bytes(canonical)}).encode()


def body_of(root: Path, name: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((root / f"{name}{SUFFIX}").read_bytes())
    del body["digest"]
    return body


HUGE = 10**1000
WRONG: dict[str, Any] = {
    "step": ["5", -1, 2**63, HUGE, 1.5, True, [], {}],
    "time": ["now", None, HUGE, 1e300, True, []],
    "name": [5, None, "../model.ckpt-2", "model.ckpt-1", "", "model.ckpt-2\0", ["model.ckpt-2"]],
    "engine": [5, None, {}],
    "files": [None, 5, {}, [], [None], [[]], ["x"], [{}]],
    "extra": [None, 5, [], "x"],
    "format_version": ["1", None, 0, -1, 1.0, True, []],
    "owned": [5, None, "x", {}],
}
IN_A_FILE: dict[str, Any] = {
    "name": [
        *(5, None, "", ".", "../precious", "/etc/passwd", "model.ckpt-1/model.bin", "model.ckpt-2/../../precious"),
        *("model.ckpt-2//x", "model.ckpt-2/.", "model.ckpt-2/\0", "model.ckpt-2/\ud800", "model.ckpt-2/" + "x" * 300),
    ],
    "size": ["5", None, -1, 2**63, HUGE, 1.5, True],
    "digest": [5, None, []],
}
CRAFTED = [(name, value, False) for name, values in WRONG.items() for value in values]
CRAFTED += [(name, value, True) for name, values in IN_A_FILE.items() for value in values]


@pytest.mark.parametrize("number", range(len(CRAFTED)))
def test_a_crafted_manifest_is_damage_with_a_sentence_and_costs_a_step_back(number: int, tmp_path: Path) -> None:
    name, value, is_in_file = CRAFTED[number]
    (tmp_path / "precious").write_bytes(b"precious")
    store = open_store(tmp_path / "logdir")
    save(store, 1)
    save(store, 2)
    body = body_of(store.root, "model.ckpt-2")
    (body["files"][0] if is_in_file else body)[name] = value
    (store.root / f"model.ckpt-2{SUFFIX}").write_bytes(crafted(body))
    (found,) = [one for one in store.candidates() if one.step == 2]
    with pytest.raises(CheckpointCorruptError, match=r"model\.ckpt-2\.manifest\.json: expected"):
        store.verify(found)
    assert good_step(store) == 1
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert not (store.root / f"model.ckpt-2{SUFFIX}").exists()


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**400, max_value=10**401)
    | st.floats()
    | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["format_version", "name", "engine", "step", "time", "files", "extra", "owned"]), value=_JSON
)
def test_any_value_in_any_field_of_a_manifest_is_read_or_refused(name: str, value: Any) -> None:
    body: dict[str, Any] = {
        "format_version": 1,
        "name": "m-1",
        "engine": "fake",
        "step": 1,
        "time": 1.0,
        "files": [{"name": "m-1", "size": 1, "digest": "x"}],
        "extra": {},
        "owned": [],
    }
    path = Path(f"m-1{SUFFIX}")
    try:
        content = crafted({**body, name: value})
    except ValueError:
        return
    try:
        manifest = Manifest.from_json(content, path)
    except CheckpointError as error:
        refused = str(error)
        assert refused.isprintable()
    else:
        assert manifest.step is None or 0 <= manifest.step < 2**63
        assert abs(manifest.time) <= 1e15
        time.localtime(manifest.time)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_in_the_state_file_are_no_error(content: bytes, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    if not store.candidates():
        save(store, 1)
    (tmp_path / statefile.FILE_NAME).write_bytes(content)
    assert good_step(store) == 1


@pytest.mark.parametrize(
    "path",
    [
        "model.ckpt-" + "9" * 5000,
        "model.ckpt-²",
        "a\\000b/model.ckpt-7",
        "x" * 5000 + "/model.ckpt-7",
        "model.ckpt-7/..",
        "\\377",
    ],
)
def test_a_state_file_with_a_path_that_no_system_takes_is_passed_over(path: str, tmp_path: Path) -> None:
    text = f'model_checkpoint_path: "{path}"\nall_model_checkpoint_paths: "{path}"\n'
    (tmp_path / statefile.FILE_NAME).write_text(text)
    store = open_store(tmp_path)
    assert store.newest_good().checkpoint is None
    save(store, 1)
    assert good_step(store) == 1


def test_names_that_are_no_steps_are_no_checkpoints(tmp_path: Path) -> None:
    store = open_store(tmp_path, "tensorflow")
    for name in ("model.ckpt-²", "model.ckpt-" + "9" * 200, "model.ckpt--1", "model.ckpt-1e3"):
        (tmp_path / f"{name}.index").write_bytes(b"x")
        (tmp_path / f"{name}{SUFFIX}").write_bytes(b"x")
    assert store.candidates() == []


def test_all_that_is_there_being_crafted_is_refused_and_left(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    body = body_of(tmp_path, "model.ckpt-1")
    (tmp_path / f"model.ckpt-1{SUFFIX}").write_bytes(crafted({**body, "engine": "\x1b[2J", "step": "1"}))
    with pytest.raises(NoGoodCheckpointError) as caught:
        store.newest_good()
    assert str(caught.value).isprintable()


def nested(path: Path, depth: int) -> None:
    """Make directories in each other, by steps: their whole path may be too long for the system."""
    path.mkdir()
    here = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("a", dir_fd=here)
        here, above = os.open("a", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)


@pytest.mark.parametrize("name", [".stage-model.ckpt-9", ".replaced-model.ckpt-9", "model.ckpt-3"])
def test_directories_in_each_other_by_the_thousand_stop_no_start_and_no_save(name: str, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 2)
    nested(tmp_path / name, 1100)
    assert good_step(store) == 2
    store.sweep()
    save(store, 3)
    assert good_step(store) == 3
