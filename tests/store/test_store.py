"""Commits, and the list of checkpoints, on real files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from stores import LAYOUTS, content_of, good_of, layouts, names_in, open_store, put, save, tensorflow_content

from stepguard.disk import files
from stepguard.store import CheckpointStore, statefile

# --- commit and list ---


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
        put(store.stage(name), tensorflow_content(name, ""))
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
    put(stage, tensorflow_content("model.ckpt-5", ""))
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


# --- retention ---


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
    assert names_in(tmp_path) == {*tensorflow_content("model.ckpt-2", ""), "model.ckpt-2.manifest.json", "checkpoint"}


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
