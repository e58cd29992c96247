"""The store, on real files and with real processes."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stepguard import files
from stepguard.errors import (
    CheckpointCorruptError,
    CheckpointError,
    LogdirInUseError,
    NoGoodCheckpointError,
)
from stepguard.store import Checkpoint, CheckpointStore, Manifest, statefile

Content = dict[str, bytes]


def tensorflow_files(name: str, tag: object) -> Content:
    return {
        f"{name}.data-00000-of-00002": f"first shard of {name} {tag} ".encode() * 40,
        f"{name}.data-00001-of-00002": f"second shard of {name} {tag} ".encode() * 40,
        f"{name}.index": f"index of {name} {tag} ".encode() * 10,
        f"{name}.meta": f"meta of {name} {tag} ".encode() * 10,
    }


def directory_files(name: str, tag: object) -> Content:
    return {
        f"{name}/model.bin": f"model of {name} {tag} ".encode() * 40,
        f"{name}/optimiser/state.bin": f"state of {name} {tag} ".encode() * 40,
    }


LAYOUTS: dict[str, tuple[str | None, Callable[[str, object], Content]]] = {
    "tensorflow": (".index", tensorflow_files),
    "directory": (None, directory_files),
}

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def open_store(root: Path, layout: str = "tensorflow", **options: Any) -> CheckpointStore:
    return CheckpointStore(root, entry_suffix=LAYOUTS[layout][0], engine=layout, **options)


def put(place: Path, content: Content) -> None:
    for name, value in content.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(value)


def save(store: CheckpointStore, step: int | None, tag: object = "") -> Checkpoint:
    name = store.name(step)
    put(store.stage(name), LAYOUTS[store.engine][1](name, tag))
    return store.commit(name, step)


def put_as_tensorflow(root: Path, step: int) -> None:
    """What a Saver leaves, without a manifest: the files, and then a state file that names them."""
    name = f"model.ckpt-{step}"
    put(root, tensorflow_files(name, ""))
    state = statefile.read(root)
    statefile.write(root, name, [*(() if state is None else state.names), name])


def content_of(checkpoint: Checkpoint) -> Content:
    found = {}
    for path in checkpoint.root.rglob("*"):
        inside = path.relative_to(checkpoint.root).as_posix()
        is_its = inside.startswith((checkpoint.name + ".", checkpoint.name + "/"))
        if path.is_file() and is_its and not inside.endswith(".manifest.json"):
            found[inside] = path.read_bytes()
    return found


def good_of(store: CheckpointStore) -> Checkpoint:
    good = store.newest_good().checkpoint
    assert good is not None
    return good


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: for tests that save hundreds of times, and pull no plug."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="stepguard-", dir=memory))
    yield path
    shutil.rmtree(path)


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def snapshot_of(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


# ------------------------------------------------------------------------------------------------ commit and list


@layouts
def test_a_commit_is_found_again_with_its_content_step_and_extra(layout: str, tmp_path: Path) -> None:
    store = open_store(tmp_path / "new" / "logdir", layout, clock=lambda: 1234.5)
    name = store.name(1200)
    put(store.stage(name), LAYOUTS[layout][1](name, ""))
    committed = store.commit(name, 1200, extra={"loss": 0.5, "tags": ["a", None]})

    found = good_of(open_store(tmp_path / "new" / "logdir", layout))
    assert found == committed
    assert found.path == tmp_path / "new" / "logdir" / "model.ckpt-1200"
    assert (found.step, found.time, found.is_committed) == (1200, 1234.5, True)
    assert found.manifest is not None
    assert found.manifest.extra == {"loss": 0.5, "tags": ["a", None]}
    assert found.manifest.engine == layout
    assert found.manifest.size == sum(len(value) for value in content_of(found).values())
    assert content_of(found) == LAYOUTS[layout][1](name, "")
    assert not [name for name in names_in(store.root) if name.startswith(".")]


def test_candidates_come_newest_first_by_step_and_not_by_name(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for step in (9, 20, 100):
        save(store, step)
    assert [one.step for one in store.candidates()] == [100, 20, 9]
    assert [one.step for one in store.owned] == []  # max_to_keep is None: nothing will be removed.


def test_a_program_that_went_back_goes_on_from_there(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for step in (50, 100, 51):
        save(store, step)
    assert [one.step for one in store.candidates()] == [51, 100, 50]


def test_a_stale_state_file_is_not_obeyed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 50)
    stale = (tmp_path / "checkpoint").read_bytes()
    save(store, 100)
    (tmp_path / "checkpoint").write_bytes(stale)
    assert [one.step for one in store.candidates()] == [100, 50]


def test_checkpoints_of_equal_step_are_ordered_by_time(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for name, modified in (("model.ckpt-0005", 200), ("model.ckpt-5", 100), ("model.ckpt-005", 300)):
        put(store.stage(name), tensorflow_files(name, ""))
        store.commit(name, 5)
        os.utime(tmp_path / f"{name}.manifest.json", (modified, modified))
    assert [one.name for one in store.candidates()] == ["model.ckpt-005", "model.ckpt-0005", "model.ckpt-5"]


def test_a_missing_logdir_has_no_checkpoint_and_none_is_good(tmp_path: Path) -> None:
    store = open_store(tmp_path / "missing")
    assert store.candidates() == []
    recovery = store.newest_good()
    assert (recovery.checkpoint, recovery.damaged, recovery.message()) == (None, (), "")
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("basename", ["model.ckpt", "a+b(c)[d].*", "run-7", "x-1-2", "été", "model"])
def test_names_never_swallow_each_other(basename: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, basename=basename, max_to_keep=1)
    others = {}
    for step in (None, 1, 12, 120):
        others[step] = save(store, step)
    stranger = tmp_path / f"{basename}-12.best.index"
    stranger.write_bytes(b"not ours")
    contents = {step: content_of(one) for step, one in others.items()}
    assert [one.step for one in store.candidates()] == [120, 12, 1, None]
    store.prune()
    assert [one.step for one in store.candidates()] == [120]
    assert content_of(others[120]) == contents[120]
    assert stranger.read_bytes() == b"not ours"
    # And a damaged one takes none of the others with it.
    for step in (None, 1, 12, 120):
        save(store, step)
    (tmp_path / f"{basename}-120.index").write_bytes(b"")
    good = good_of(store)
    assert good.step == 12
    assert content_of(good) == contents[12]


def test_files_that_are_not_checkpoints_are_left_alone(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_to_keep=1)
    strangers = [
        "events.out.tfevents.1",
        "graph.pbtxt",
        "model.ckpt-x.index",
        "model.ckpt-1.index.bak",
        "model.ckpt-٣.index",
    ]
    for name in strangers:
        (tmp_path / name).write_bytes(b"mine")
    for step in (1, 2, 3):
        save(store, step)
        store.prune()
    store.sweep()
    assert [one.step for one in store.candidates()] == [3]
    assert all((tmp_path / name).read_bytes() == b"mine" for name in strangers)


def test_listing_thousands_of_checkpoints_opens_no_manifest(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(3000):
        for suffix in (".index", ".data-00000-of-00001", ".manifest.json"):
            (fast_path / f"model.ckpt-{step}{suffix}").touch()
    opened: list[Path] = []
    read_bytes = files.read_bytes
    monkeypatch.setattr(files, "read_bytes", lambda path: opened.append(path) or read_bytes(path))
    store = open_store(fast_path)
    assert [one.step for one in store.candidates()] == list(range(2999, -1, -1))
    assert opened == [fast_path / "checkpoint"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basename": ""}, "basename"),
        ({"basename": "a/b"}, "basename"),
        ({"basename": ".hidden"}, "basename"),
        ({"entry_suffix": "index"}, "entry_suffix"),
        ({"max_to_keep": -1}, "max_to_keep"),
        ({"keep_every_n_hours": 0}, "keep_every_n_hours"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointStore(tmp_path, **options)


def test_wrong_names_steps_and_staged_files_are_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match="checkpoint name"):
        store.stage("other-5")
    stage = store.stage("model.ckpt-5")
    with pytest.raises(ValueError, match="found none"):
        store.commit("model.ckpt-5", 5)
    (stage / "model.ckpt-50.index").write_bytes(b"x")
    with pytest.raises(ValueError, match="expected only"):
        store.commit("model.ckpt-5", 5)
    (stage / "model.ckpt-50.index").unlink()
    put(stage, tensorflow_files("model.ckpt-5", ""))
    with pytest.raises(ValueError, match="expected step 5, got 6"):
        store.commit("model.ckpt-5", 6)
    with pytest.raises((TypeError, ValueError)):
        store.commit("model.ckpt-5", 5, extra={"array": object()})
    with pytest.raises(ValueError, match="staging directory"):
        store.discard(tmp_path)
    assert store.candidates() == []
    store.discard(stage)
    store.discard(stage)
    assert names_in(tmp_path) == set()


@layouts
@pytest.mark.parametrize("step", [None, 7])
def test_a_name_that_is_committed_again_holds_the_new_content_only(
    layout: str, step: int | None, tmp_path: Path
) -> None:
    store = open_store(tmp_path, layout, max_to_keep=2)
    save(store, step, "old")
    extra = tmp_path / (store.name(step) + ".data-00002-of-00003")
    if layout == "tensorflow":
        extra.write_bytes(b"a shard of an earlier save")
    save(store, step, "new")
    assert content_of(good_of(store)) == LAYOUTS[layout][1](store.name(step), "new")
    assert len(store.candidates()) == 1
    assert len(store.owned) == 1
    assert not [name for name in names_in(tmp_path) if name.startswith(".")]


@layouts
def test_files_that_a_program_wrote_itself_are_committed_in_place(layout: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, layout)
    for tag in ("old", "new"):
        store.uncommit("model.ckpt-3")
        put(tmp_path, LAYOUTS[layout][1]("model.ckpt-3", tag))
        store.commit_in_place("model.ckpt-3", 3)
    good = good_of(store)
    assert good.is_committed
    assert content_of(good) == LAYOUTS[layout][1]("model.ckpt-3", "new")
    with pytest.raises(ValueError, match="found none"):
        store.commit_in_place("model.ckpt-4", 4)


# ------------------------------------------------------------------------------------------------ damage


def damaged_places(size: int) -> list[int]:
    chance = random.Random(size)
    return sorted(chance.sample(range(size), min(50, size)))


def file_names(layout: str) -> list[str]:
    """The files of the checkpoint of step 2 that a restore needs, or that prove it good."""
    needed = [name for name in LAYOUTS[layout][1]("model.ckpt-2", "") if not name.endswith(".meta")]
    return [*needed, "model.ckpt-2.manifest.json"]


@layouts
@pytest.mark.parametrize("number", range(4))
def test_no_flipped_or_truncated_file_is_ever_taken_for_good(layout: str, number: int, tmp_path: Path) -> None:
    names = file_names(layout)
    if number >= len(names):
        return
    store = open_store(tmp_path, layout)
    save(store, 1)
    save(store, 2)
    path = tmp_path / names[number]
    whole = path.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :] for at in damaged_places(len(whole))]
    for broken in [*flipped, *(whole[:size] for size in damaged_places(len(whole))), b"", whole + b"\0"]:
        path.write_bytes(broken)
        good = store.newest_good(quarantine=False).checkpoint
        assert good is not None
        # A flip may hit white space of the manifest and change nothing: what counts is that the content is right.
        assert content_of(good) == LAYOUTS[layout][1](good.name, ""), f"{path}: {broken!r}"
        assert good.step == 1 or names[number].endswith(".manifest.json")


@layouts
@pytest.mark.parametrize("number", range(4))
def test_a_checkpoint_with_a_removed_file_is_not_good_unless_whole_without_it(
    layout: str, number: int, tmp_path: Path
) -> None:
    names = file_names(layout)
    if number >= len(names):
        return
    store = open_store(tmp_path, layout)
    save(store, 1)
    save(store, 2)
    (tmp_path / names[number]).unlink()
    recovery = store.newest_good()
    assert recovery.checkpoint is not None
    assert content_of(recovery.checkpoint) == LAYOUTS[layout][1](recovery.checkpoint.name, "")
    if layout == "tensorflow" and names[number].endswith(".manifest.json"):
        # Without its manifest it is a checkpoint as TensorFlow's own tools write it: good if its restore says so.
        assert recovery.checkpoint.step == 2
        assert not recovery.damaged
    else:
        assert recovery.checkpoint.step == 1
        assert "model.ckpt-2" in recovery.message()
        assert "1 step earlier" in recovery.message()


@pytest.mark.parametrize("content", [None, b"", b"mata of model.ckpt-2  " * 10, b"longer than it was" * 100])
def test_a_meta_graph_that_is_missing_or_damaged_is_warned_of_and_no_damage(
    content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    path = tmp_path / "model.ckpt-2.meta"
    if content is None:
        path.unlink()
    else:
        assert content != path.read_bytes()
        path.write_bytes(content)
    recovery = store.newest_good()
    assert (recovery.checkpoint, recovery.damaged) == (store.candidates()[0], ())
    (warning,) = [one.getMessage() for one in caplog.records]
    assert str(path) in warning
    assert "can be restored without it" in warning


def test_a_meta_graph_of_which_the_disk_has_lost_bytes_is_no_damage_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    monkeypatch.setattr(files, "os", os_that_cannot_read(".meta", errno.EIO))
    assert good_of(store).step == 1


def test_damaged_checkpoints_are_moved_with_the_reason_and_reported_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for step in (100, 200, 300):
        save(store, step)
    (tmp_path / "model.ckpt-300.index").write_bytes(b"short")
    flipped = tmp_path / "model.ckpt-200.data-00000-of-00002"
    flipped.write_bytes(b"X" + flipped.read_bytes()[1:])
    before = snapshot_of(tmp_path)

    recovery = store.newest_good()
    assert recovery.checkpoint is not None
    assert recovery.checkpoint.step == 100
    assert recovery.steps_lost == 200
    assert [one.checkpoint.step for one in recovery.damaged] == [300, 200]
    message = recovery.message()
    assert "expected a file of" in message
    assert "found 5 bytes" in message
    assert "expected the digest xxh3_128:" in message
    assert f"moved to {tmp_path / 'quarantine' / 'model.ckpt-300'}" in message
    assert message.endswith(f"resuming from {tmp_path / 'model.ckpt-100'}, 200 steps earlier")
    assert "\n" not in message

    after = snapshot_of(tmp_path)
    for step in (200, 300):
        place = f"quarantine/model.ckpt-{step}"
        assert "model.ckpt" in (tmp_path / place / "reason.txt").read_text()
        for name in [*tensorflow_files(f"model.ckpt-{step}", ""), f"model.ckpt-{step}.manifest.json"]:
            assert after[f"{place}/{name}"] == before[name]
            assert name not in after
    # It was said once; the next start finds nothing to complain about.
    assert [one.step for one in store.candidates()] == [100]


def test_a_second_quarantine_of_one_name_gets_its_own_place(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    for _ in range(3):
        save(store, 2)
        (tmp_path / "model.ckpt-2.index").unlink()
        assert good_of(store).step == 1
    assert names_in(tmp_path / "quarantine") == {"model.ckpt-2", "model.ckpt-2.1", "model.ckpt-2.2"}


def test_when_none_is_good_it_refuses_again_and_again_and_moves_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for step in (1, 2):
        save(store, step)
        (tmp_path / f"model.ckpt-{step}.index").write_bytes(b"bad")
    before = snapshot_of(tmp_path)
    for _ in range(2):
        with pytest.raises(NoGoodCheckpointError, match="to start over from step 0") as caught:
            store.newest_good()
        assert caught.value.path == tmp_path
        assert "model.ckpt-2" in str(caught.value)
    assert snapshot_of(tmp_path) == before


def test_a_manifest_from_a_newer_version_is_an_error_and_no_damage(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    checkpoint = save(store, 2)
    assert checkpoint.manifest is not None
    manifest = checkpoint.manifest
    newer = Manifest(manifest.name, manifest.engine, 2, 1.0, manifest.files, format_version=99)
    (tmp_path / "model.ckpt-2.manifest.json").write_bytes(newer.to_json())
    with pytest.raises(CheckpointError, match="newer Stepguard") as caught:
        store.newest_good()
    assert not isinstance(caught.value, CheckpointCorruptError)
    assert not (tmp_path / "quarantine").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"7", b'"x"', b"{}", b'{"digest": 1}', b"\xff\xfe", b"[" * 100_000, b'{"digest": NaN}'],
)
def test_a_manifest_that_is_no_manifest_is_damage(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointCorruptError):
        Manifest.from_json(content, tmp_path / "model.ckpt-1.manifest.json")


def test_a_manifest_never_leads_to_files_of_others(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    manifest = save(store, 1).manifest
    assert manifest is not None
    with pytest.raises(CheckpointCorruptError, match=r"expected the manifest of model\.ckpt-2"):
        Manifest.from_json(manifest.to_json(), tmp_path / "model.ckpt-2.manifest.json")
    record = manifest.files[0]
    for name in ("../model.ckpt-1.x", "model.ckpt-1/../../x", "model.ckpt-10.index", "/etc/passwd"):
        bad = Manifest("model.ckpt-1", "x", 1, 1.0, (type(record)(name, 1, "d"),))
        with pytest.raises(CheckpointCorruptError, match="only files of"):
            Manifest.from_json(bad.to_json(), tmp_path / "model.ckpt-1.manifest.json")


# ------------------------------------------------------------------------------------------------ without a manifest


def test_a_checkpoint_of_tensorflows_own_tools_is_a_candidate(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    put_as_tensorflow(tmp_path, 2)
    good = good_of(store)
    assert (good.step, good.is_committed, good.manifest) == (2, False, None)
    assert good_of(CheckpointStore(tmp_path)).step == 1, "without an entry suffix only committed ones count"


@pytest.mark.parametrize("missing", ["model.ckpt-2.data-00000-of-00002", "model.ckpt-2.data-00001-of-00002"])
@pytest.mark.parametrize("is_emptied", [True, False])
def test_one_without_a_manifest_needs_all_its_shards(missing: str, is_emptied: bool, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    put_as_tensorflow(tmp_path, 2)
    if is_emptied:
        (tmp_path / missing).write_bytes(b"")
    else:
        (tmp_path / missing).unlink()
    recovery = store.newest_good()
    assert recovery.checkpoint is not None
    assert recovery.checkpoint.step == 1
    assert missing in recovery.message()
    assert (tmp_path / "quarantine" / "model.ckpt-2" / "model.ckpt-2.index").exists()


def test_a_newest_that_was_removed_by_hand_is_gone_and_not_damaged(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    for path in tmp_path.glob("model.ckpt-2*"):
        files.remove(path)
    message = CheckpointStore(tmp_path, entry_suffix=".index").newest_good().message()
    assert message == (
        f"{tmp_path}/model.ckpt-2 is gone (the file 'checkpoint' names it as the newest, and there is no file of it): "
        f"resuming from {tmp_path}/model.ckpt-1, 1 step earlier"
    )


# What the files without a manifest hold, in place of a step that a framework reads.
HELD = {"model.ckpt-600": 100, "model.ckpt-100": 100, "model.ckpt-500": 500}


def step_held(path: Path) -> int | None:
    return HELD.get(path.name)


def copy(root: Path, name: str, as_name: str, *, with_manifest: bool = False) -> None:
    for path in [*root.glob(f"{name}.*"), root / name]:
        if path.is_dir():
            shutil.copytree(path, root / as_name)
        elif path.exists() and (with_manifest or not path.name.endswith(".manifest.json")):
            shutil.copy(path, root / path.name.replace(name, as_name))


def test_a_copy_under_a_newer_name_is_passed_over_and_said(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 100)
    save(store, 500)
    copy(tmp_path, "model.ckpt-100", "model.ckpt-600")

    for reader, why in ((step_held, "holds step 100"), (None, "the state file does not name it")):
        recovery = store.newest_good(step_held=reader)
        assert recovery.checkpoint is not None
        assert recovery.checkpoint.step == 500
        assert recovery.message() == (
            f"{tmp_path}/model.ckpt-600 is passed over (it has no manifest, and {why}): "
            f"resuming from {tmp_path}/model.ckpt-500"
        )
    assert [one.step for one in store.candidates()] == [500, 100, 600]


def test_a_copy_among_checkpoints_without_manifests_is_ranked_by_the_step_that_it_holds(tmp_path: Path) -> None:
    put_as_tensorflow(tmp_path, 100)
    put_as_tensorflow(tmp_path, 500)
    copy(tmp_path, "model.ckpt-100", "model.ckpt-600")
    store = open_store(tmp_path)

    recovery = store.newest_good(step_held=step_held)

    assert recovery.checkpoint is not None
    assert (recovery.checkpoint.name, recovery.checkpoint.step) == ("model.ckpt-500", 500)
    assert "model.ckpt-600 is passed over (it has no manifest, and holds step 100)" in recovery.message()
    # Of the two that hold step 100, the one with that name.
    assert [one.name for one in store.candidates(step_held)] == ["model.ckpt-500", "model.ckpt-100", "model.ckpt-600"]


def test_a_renamed_checkpoint_is_what_it_holds_and_that_is_said(tmp_path: Path) -> None:
    put(tmp_path, tensorflow_files("model.ckpt-600", ""))

    recovery = open_store(tmp_path).newest_good(step_held=step_held)

    assert recovery.checkpoint is not None
    assert recovery.checkpoint.step == 100
    assert recovery.message() == f"resuming from {tmp_path}/model.ckpt-600, which holds step 100"


def test_a_copy_that_the_state_file_names_is_obeyed_if_it_was_made_last(tmp_path: Path) -> None:
    store = open_store(tmp_path, clock=lambda: time.time() - 10)
    save(store, 100)
    save(store, 500)
    copy(tmp_path, "model.ckpt-100", "model.ckpt-600")
    statefile.write(tmp_path, "model.ckpt-600", ["model.ckpt-500", "model.ckpt-600"])

    recovery = store.newest_good(step_held=step_held)

    assert recovery.checkpoint is not None
    assert (recovery.checkpoint.name, recovery.checkpoint.step) == ("model.ckpt-600", 100)
    assert "model.ckpt-600, which holds step 100" in recovery.message()


@layouts
def test_a_copy_with_its_manifest_is_damage_since_the_manifest_names_another(layout: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, layout)
    save(store, 100)
    save(store, 500)
    copy(tmp_path, "model.ckpt-100", "model.ckpt-600", with_manifest=True)

    recovery = store.newest_good()

    assert recovery.checkpoint is not None
    assert recovery.checkpoint.step == 500
    assert "expected the manifest of model.ckpt-600, found that of model.ckpt-100" in recovery.message()
    assert [one.step for one in store.candidates()] == [500, 100]


def test_a_manifest_with_another_step_than_its_name_is_damage(tmp_path: Path) -> None:
    store = open_store(tmp_path, "directory")
    save(store, 500)
    put(tmp_path, directory_files("model.ckpt-600", ""))
    made_up = replace(store.verify(store.candidates()[0]).manifest, name="model.ckpt-600", step=100, files=())
    (tmp_path / "model.ckpt-600.manifest.json").write_bytes(made_up.to_json())

    recovery = store.newest_good()

    assert recovery.checkpoint is not None
    assert recovery.checkpoint.step == 500
    assert "expected the step 600, found 100" in recovery.message()


def test_one_whose_restore_fails_is_damaged_too_and_the_next_is_tried(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    put_as_tensorflow(tmp_path, 2)
    tried = []

    def restore(checkpoint: Checkpoint) -> None:
        tried.append(checkpoint.step)
        if not checkpoint.is_committed:
            raise CheckpointCorruptError("DataLossError: the bundle is broken", path=checkpoint.path)

    recovery = store.newest_good(attempt=restore)
    assert tried == [2, 1]
    assert recovery.checkpoint is not None
    assert recovery.checkpoint.step == 1
    assert "DataLossError" in recovery.message()
    assert "DataLossError" in (tmp_path / "quarantine" / "model.ckpt-2" / "reason.txt").read_text()


def test_an_error_of_the_restore_that_is_not_damage_is_raised_and_moves_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)

    def restore(checkpoint: Checkpoint) -> None:
        raise ValueError("the variables do not match")

    with pytest.raises(ValueError, match="do not match"):
        store.newest_good(attempt=restore)
    assert [one.step for one in store.candidates()] == [2, 1]


def test_data_without_an_entry_file_is_no_checkpoint_but_the_state_file_tells_of_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    put(tmp_path, tensorflow_files("model.ckpt-2", ""))
    (tmp_path / "model.ckpt-2.index").unlink()
    assert store.newest_good().message() == ""
    statefile.write(tmp_path, "model.ckpt-2", ["model.ckpt-1", "model.ckpt-2"])
    message = store.newest_good().message()
    assert "names it as the newest" in message
    assert "1 step earlier" in message


def test_remains_of_the_only_checkpoint_are_no_fresh_start(tmp_path: Path) -> None:
    put(tmp_path, tensorflow_files("model.ckpt-2", ""))
    (tmp_path / "model.ckpt-2.index").unlink()
    statefile.write(tmp_path, "model.ckpt-2", ["model.ckpt-2"])
    with pytest.raises(NoGoodCheckpointError, match=r"model\.ckpt-2"):
        open_store(tmp_path).newest_good()
    for path in tmp_path.glob("model.ckpt-2*"):
        path.unlink()
    recovery = open_store(tmp_path).newest_good()
    assert recovery.checkpoint is None
    assert "training starts over" in recovery.message()


@pytest.mark.parametrize(
    "state", [None, b"", b"\xff\x00garbage", b'model_checkpoint_path: "/old/place/model.ckpt-2"\n']
)
def test_no_state_file_is_needed(state: bytes | None, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    (tmp_path / "checkpoint").unlink()
    if state is not None:
        (tmp_path / "checkpoint").write_bytes(state)
    recovery = store.newest_good()
    assert recovery.checkpoint is not None
    assert (recovery.checkpoint.step, recovery.message()) == (2, "")


def test_a_logdir_that_was_renamed_resumes(tmp_path: Path) -> None:
    save(open_store(tmp_path / "old"), 5)
    (tmp_path / "old").rename(tmp_path / "new")
    store = open_store(tmp_path / "new")
    assert good_of(store).path == tmp_path / "new" / "model.ckpt-5"
    assert [one.name for one in store.listed_by_state()] == ["model.ckpt-5"]


def test_a_state_file_that_points_elsewhere_is_followed_while_the_logdir_has_none_of_its_own(tmp_path: Path) -> None:
    put_in = tmp_path / "pretrained"
    put_in.mkdir()
    put(put_in, tensorflow_files("other.ckpt-77", ""))
    root = tmp_path / "logdir"
    root.mkdir()
    (root / "checkpoint").write_text(f'model_checkpoint_path: "{put_in}/other.ckpt-77"\n')
    store = open_store(root)
    good = good_of(store)
    assert (good.path, good.step) == (put_in / "other.ckpt-77", 77)

    def refuse(checkpoint: Checkpoint) -> None:
        raise CheckpointCorruptError("broken", path=checkpoint.path)

    before = snapshot_of(put_in)
    with pytest.raises(NoGoodCheckpointError):
        store.newest_good(attempt=refuse)
    assert store.quarantine(good, "broken").moved_to is None
    assert snapshot_of(put_in) == before
    save(store, 1)
    assert good_of(store).step == 1


# ------------------------------------------------------------------------------------------------ reading errors


class FaultyOs:
    """The real ``os``; the call with number ``at`` raises an error, or kills the process."""

    COUNTED = frozenset(
        "open read readv write fsync close replace link unlink rmdir mkdir lstat listdir".split()  # noqa: SIM905
    )

    def __init__(self, at: int | None = None, number: int | None = None) -> None:
        self.at = at
        self.number = number
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.COUNTED:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls != self.at:
                return real(*arguments, **options)
            if self.number is None:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "close":
                real(*arguments)
            raise OSError(self.number, os.strerror(self.number or 0), "injected")

        return call


def os_that_cannot_read(part: str, number: int) -> Any:
    class Unreadable:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
            if part in str(path) and not flags & os.O_DIRECTORY and Path(path).is_file():
                raise OSError(number, os.strerror(number), str(path))
            return os.open(path, flags, mode)

    return Unreadable()


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EMFILE, errno.EPERM, errno.ENOMEM])
@pytest.mark.parametrize("part", ["model.ckpt-2.data", "model.ckpt-2.manifest"])
def test_an_error_of_reading_is_no_damage_and_is_raised(
    number: int, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    before = snapshot_of(tmp_path)
    monkeypatch.setattr(files, "os", os_that_cannot_read(part, number))
    with pytest.raises(OSError, match=r"model\.ckpt-2") as caught:
        store.newest_good()
    assert caught.value.errno == number
    assert snapshot_of(tmp_path) == before


def test_a_file_that_the_disk_cannot_read_is_damage_when_others_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    monkeypatch.setattr(files, "os", os_that_cannot_read("model.ckpt-2.data", errno.EIO))
    recovery = store.newest_good()
    assert recovery.checkpoint is not None
    assert recovery.checkpoint.step == 1
    assert "could not be read" in recovery.message()
    assert (tmp_path / "quarantine" / "model.ckpt-2").is_dir()


def test_when_nothing_can_be_read_the_error_is_raised_and_nothing_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    before = snapshot_of(tmp_path)
    monkeypatch.setattr(files, "os", os_that_cannot_read("model.ckpt-", errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        store.newest_good()
    assert snapshot_of(tmp_path) == before


def test_in_a_read_only_logdir_the_damaged_stay_and_the_message_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    (tmp_path / "model.ckpt-2.index").write_bytes(b"bad")
    before = snapshot_of(tmp_path)

    class ReadOnly:
        def __getattr__(self, name: str) -> Any:
            if name in ("mkdir", "replace", "unlink", "rmdir", "link"):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))
            return getattr(os, name)

    monkeypatch.setattr(files, "os", ReadOnly())
    with caplog.at_level(logging.WARNING):
        recovery = store.newest_good()
    assert recovery.checkpoint is not None
    assert recovery.checkpoint.step == 1
    assert "left where it is" in recovery.message()
    assert "Read-only file system" in caplog.text
    assert snapshot_of(tmp_path) == before


def test_one_that_is_pruned_while_it_is_read_is_passed_over_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chief = open_store(tmp_path, max_to_keep=1)
    save(chief, 1)
    reader = open_store(tmp_path)
    listed = reader.candidates()
    save(chief, 2)
    chief.prune()
    rounds = iter([listed, reader.candidates()])
    monkeypatch.setattr(reader._layout, "candidates", lambda: next(rounds))
    recovery = reader.newest_good(quarantine=False)
    assert recovery.checkpoint is not None
    assert (recovery.checkpoint.step, recovery.damaged) == (2, ())


# ------------------------------------------------------------------------------------------------ saving errors


def prepared(root: Path, layout: str, steps: tuple[int | None, ...]) -> CheckpointStore:
    store = open_store(root, layout, max_to_keep=2)
    for step in steps[:-1]:
        save(store, step, "old")
    return store


def save_and_prune(store: CheckpointStore, step: int | None, tag: str) -> None:
    stage = store.stage(store.name(step))
    try:
        put(stage, LAYOUTS[store.engine][1](store.name(step), tag))
        store.commit(store.name(step), step)
    except BaseException:
        store.discard(stage)
        raise
    store.prune()


def error_of(call: Callable[[], object]) -> OSError | None:
    try:
        call()
    except OSError as error:
        return error
    return None


def legitimate(layout: str, checkpoint: Checkpoint) -> list[Content]:
    return [LAYOUTS[layout][1](checkpoint.name, tag) for tag in ("old", "new")]


@layouts
@pytest.mark.parametrize("steps", [(1, 2, 3), (None, None)])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_an_error_at_any_call_of_a_save_is_raised_as_itself_and_loses_nothing(
    number: int, steps: tuple[int | None, ...], layout: str, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = 0
    failures = 0
    while True:
        at += 1
        root = fast_path / str(at)
        store = prepared(root, layout, steps)
        kept = {one.name: content_of(one) for one in store.candidates()}
        faulty = FaultyOs(at, number)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", faulty)
            error = error_of(lambda: save_and_prune(store, steps[-1], "new"))  # noqa: B023
        if faulty.calls < at:
            break  # The save has fewer calls than that: all were tried.
        recovery = store.newest_good(quarantine=False)
        assert recovery.checkpoint is not None
        assert not recovery.damaged
        assert content_of(recovery.checkpoint) in legitimate(layout, recovery.checkpoint)
        if error is not None:
            assert error.errno == number
            failures += 1
        else:
            assert recovery.checkpoint.step == steps[-1]
        for one in store.candidates():
            if one.name in kept and steps[-1] is not None:
                assert content_of(one) == kept[one.name]
        # The next try works, and nothing is left behind.
        save_and_prune(store, steps[-1], "new")
        good = good_of(store)
        assert content_of(good) == LAYOUTS[layout][1](good.name, "new")
        store.sweep()
        expected = {"checkpoint"}
        for one in store.candidates():
            expected |= {name.split("/")[0] for name in LAYOUTS[layout][1](one.name, "")} | {
                f"{one.name}.manifest.json"
            }
        assert names_in(root) <= expected
        assert len(store.candidates()) <= 3
    assert failures > 20


# For processes that import the package, and this file, as we did: from wherever they are.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(files.__file__).parents[1]), str(Path(__file__).parent)]),
}

KILLER = """
import os, sys
from pathlib import Path
import test_store as here
from stepguard import files

top, layout, steps = Path(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
at = 0
while True:
    at += 1
    root = top / str(at)
    here.prepared(root, layout, steps)
    child = os.fork()
    if child == 0:
        files.os = faulty = here.FaultyOs(at)
        here.save_and_prune(here.open_store(root, layout, max_to_keep=2), steps[-1], "new")
        os._exit(0 if faulty.calls < at else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        break
    assert status == -9, status
print(at - 1)
"""


@layouts
@pytest.mark.parametrize("steps", [(1, 2, 3), (None, None)])
def test_killed_at_any_call_of_a_save_it_resumes_from_a_good_checkpoint(
    steps: tuple[int | None, ...], layout: str, fast_path: Path
) -> None:
    killer = subprocess.run(
        [sys.executable, "-c", KILLER, str(fast_path), layout, repr(steps)],
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
        text=True,
    )
    kills = int(killer.stdout)
    assert kills > 30
    older = steps[-2]
    for at in range(1, kills + 1):
        store = open_store(fast_path / str(at), layout, max_to_keep=2)
        recovery = store.newest_good(quarantine=False)
        assert recovery.checkpoint is not None, f"killed at call {at}"
        assert not recovery.damaged
        assert recovery.checkpoint.step in (older, steps[-1])
        assert content_of(recovery.checkpoint) in legitimate(layout, recovery.checkpoint)
        # The next chief sweeps, and saves, as if nothing had been.
        store.sweep()
        again = store.newest_good().checkpoint
        assert again is not None
        assert again.step == recovery.checkpoint.step
        assert content_of(again) == content_of(recovery.checkpoint)
        store.adopt(store.listed_by_state())
        save_and_prune(store, steps[-1], "new")
        store.sweep()
        assert not [name for name in names_in(store.root) if name.startswith(".")]
        assert content_of(good_of(store)) == LAYOUTS[layout][1](store.name(steps[-1]), "new")


@layouts
def test_sweep_leaves_what_somebody_else_wrote_under_a_name_that_was_being_removed(layout: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, layout)
    checkpoint = save(store, 1)
    (tmp_path / "model.ckpt-1.manifest.json").rename(tmp_path / ".pruned-model.ckpt-1")
    put(tmp_path, LAYOUTS[layout][1]("model.ckpt-1", "written since"))
    assert store.sweep() == [tmp_path / ".pruned-model.ckpt-1"]
    assert content_of(checkpoint) == LAYOUTS[layout][1]("model.ckpt-1", "written since")


# ------------------------------------------------------------------------------------------------ retention


def test_the_last_ones_are_kept_and_only_owned_ones_are_ever_removed(tmp_path: Path) -> None:
    save(open_store(tmp_path), 1)  # Of another run, that nobody adopts.
    store = open_store(tmp_path, max_to_keep=2)
    for step in (2, 3, 4, 5):
        save(store, step)
        store.prune()
    assert [one.step for one in store.candidates()] == [5, 4, 1]
    assert [one.step for one in store.owned] == [4, 5]


@pytest.mark.parametrize("max_to_keep", [0, None])
def test_none_or_zero_keeps_all_and_lists_the_newest(max_to_keep: int | None, tmp_path: Path) -> None:
    store = open_store(tmp_path, max_to_keep=max_to_keep)
    for step in range(8):
        save(store, step)
        assert store.prune() == []
    assert len(store.candidates()) == 8
    state = statefile.read(tmp_path)
    assert state is not None
    assert state.names == ("model.ckpt-7",)


def test_adopted_checkpoints_of_an_earlier_run_are_pruned_too(tmp_path: Path) -> None:
    first = open_store(tmp_path, max_to_keep=3)
    for step in (1, 2, 3):
        save(first, step)
    second = open_store(tmp_path, max_to_keep=2)
    second.adopt(second.listed_by_state())
    save(second, 4)
    assert [one.step for one in second.prune()] == [1, 2]
    assert [one.step for one in second.candidates()] == [4, 3]


def test_neither_the_newest_good_nor_a_protected_one_is_removed(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_to_keep=1)
    for step in (1, 2, 3):
        save(store, step)
    assert [one.step for one in store.prune(protect=["model.ckpt-1"])] == [2]
    assert [one.step for one in store.prune()] == [1]
    store.adopt(store.candidates() * 3)
    assert store.prune() == []


def test_a_failed_prune_is_finished_by_the_next_chief(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path, max_to_keep=1)
    save(store, 1)
    save(store, 2)
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "injected")))
        with pytest.raises(OSError, match="injected"):
            store.prune()
    assert good_of(store).step == 2
    store.sweep()
    assert names_in(tmp_path) == {*tensorflow_files("model.ckpt-2", ""), "model.ckpt-2.manifest.json", "checkpoint"}


def test_one_for_each_interval_is_kept_over_restarts_and_pauses(tmp_path: Path) -> None:
    now = [1000.0]

    def run(hours: range) -> None:
        store = open_store(tmp_path, max_to_keep=1, keep_every_n_hours=2, clock=lambda: now[0])
        store.adopt(store.listed_by_state())
        for hour in hours:
            now[0] = 1000.0 + hour * 3600
            save(store, hour)
            store.prune()

    run(range(4))
    run(range(4, 8))
    run(range(50, 56))  # After a pause: one for each interval, not one after the other until it has caught up.
    kept = sorted(one.step or 0 for one in open_store(tmp_path).candidates())
    assert kept == [3, 5, 7, 50, 51, 53, 55]


# ------------------------------------------------------------------------------------------------ TensorFlow reads it


@pytest.fixture(scope="module")
def tf() -> Any:
    return pytest.importorskip("tensorflow")


@pytest.mark.parametrize("directory", ["plain", "we\"ird 'é' d\\x", "tab\tnewline\nend", "日本語"])
@pytest.mark.parametrize("relative_paths", [True, False])
def test_tensorflow_reads_the_state_file(directory: str, relative_paths: bool, tmp_path: Path, tf: Any) -> None:
    store = open_store(tmp_path / directory, relative_paths=relative_paths, max_to_keep=2, keep_every_n_hours=1)
    for step in (1, 2, 3):
        save(store, step)
    state = tf.train.get_checkpoint_state(str(store.root))
    assert state.model_checkpoint_path == str(store.root / "model.ckpt-3")
    assert list(state.all_model_checkpoint_paths) == [str(store.root / f"model.ckpt-{step}") for step in (2, 3)]
    assert (str(store.root) in (store.root / "checkpoint").read_text()) == (
        not relative_paths and directory == "plain"
    ) or directory != "plain"
    ours = statefile.read(store.root)
    assert ours is not None
    assert (ours.newest, ours.names) == ("model.ckpt-3", ("model.ckpt-2", "model.ckpt-3"))
    if directory == "plain":
        assert tf.train.latest_checkpoint(str(store.root)) == str(store.root / "model.ckpt-3")


@pytest.mark.parametrize("is_relative", [True, False])
@pytest.mark.parametrize("max_to_keep", [0, 1, 3])
@pytest.mark.parametrize("hours", [10000.0, 2.0, 0.75])
def test_retention_and_state_file_are_those_of_the_saver(
    hours: float, max_to_keep: int, is_relative: bool, tmp_path: Path, tf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorflow.python.training import saver as saver_module

    now = [5000.0]
    monkeypatch.setattr(saver_module, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.chdir(tmp_path)
    roots = {side: Path(side) if is_relative else tmp_path / side for side in ("theirs", "ours")}
    roots["theirs"].mkdir()
    with tf.Graph().as_default():
        variable = tf.compat.v1.get_variable("v", initializer=1.0)
        saver = tf.compat.v1.train.Saver(max_to_keep=max_to_keep, keep_checkpoint_every_n_hours=hours)
        store = open_store(roots["ours"], max_to_keep=max_to_keep, keep_every_n_hours=hours, clock=lambda: now[0])
        with tf.compat.v1.Session() as session:
            session.run(variable.initializer)
            for step in range(12):
                now[0] += 1800
                saver.save(session, str(roots["theirs"] / "model.ckpt"), global_step=step)
                save(store, step)
                store.prune()
    theirs = {path.stem for path in roots["theirs"].glob("*.index")}
    assert {one.name for one in store.candidates()} == theirs
    said = [line.replace("theirs", "ours") for line in (roots["theirs"] / "checkpoint").read_text().splitlines()]
    ours = (roots["ours"] / "checkpoint").read_text().splitlines()
    assert [line for line in ours if not line.startswith("last_preserved_timestamp")] == said


def test_the_saver_restores_what_was_committed_and_the_store_finds_what_the_saver_saved(
    tmp_path: Path, tf: Any
) -> None:
    store = open_store(tmp_path)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variable = tf.compat.v1.get_variable("v", initializer=1.0)
        saver = tf.compat.v1.train.Saver()
        for step in (1, 2):
            session.run(variable.assign(float(step)))
            stage = store.stage(f"model.ckpt-{step}")
            saver.save(session, str(stage / f"model.ckpt-{step}"), write_state=False)
            store.commit(f"model.ckpt-{step}", step)
        saver.restore(session, tf.train.latest_checkpoint(str(tmp_path)))
        assert session.run(variable) == 2.0
        session.run(variable.assign(3.0))
        saver.save(session, str(tmp_path / "model.ckpt"), global_step=3)
        good = good_of(store)
        assert (good.step, good.is_committed) == (3, False)


# ------------------------------------------------------------------------------------------------ the chief's lock

CHIEF = r"""
import os, signal, sys, time
from stepguard.store import CheckpointStore
hold = CheckpointStore(sys.argv[1]).acquire()
if "fork" in sys.argv:
    child = os.fork()
    if child == 0:
        os.write(1, f"child {os.getpid()}\n".encode())
        signal.pause()
os.write(1, f"chief {os.getpid()}\n".encode())
if "forget" in sys.argv:
    del hold
    os.write(1, b"forgotten\n")
sys.stdin.readline()
"""


class Chief:
    """Another process that holds the lock of a logdir."""

    def __init__(self, logdir: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHIEF, str(logdir), *options],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.pids = {}
        for _ in range(2 if options else 1):
            words = self.process.stdout.readline().split()
            self.pids[words[0]] = int(words[-1]) if len(words) > 1 else 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait()


@pytest.fixture
def chief_of() -> Iterator[Callable[..., Chief]]:
    chiefs: list[Chief] = []

    def start(logdir: Path, *options: str) -> Chief:
        chiefs.append(Chief(logdir, *options))
        return chiefs[-1]

    yield start
    for chief in chiefs:
        chief.close()
        if "child" in chief.pids:
            os.kill(chief.pids["child"], signal.SIGKILL)


def test_a_second_process_is_told_who_is_chief(tmp_path: Path, chief_of: Callable[..., Chief]) -> None:
    before = time.time()
    chief = chief_of(tmp_path / "logdir")
    with pytest.raises(LogdirInUseError) as caught:
        open_store(tmp_path / "logdir").acquire()
    error = caught.value
    assert error.logdir == tmp_path / "logdir"
    assert error.pid == chief.pids["chief"]
    assert error.host == os.uname().nodename
    assert error.since is not None
    assert before - 1 <= error.since <= time.time() + 1
    assert str(error.pid) in str(error)
    chief.close()
    open_store(tmp_path / "logdir").acquire().release()


def test_two_stores_of_one_process_save_side_by_side(tmp_path: Path) -> None:
    stores = [open_store(tmp_path, basename=basename, max_to_keep=2) for basename in ("generator", "critic")]
    with ThreadPoolExecutor(len(stores)) as threads:
        for saving in [threads.submit(lambda store: [save(store, step) for step in range(50)], one) for one in stores]:
            saving.result()
    for store in stores:
        assert good_of(store).step == 49
        assert [one.step for one in store.owned] == [48, 49]
    assert {name for name in names_in(tmp_path) if name.startswith(".")} == set()


def test_what_a_kill_left_aside_is_swept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    left = {".checkpoint.123.tmp", ".model.ckpt-2.manifest.json.123.tmp", ".checkpoint.tmp"}
    for name in (*left, ".mine.tmp"):
        (tmp_path / name).touch()
    assert {path.name for path in store.sweep()} == left


def test_a_killed_chief_leaves_no_lock(tmp_path: Path, chief_of: Callable[..., Chief]) -> None:
    chief_of(tmp_path).kill()
    with open_store(tmp_path).acquire() as hold:
        assert hold.is_locked
        assert json.loads((tmp_path / ".stepguard.lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".stepguard.lock").read_bytes() == b""


def test_a_forked_child_that_survives_its_killed_chief_holds_no_lock(
    tmp_path: Path, chief_of: Callable[..., Chief]
) -> None:
    chief = chief_of(tmp_path, "fork")
    with pytest.raises(LogdirInUseError):
        open_store(tmp_path).acquire()
    chief.kill()
    os.kill(chief.pids["child"], 0)  # It is alive.
    open_store(tmp_path).acquire().release()


def test_a_hold_that_nobody_refers_to_is_given_back(tmp_path: Path, chief_of: Callable[..., Chief]) -> None:
    chief_of(tmp_path, "forget")
    open_store(tmp_path).acquire().release()


def test_stores_of_one_process_share_the_lock_in_turn_and_at_once(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    never_released = open_store(tmp_path).acquire()
    for _ in range(3):
        with open_store(tmp_path / ".").acquire():
            pass
    other = [sys.executable, "-c", CHIEF, str(tmp_path)]
    refused = subprocess.run(other, env=ENVIRONMENT, input="\n", text=True, capture_output=True, check=False)
    assert "LogdirInUseError" in refused.stderr
    # Opening and closing the lock file, as a copy of the logdir does, gives nothing away.
    (tmp_path / ".stepguard.lock").read_bytes()
    assert (
        subprocess.run(other, env=ENVIRONMENT, input="\n", text=True, capture_output=True, check=False).returncode == 1
    )
    del never_released
    assert (
        subprocess.run(other, env=ENVIRONMENT, input="\n", text=True, capture_output=True, check=False).returncode == 0
    )
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_logdir_that_was_removed_and_made_again_is_locked_anew(
    tmp_path: Path, chief_of: Callable[..., Chief]
) -> None:
    root = tmp_path / "logdir"
    old = open_store(root).acquire()
    (root / ".stepguard.lock").unlink()
    root.rmdir()
    chief_of(root)
    with pytest.raises(LogdirInUseError):
        open_store(root).acquire()
    old.release()


def clear(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def test_the_chief_of_a_logdir_that_was_cleared_locks_it_again_when_it_saves(
    tmp_path: Path, chief_of: Callable[..., Chief], caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "logdir"
    store = open_store(root, max_to_keep=3)
    hold = store.acquire()
    other = open_store(root, basename="other").acquire()
    save(store, 1)
    clear(root)
    save(store, 2)
    other_process = [sys.executable, "-c", CHIEF, str(root)]
    refused = subprocess.run(other_process, env=ENVIRONMENT, input="\n", text=True, capture_output=True, check=False)
    assert "LogdirInUseError" in refused.stderr
    assert "is locked again" in caplog.text
    assert [one.name for one in store.listed_by_state()] == ["model.ckpt-2"]
    assert [one.name for one in store.owned] == ["model.ckpt-2"]
    hold.release()
    other.release()
    chief_of(root)


def test_a_logdir_that_is_removed_while_a_run_trains_is_made_again_where_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "runs" / "logdir"
    store = open_store(root)
    hold = store.acquire()
    save(store, 1)
    shutil.rmtree(root)
    save(store, 2)
    assert good_of(store).step == 2
    assert hold.is_locked
    assert (root / ".stepguard.lock").exists()
    assert "made again" in caplog.text
    shutil.rmtree(root.parent)
    with pytest.raises(FileNotFoundError):
        save(store, 3)
    assert not root.parent.exists()
    hold.release()


def test_a_logdir_that_has_vanished_with_its_filesystem_is_not_made_on_the_one_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "logdir"
    store = open_store(root)
    hold = store.acquire()
    monkeypatch.setattr(store, "_device", -1)
    shutil.rmtree(root)
    with pytest.raises(FileNotFoundError):
        save(store, 1)
    assert not root.exists()
    hold.release()


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_save_after_another_process_has_become_chief_of_a_cleared_logdir_is_refused(
    moment: str, tmp_path: Path, chief_of: Callable[..., Chief]
) -> None:
    root = tmp_path / "logdir"
    store = open_store(root)
    hold = store.acquire()
    if moment == "while":
        put(store.stage("model.ckpt-1"), tensorflow_files("model.ckpt-1", ""))
        (root / ".stepguard.lock").unlink()
    else:
        clear(root)
    chief_of(root)
    with pytest.raises(LogdirInUseError):
        save(store, 1) if moment == "before" else store.commit("model.ckpt-1", 1)
    assert store.candidates() == []
    hold.release()
    assert not hold.renew()


def test_a_filesystem_without_locks_is_warned_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from stepguard.store import lock

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    assert lock.fcntl is not None
    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        hold = open_store(tmp_path).acquire()
    assert not hold.is_locked
    assert "only one process trains here" in caplog.text
    hold.release()
