"""A PyTorch run on a disk that fills up in the middle of a save."""

from __future__ import annotations

import logging

import pytest
import torch
from mounts import Mount, mounted

from stepguard.store import CheckpointStore
from stepguard.torch import Supervisor, Values
from stepguard.writer import CheckpointWriter

STATE_MEGABYTES = 2


@pytest.fixture
def disk(tmp_path):
    with mounted(tmp_path / "disk") as mount:
        yield mount


def warnings(caplog):
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


class Run:
    """Weights that are all the number of the step."""

    def __init__(self, logdir):
        self.logdir = logdir
        self.weights = torch.zeros(STATE_MEGABYTES << 18)
        self.sv = Supervisor(
            {"weights": Values(tensor=self.weights)},
            logdir,
            save_model_secs=0.05,
            save_summaries_secs=0,
            max_to_keep=2,
        )

    def train_until(self, session, condition):
        steps = session.steps(max_steps=session.global_step + 20_000)
        for _ in steps:
            self.weights += 1
            if condition():
                steps.close()
                return
        raise AssertionError(f"not within 20,000 steps; saved: {self.saved()}")

    def saved(self):
        return [one.step for one in CheckpointStore(self.logdir).candidates()]

    def assert_whole(self, step):
        saved = torch.load(self.logdir / f"model.ckpt-{step}" / "weights.pt", weights_only=True)
        assert (saved["tensor"] == step).all()


@pytest.mark.parametrize("leaves", [0, STATE_MEGABYTES / 2], ids=["full", "half a checkpoint is free"])
def test_a_full_disk_does_not_stop_training_and_the_save_is_tried_again(leaves, disk: Mount, caplog, monkeypatch):
    # Other programs fill the disk after the look at what is free.
    monkeypatch.setattr(CheckpointWriter, "_check_space", lambda *_: None)
    monkeypatch.setitem(CheckpointWriter.__init__.__kwdefaults__, "first_retry_secs", 0.05)
    run = Run(disk.path / "run")
    with run.sv.managed_session() as session:
        run.train_until(session, lambda: len(run.saved()) >= 2)

        def has_failed_twice():
            filler = disk.fill(leaves)
            assert filler.exists()
            return sum("No space left" in one for one in warnings(caplog)) >= 2

        run.train_until(session, has_failed_twice)
        before = run.saved()
        assert before
        for step in before:
            run.assert_whole(step)
        disk.fill().unlink()
        run.train_until(session, lambda: run.saved()[0] > before[0])
        run.assert_whole(run.saved()[0])
    run.assert_whole(run.saved()[0])
    assert run.saved()[0] == session.global_step
    assert [one.name for one in run.logdir.glob(".*") if one.name != ".stepguard.lock"] == []
