"""The files of the store beside TensorFlow's own Saver."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stores import good_of, open_store, save

from stepguard.store import statefile


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
