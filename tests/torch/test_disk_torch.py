"""A PyTorch run on a disk that fills up in the middle of a save."""

from __future__ import annotations

import logging

import pytest
import torch
from mounts import Mount, mounted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepguard.saving.commit import Committer
from stepguard.saving.retry import Backoff
from stepguard.store import CheckpointStore
from stepguard.torch import Supervisor, Values, events

STATE_MEGABYTES = 2


@pytest.fixture
def disk(tmp_path):
    with mounted(tmp_path / "disk") as mount:
        yield mount


def warnings(caplog):
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


class Run:
    """Weights that are all the number of the step."""

    def __init__(self, logdir, **options):
        self.logdir = logdir
        self.weights = torch.zeros(STATE_MEGABYTES << 18)
        self.sv = Supervisor(
            {"weights": Values(tensor=self.weights)},
            logdir,
            **{"save_model_secs": 0.05, "save_summaries_secs": 0, "max_to_keep": 2, **options},
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
    monkeypatch.setattr(Committer, "_check_space", lambda *_: None)
    monkeypatch.setitem(Backoff.__init__.__kwdefaults__, "first_secs", 0.05)
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


def write_until(run, session, condition):
    steps = session.steps(max_steps=session.global_step + 50_000)
    for step in steps:
        session.summary({"loss": step})
        if condition():
            steps.close()
            return
    raise AssertionError(f"not within 50,000 steps; {len(event_files(run))} event files")


def event_files(run):
    return list(run.logdir.glob("events.*"))


def log_warnings(caplog):
    return [one for one in warnings(caplog) if "event log" in one]


def test_a_full_disk_makes_a_gap_in_the_curves_and_nothing_worse(disk: Mount, caplog, capfd, monkeypatch):
    monkeypatch.setitem(Backoff.__init__.__kwdefaults__, "first_secs", 0.05)
    run = Run(disk.path / "run")
    with run.sv.managed_session() as session:

        def is_lost():
            # Again and again: a save that was under way gives space back.
            disk.fill()
            return log_warnings(caplog)

        write_until(run, session, is_lost)
        lost_at = session.global_step
        write_until(run, session, lambda: session.global_step >= lost_at + 5)
        assert len(event_files(run)) == 1
        disk.fill().unlink()
        write_until(run, session, lambda: len(event_files(run)) == 2)
        back_at = session.global_step
        write_until(run, session, lambda: session.global_step >= back_at + 5)

    accumulator = EventAccumulator(str(run.logdir))
    accumulator.Reload()
    written = [one.step for one in accumulator.Scalars("loss")]
    assert set(range(back_at + 1, session.global_step)) <= set(written)
    assert not set(range(lost_at + 1, lost_at + 4)) & set(written)
    assert len(log_warnings(caplog)) == 1
    assert "a gap" in log_warnings(caplog)[0]
    assert "Traceback" not in capfd.readouterr().err


def test_a_restart_on_a_full_disk_trains_and_opens_its_log_when_there_is_room(disk: Mount, caplog, monkeypatch):
    monkeypatch.setitem(Backoff.__init__.__kwdefaults__, "first_secs", 0.05)
    first = Run(disk.path / "run")
    with first.sv.managed_session() as session:
        first.train_until(session, first.saved)
    disk.fill()

    def failed_to_save():
        return any("No space left" in one and "saving" in one for one in warnings(caplog))

    run = Run(disk.path / "run")
    with run.sv.managed_session() as session:
        assert session.global_step == first.saved()[0]
        write_until(run, session, failed_to_save)
        assert len(log_warnings(caplog)) == 1
        # Written by the program itself, past the supervisor.
        run.sv.summary_writer.add_scalar("own", 1.0, session.global_step)
        disk.fill().unlink()
        write_until(run, session, lambda: len(event_files(run)) == 2)
        back_at = session.global_step
        write_until(run, session, lambda: session.global_step >= back_at + 5)
    accumulator = EventAccumulator(str(run.logdir))
    accumulator.Reload()
    assert session.global_step - 1 in [one.step for one in accumulator.Scalars("loss")]
    assert run.saved()[0] == session.global_step


def test_a_disk_that_fills_up_between_the_look_and_the_opening_of_the_log_stops_no_start(
    disk: Mount, caplog, monkeypatch
):
    monkeypatch.setitem(Backoff.__init__.__kwdefaults__, "first_secs", 0.05)
    first = Run(disk.path / "run")
    with first.sv.managed_session() as session:
        first.train_until(session, first.saved)
    before = first.saved()[0]
    disk.fill()
    monkeypatch.setattr(events, "_no_room", lambda logdir: None)
    run = Run(disk.path / "run")
    assert len(log_warnings(caplog)) == 1
    with run.sv.managed_session() as session:
        assert session.global_step == before
        disk.fill().unlink()
        write_until(run, session, lambda: run.saved()[0] > before)
        write_until(run, session, lambda: run.sv.summary_writer.file_writer is not None)


def test_a_disk_that_is_full_at_the_end_is_no_error_of_a_run_that_saves_nothing(disk: Mount, caplog):
    run = Run(disk.path / "run", save_model_secs=0)
    for _ in range(2):
        with run.sv.managed_session() as session:
            for step in session.steps(max_steps=session.global_step + 200):
                disk.fill()
                session.summary({"loss": step})

    assert len(log_warnings(caplog)) == 1


def test_what_fails_the_programs_own_writer_is_told_to_the_program(tmp_path):
    class Failing:
        def add_scalar(self, *_):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    run = Run(tmp_path, save_model_secs=0, summary_writer=Failing())
    with pytest.raises(OSError, match="No space left"), run.sv.managed_session() as session:
        session.summary({"loss": 1})
