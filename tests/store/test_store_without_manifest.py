"""Checkpoints without a manifest, copies under other names, and what the state file says of them."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from stores import directory_content, good_of, layouts, open_store, put, save, snapshot_of, tensorflow_content

from stepguard.disk import files
from stepguard.errors import (
    CheckpointCorruptError,
    NoGoodCheckpointError,
)
from stepguard.store import Checkpoint, CheckpointStore, statefile, tensorflow_files


def put_as_tensorflow(root: Path, step: int) -> None:
    """What a Saver leaves, without a manifest: the files, and then a state file that names them."""
    name = f"model.ckpt-{step}"
    put(root, tensorflow_content(name, ""))
    state = statefile.read(root)
    statefile.write(root, name, [*(() if state is None else state.names), name])


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
    message = CheckpointStore(tmp_path, saver_files=tensorflow_files).newest_good().message()
    assert message == (
        f"{tmp_path}/model.ckpt-2 is gone (the file 'checkpoint' names it as the newest, and there is no file of it): "
        f"resuming from {tmp_path}/model.ckpt-1, 1 step earlier"
    )


def test_one_whose_files_were_removed_by_hand_is_gone_although_its_manifest_is_left(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    for path in tmp_path.glob("model.ckpt-2*"):
        if not path.name.endswith(".manifest.json"):
            files.remove(path)
    message = CheckpointStore(tmp_path, saver_files=tensorflow_files).newest_good().message()
    assert message == (
        f"{tmp_path}/model.ckpt-2 is gone (its manifest is there, and none of its files): "
        f"resuming from {tmp_path}/model.ckpt-1, 1 step earlier"
    )
    assert not (tmp_path / "model.ckpt-2.manifest.json").exists()


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
    put(tmp_path, tensorflow_content("model.ckpt-600", ""))

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
    put(tmp_path, directory_content("model.ckpt-600", ""))
    whole = store.verify(store.candidates()[0]).manifest
    records = tuple(replace(one, name=one.name.replace("-500", "-600")) for one in whole.files)
    made_up = replace(whole, name="model.ckpt-600", step=100, files=records)
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
    put(tmp_path, tensorflow_content("model.ckpt-2", ""))
    (tmp_path / "model.ckpt-2.index").unlink()
    assert store.newest_good().message() == ""
    statefile.write(tmp_path, "model.ckpt-2", ["model.ckpt-1", "model.ckpt-2"])
    message = store.newest_good().message()
    assert "names it as the newest" in message
    assert "1 step earlier" in message


def test_remains_of_the_only_checkpoint_are_no_fresh_start(tmp_path: Path) -> None:
    put(tmp_path, tensorflow_content("model.ckpt-2", ""))
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
    put(put_in, tensorflow_content("other.ckpt-77", ""))
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
