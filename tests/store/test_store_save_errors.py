"""A save that fails, or is killed, at any of its calls."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stores import (
    ENVIRONMENT,
    LAYOUTS,
    Content,
    FaultyOs,
    content_of,
    good_of,
    layouts,
    names_in,
    open_store,
    prepared,
    put,
    save,
    save_and_prune,
)

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError
from stepguard.store import Checkpoint, CheckpointStore, Manifest


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


KILLER = """
import os, sys
from pathlib import Path
import stores as here
from stepguard.disk import files

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
    older, finished = steps[-2], 0
    for at in range(1, kills + 1):
        store = open_store(fast_path / str(at), layout, max_to_keep=2)
        recovery = store.newest_good(quarantine=False)
        assert recovery.checkpoint is not None, f"killed at call {at}"
        assert not recovery.damaged
        assert recovery.checkpoint.step in (older, steps[-1])
        assert content_of(recovery.checkpoint) in legitimate(layout, recovery.checkpoint)
        step, content = recovery.checkpoint.step, content_of(recovery.checkpoint)
        # The next chief finishes a save that was complete but for its renames, removes any other, and saves.
        if is_staged_whole(store, steps[-1]):
            step, content = steps[-1], LAYOUTS[layout][1](store.name(steps[-1]), "new")
            finished += 1
        store.sweep()
        again = store.newest_good().checkpoint
        assert again is not None
        assert (again.root, again.step) == (store.root, step)
        assert content_of(again) == content
        store.adopt(store.listed_by_state())
        save_and_prune(store, steps[-1], "new")
        store.sweep()
        assert not [name for name in names_in(store.root) if name.startswith(".")]
        assert content_of(good_of(store)) == LAYOUTS[layout][1](store.name(steps[-1]), "new")
    assert finished > 3


def is_staged_whole(store: CheckpointStore, step: int | None) -> bool:
    """Whether the save of ``step`` has written its manifest, and not yet moved it to its place."""
    manifest = f"{store.name(step)}.manifest.json"
    aside = store.root / f".stage-{store.name(step)}" / manifest
    if not aside.exists() or (store.root / manifest).exists():
        return False
    try:
        return bool(Manifest.from_json(aside.read_bytes(), aside).files)
    except CheckpointCorruptError:
        return False


def left_by_a_kill(store: CheckpointStore, step: int, moved: int) -> Content:
    """The save of ``step``, as a kill leaves it after ``moved`` of its files were moved to their places."""
    content = LAYOUTS[store.engine][1](store.name(step), "new")
    with pytest.MonkeyPatch.context() as patch:
        real = files.move
        moves = iter(range(100))

        def move(source: Path, target: Path) -> None:
            if next(moves) == moved:
                raise KeyboardInterrupt
            real(source, target)

        patch.setattr(files, "move", move)
        patch.setattr(files, "remove", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            put(store.stage(store.name(step)), content)
            store.commit(store.name(step), step)
    return content


@layouts
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_save_that_lacks_a_byte_is_not_finished_after_a_kill(damage: str, layout: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, layout)
    old = content_of(save(store, 1))
    content = left_by_a_kill(store, 2, moved=1)
    first = Path(next(iter(content))).name
    victim = next(path for path in tmp_path.rglob("*") if path.is_file() and path.name == first)
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] if damage == "cut" else whole[:-1] + b"?")
    if damage == "gone":
        victim.unlink()
    store.sweep()
    assert good_of(store).step == 1
    assert content_of(good_of(store)) == old
    assert not (tmp_path / "model.ckpt-2.manifest.json").exists()


@layouts
@pytest.mark.parametrize("moved", [0, 1])
def test_only_the_last_save_before_the_kill_is_finished(moved: int, layout: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, layout)
    left_by_a_kill(store, 1, moved)
    save(store, 2)
    store.sweep()
    assert good_of(store).step == 2
    assert not (tmp_path / "model.ckpt-1.manifest.json").exists()
    left_by_a_kill(store, 3, moved)
    store.sweep()
    assert good_of(store).step == 3
    # The next run counts it, although no state file names it.
    assert [one.step for one in open_store(tmp_path, layout).adopt_earlier()] == [2, 3]


@layouts
def test_sweep_leaves_what_somebody_else_wrote_under_a_name_that_was_being_removed(layout: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, layout)
    checkpoint = save(store, 1)
    (tmp_path / "model.ckpt-1.manifest.json").rename(tmp_path / ".pruned-model.ckpt-1")
    put(tmp_path, LAYOUTS[layout][1]("model.ckpt-1", "written since"))
    assert store.sweep() == [tmp_path / ".pruned-model.ckpt-1"]
    assert content_of(checkpoint) == LAYOUTS[layout][1]("model.ckpt-1", "written since")
