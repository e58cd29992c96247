"""``stepguard rollback``: what it moves, what it says, and what a kill in between leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from logdirs import commit, flip

from stepguard.disk import files
from stepguard.options import Saving
from stepguard.store import CheckpointStore, tensorflow_files
from stepguard.store.marks import Marks
from stepguard.testing import FakeSupervisor
from stepguard.watching import ledger

SAVING = Saving(save_model_secs=0, save_model_steps=2, save_at_end=True)


def steps(logdir: Path) -> list[int | None]:
    return [one.step for one in CheckpointStore(logdir).candidates()]


@pytest.mark.parametrize("saver_files", [tensorflow_files, None], ids=["tensorflow", "torch"])
def test_the_newer_ones_are_moved_and_can_be_moved_back(tmp_path, stepguard, document, saver_files):
    store = commit(tmp_path, 1, 2, 3, 4, saver_files=saver_files)
    store.mark("model.ckpt-4", Marks(names=("last",)))
    ended = stepguard("rollback", tmp_path, "--to", "2")
    assert ended.stdout == f"rolled back to model.ckpt-2, step 2: 2 newer checkpoints in {tmp_path}/aside/1\n"
    assert steps(tmp_path) == [2, 1]
    assert [one["next"] for one in document("ls", tmp_path)["checkpoints"]] == [True, False]
    assert (tmp_path / "checkpoint").read_text().startswith('model_checkpoint_path: "') is True
    assert "model.ckpt-2" in (tmp_path / "checkpoint").read_text().splitlines()[0]
    told = ledger.read(tmp_path)[-1]
    assert (told["event"], told["role"], told["checkpoint"], told["step"]) == ("rollback", "command", "model.ckpt-2", 2)
    assert "rolled back to model.ckpt-2, step 2" in stepguard("log", tmp_path).stdout

    for one in sorted((tmp_path / "aside" / "1").iterdir(), key=lambda one: one.name.endswith(".json")):
        one.rename(tmp_path / one.name)
    assert stepguard("verify", tmp_path).exit_code == 0
    assert steps(tmp_path) == [4, 3, 2, 1]


def test_the_next_start_goes_on_there_and_nothing_is_at_risk_until_then(tmp_path, stepguard, document):
    def train(count):
        sv = FakeSupervisor(str(tmp_path), size=4, saving=SAVING)
        with sv.managed_session() as session:
            first = session.step
            for _ in range(count):
                session.run_step()
                # So that no checkpoint falls due while another is being written.
                assert sv._saving.writer.drain(30)
        return first

    train(6)
    assert document("rollback", tmp_path, "--to", "4")["names"] == ["model.ckpt-6"]
    assert document("status", tmp_path)["steps_at_risk"] == 0
    assert train(1) == 4
    assert train(1) == 5


def test_to_the_newest_nothing_is_moved(tmp_path, stepguard):
    commit(tmp_path, 1, 2, saver_files=None)
    assert "no checkpoint was newer" in stepguard("rollback", tmp_path, "--to", "2").stdout
    assert not (tmp_path / "aside").exists()


def test_to_one_that_is_damaged_is_refused_and_nothing_is_moved(tmp_path, stepguard):
    commit(tmp_path, 1, 2, saver_files=None)
    flip(tmp_path / "model.ckpt-1" / "model.pt")
    ended = stepguard("rollback", tmp_path, "--to", "1")
    assert ended.exit_code == 1
    assert "expected the digest" in ended.stderr
    assert steps(tmp_path) == [2, 1]
    assert not (tmp_path / "rollback.json").exists()


@pytest.mark.parametrize("saver_files", [tensorflow_files, None], ids=["tensorflow", "torch"])
def test_cut_short_at_any_move_the_next_chief_does_the_rest(tmp_path, saver_files, monkeypatch):
    """What a kill leaves: the moves until then. Nothing is cleaned up, as by an exception that nobody catches."""
    move = files.move
    for at in range(20):
        logdir = tmp_path / str(at)
        store = commit(logdir, 1, 2, 3, saver_files=saver_files)
        before = {one.name for one in logdir.iterdir()}
        moves = iter(range(at))

        def move_or_die(source, target, moves=moves):
            if next(moves, None) is None:
                raise KeyboardInterrupt
            move(source, target)

        with monkeypatch.context() as patched:
            patched.setattr("stepguard.store.layout.files.move", move_or_die)
            try:
                store.roll_back(store.find(1), 1, by_program=False)
                is_over = True
            except KeyboardInterrupt:
                is_over = False
        again = CheckpointStore(logdir, engine=store.engine, saver_files=saver_files)
        with again.acquire():
            again.sweep()
        assert [one.step for one in again.candidates()] == [1]
        assert again.newest_good().checkpoint.step == 1
        left = {one.name for one in logdir.iterdir()} | {one.name for one in (logdir / "aside" / "1").iterdir()}
        assert before <= left
        if is_over:
            return
    pytest.fail("the moves did not end")


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["../outside", "model.ckpt-2"]},
        {"place": "../../outside"},
        {"to": "../model.ckpt-1"},
        {"names": "model.ckpt-2"},
        {"state": 1},
    ],
)
def test_a_record_that_was_made_up_moves_nothing_else(tmp_path, change):
    logdir = tmp_path / "logdir"
    store = commit(logdir, 1, 2, saver_files=None)
    (tmp_path / "outside").write_text("mine")
    record = {"to": "model.ckpt-1", "step": 1, "asked": "1", "by_program": False, "names": [], "place": "1"}
    (logdir / "rollback.json").write_text(json.dumps({**record, "state": "pending", "time": 1.0, **change}))
    with store.acquire():
        store.sweep()
    assert (tmp_path / "outside").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["logdir", "outside"]
    assert steps(logdir)[-1] == 1
