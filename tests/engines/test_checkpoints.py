"""Checkpoints of a supervised run: when they are taken, that each holds one step, and what a damaged one costs."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from programs import EngineUnderTest, Gate, Program, wait_until

from stepguard.errors import CheckpointError, CheckpointMismatchError, NoGoodCheckpointError, SaveFailedError
from stepguard.options import Saving
from stepguard.store import CheckpointStore

NEVER_SECS = 3600.0


def test_a_file_system_that_reports_0_blocks_is_saved_to(engine, tmp_path, monkeypatch):
    """Some FUSE and network file systems do not know their size."""
    nothing = type(shutil.disk_usage(tmp_path))(0, 0, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nothing)
    engine.program(tmp_path, saving=Saving(save_model_steps=2)).train(4)

    assert 4 in engine.committed(tmp_path)
    assert engine.program(tmp_path).train(1) == 4


class TestOneStep:
    """A state that mixes two steps shows in the values: all of them equal the step in every checkpoint."""

    def test_timed_checkpoints_hold_one_step_while_several_threads_train(self, engine: EngineUnderTest, tmp_path):
        program = engine.program(tmp_path, size=40, save_model_secs=0.01)
        torn: list[str] = []
        complete: list[int] = []

        def look(path: Path) -> None:
            step, values = int(path.name.rpartition("-")[2]), engine.read(path)
            if values == [step] * 40:
                complete.append(step)
            else:
                torn.append(f"step {step} holds {values}")

        _after_each_write(program, look)
        with program.sv.managed_session() as session, ThreadPoolExecutor(4) as pool:

            def train() -> None:
                while not program.sv.should_stop():
                    program.run_step(session)

            training = [pool.submit(train) for _ in range(4)]
            wait_until(lambda: len(complete) + len(torn) >= 12, "twelve checkpoints")
            program.sv.request_stop()
            for thread in training:
                thread.result()

        assert torn == []
        assert complete == sorted(set(complete))

    def test_a_step_may_take_long(self, engine, tmp_path, gate: Gate):
        """The snapshot waits for the end of the step that runs when the timer fires, and training for the snapshot."""
        program = engine.program(tmp_path, save_model_secs=0.01)
        program.intercept("snapshot", gate.pass_through)
        with program.sv.managed_session() as session, ThreadPoolExecutor(1) as pool:
            gate.wait_until_reached()
            step = pool.submit(program.run_step, session)
            wait_until(step.running, "the start of the step")
            assert program.step(session) == 0
            gate.open()
            step.result()

        assert engine.saved(tmp_path) == {0: [0] * 6, 1: [1] * 6}


class TestWhenTheyAreTaken:
    @pytest.mark.parametrize("end", ["the block ends", "a stop is requested", "the input ends"])
    def test_the_last_step_is_saved_at_a_clean_end(self, end, engine, tmp_path):
        program = engine.program(tmp_path, save_model_secs=NEVER_SECS)

        with program.sv.managed_session() as session:
            while not program.sv.should_stop():
                program.run_step(session)
                if program.step(session) < 5:
                    continue
                if end == "the block ends":
                    break
                if end == "the input ends":
                    raise engine.end_of_input()
                program.sv.request_stop()

        assert engine.saved(tmp_path)[5] == [5] * 6

    def test_the_last_step_is_saved_when_the_input_of_another_thread_ends(self, engine, tmp_path):
        program = engine.program(tmp_path, save_model_secs=NEVER_SECS)

        with program.sv.managed_session() as session:
            program.run_steps(session, 3)
            program.sv.loop(None, _raising(engine.end_of_input()))
            program.sv.wait_for_stop()

        assert max(engine.committed(tmp_path)) == 3

    def test_the_last_step_is_not_saved_after_an_error_of_the_block(self, engine, tmp_path):
        program = engine.program(tmp_path, save_model_secs=NEVER_SECS)

        with pytest.raises(ZeroDivisionError), program.sv.managed_session() as session:
            wait_until(lambda: engine.committed(tmp_path) == [0], "the first checkpoint")
            program.run_steps(session, 3)
            raise ZeroDivisionError

        assert engine.committed(tmp_path) == [0]

    def test_the_last_step_is_not_saved_after_an_error_of_a_service(self, engine, tmp_path):
        program = engine.program(tmp_path, save_model_secs=NEVER_SECS)

        with pytest.raises(ZeroDivisionError), program.sv.managed_session() as session:
            wait_until(lambda: engine.committed(tmp_path) == [0], "the first checkpoint")
            program.run_steps(session, 3)
            program.sv.loop(None, _raising(ZeroDivisionError()))
            program.sv.wait_for_stop()

        assert engine.committed(tmp_path) == [0]

    def test_the_last_step_is_saved_when_the_program_closes_the_session_before_it_stops(self, engine, tmp_path):
        program = engine.program(tmp_path, save_model_secs=NEVER_SECS)
        session = program.open_session()
        program.run_steps(session, 4)

        session.close()
        program.sv.stop()

        assert max(engine.committed(tmp_path)) == 4

    @pytest.mark.parametrize("secs", [0, None])
    def test_without_a_timer_nothing_is_saved(self, secs, engine, tmp_path):
        engine.program(tmp_path, save_model_secs=secs).train(3)

        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("model.ckpt")] == []
        assert not (tmp_path / "checkpoint").exists()

    def test_without_a_timer_the_last_step_is_saved_if_that_is_asked_for(self, engine, tmp_path):
        engine.program(tmp_path, save_model_secs=0, saving=Saving(save_at_end=True)).train(3)

        assert engine.saved(tmp_path) == {3: [3] * 6}

    def test_the_last_step_is_not_saved_if_that_is_not_asked_for(self, engine, tmp_path):
        program = engine.program(tmp_path, save_model_secs=NEVER_SECS, saving=Saving(save_at_end=False))

        with program.sv.managed_session() as session:
            wait_until(lambda: engine.committed(tmp_path) == [0], "the first checkpoint")
            program.run_steps(session, 3)

        assert engine.committed(tmp_path) == [0]

    def test_every_so_many_steps(self, engine, tmp_path):
        program = engine.program(tmp_path, save_model_secs=0, saving=Saving(save_model_steps=4))

        with program.sv.managed_session() as session:
            for step in range(1, 11):
                program.run_step(session)
                if step % 4 == 0:
                    program.wait_until_saved(step, engine, tmp_path)

        assert engine.saved(tmp_path) == {step: [step] * 6 for step in (4, 8, 10)}

    def test_every_so_many_steps_goes_on_after_a_restart(self, engine, tmp_path):
        engine.program(tmp_path, save_model_secs=0, saving=Saving(save_model_steps=4)).train(2)
        program = engine.program(tmp_path, save_model_secs=0, saving=Saving(save_model_steps=4))

        with program.sv.managed_session() as session:
            program.run_steps(session, 2)
            program.wait_until_saved(4, engine, tmp_path)

        assert engine.committed(tmp_path) == [2, 4]

    def test_an_unchanged_state_is_not_saved_again(self, engine, tmp_path):
        engine.program(tmp_path).train(3)
        before = _manifest_times(tmp_path)

        program = engine.program(tmp_path, save_model_secs=0.01)
        with program.sv.managed_session():
            looked = threading.Event()
            program.sv.loop(0.2, lambda: program.sv._saving.checkpointer() or looked.set())
            assert looked.wait(60)

        assert _manifest_times(tmp_path) == before

    def test_a_checkpoint_that_is_due_while_one_is_being_written_is_skipped_and_training_goes_on(
        self, engine, tmp_path, gate: Gate, caplog
    ):
        program = engine.program(tmp_path, save_model_secs=0.01)
        program.intercept("write", gate.pass_through)

        with caplog.at_level(logging.WARNING, "stepguard"), program.sv.managed_session() as session:
            gate.wait_until_reached()
            program.run_steps(session, 5)
            wait_until(lambda: "skipped (2 so far)" in caplog.text, "the second skipped checkpoint")
            program.run_steps(session, 5)
            gate.open()

        assert engine.saved(tmp_path)[10] == [10] * 6


class TestRetention:
    def test_the_last_five_are_kept(self, engine, tmp_path):
        program = engine.program(tmp_path, save_model_secs=0, saving=Saving(save_model_steps=1))

        with program.sv.managed_session() as session:
            for step in range(1, 9):
                program.run_step(session)
                program.wait_until_saved(step, engine, tmp_path)

        assert engine.committed(tmp_path) == [4, 5, 6, 7, 8]

    def test_those_of_the_run_before_count(self, engine, tmp_path):
        for _ in range(7):
            engine.program(tmp_path, save_model_secs=0, saving=Saving(save_at_end=True)).train(1)

        assert engine.committed(tmp_path) == [3, 4, 5, 6, 7]
        assert [path.name for path in tmp_path.iterdir() if "model.ckpt-1" in path.name] == []


class TestDamage:
    @pytest.fixture
    def logdir(self, engine, tmp_path) -> Path:
        """Holds the checkpoints of the steps 2, 4 and 6."""
        for _ in range(3):
            engine.program(tmp_path, save_model_secs=0, saving=Saving(save_at_end=True)).train(2)
        assert engine.committed(tmp_path) == [2, 4, 6]
        return tmp_path

    def test_of_the_newest_costs_a_step_back_and_one_warning(self, engine, logdir, caplog):
        engine.damage(logdir, 6)

        with caplog.at_level(logging.WARNING, "stepguard"):
            assert engine.program(logdir).train(1) == 4

        (warning,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
        assert str(logdir / "model.ckpt-6") in warning
        assert str(logdir / "quarantine" / "model.ckpt-6") in warning
        assert "2 steps earlier" in warning
        assert max(engine.committed(logdir)) == 5

    def test_of_the_two_newest_costs_two_steps_back_and_one_warning(self, engine, logdir, caplog):
        engine.damage(logdir, 6)
        engine.damage(logdir, 4)

        with caplog.at_level(logging.WARNING, "stepguard"):
            assert engine.program(logdir).train(1) == 2

        assert len([record for record in caplog.records if "damaged" in record.getMessage()]) == 1

    def test_of_an_older_one_is_no_concern_of_the_start(self, engine, logdir, caplog):
        engine.damage(logdir, 2)

        with caplog.at_level(logging.WARNING, "stepguard"):
            assert engine.program(logdir).train(1) == 6

        assert "damaged" not in caplog.text

    @pytest.mark.parametrize("content", [None, b"", b"\0garbage", b'model_checkpoint_path: "model.ckpt-2"\n'])
    def test_of_the_state_file_costs_nothing(self, content, engine, logdir):
        (logdir / "checkpoint").unlink()
        if content is not None:
            (logdir / "checkpoint").write_bytes(content)

        assert engine.program(logdir).train(1) == 6

    def test_of_the_logdirs_name_costs_nothing(self, engine, logdir, tmp_path_factory):
        moved = Path(shutil.move(logdir, tmp_path_factory.mktemp("elsewhere") / "moved"))

        assert engine.program(moved).train(1) == 6
        assert max(engine.committed(moved)) == 7

    def test_of_all_of_them_refuses_to_start_over(self, engine, logdir):
        for step in (2, 4, 6):
            engine.damage(logdir, step)
        before = _content(logdir)

        program = engine.program(logdir)
        with pytest.raises(NoGoodCheckpointError) as caught, program.sv.managed_session():
            raise AssertionError("the block must not be entered")

        assert all(f"model.ckpt-{step}" in str(caught.value) for step in (2, 4, 6))
        assert isinstance(caught.value, CheckpointError)
        assert _content(logdir) == before

    def test_none_but_a_model_of_another_size_is_an_error_that_moves_nothing(self, engine, logdir):
        before = _content(logdir)

        program = engine.program(logdir, size=7)
        with pytest.raises(CheckpointMismatchError, match=r"model\.ckpt-6"), program.sv.managed_session():
            raise AssertionError("the block must not be entered")

        assert _content(logdir) == before


class TestFailingWrites:
    def test_are_tried_again_while_training_goes_on(self, engine, tmp_path, caplog):
        program = engine.program(tmp_path, save_model_secs=0.01)
        _fail_writes(program, [OSError(errno.EIO, "the disk is on fire")])

        with caplog.at_level(logging.WARNING, "stepguard"), program.sv.managed_session() as session:
            wait_until(lambda: "the disk is on fire" in caplog.text, "the warning")
            program.run_steps(session, 3)
            wait_until(lambda: engine.committed(tmp_path), "a checkpoint")

        assert engine.saved(tmp_path)[3] == [3] * 6

    def test_that_never_end_stop_the_run_and_leave_the_checkpoints_before_them(self, engine, tmp_path):
        engine.program(tmp_path).train(2)
        program = engine.program(tmp_path, save_model_secs=0.01, saving=Saving(max_unprotected_secs=0))
        _fail_writes(program, [OSError(errno.ENOSPC, "no space") for _ in range(99)])

        with pytest.raises(SaveFailedError) as caught, program.sv.managed_session() as session:
            program.run_step(session)
            program.sv.wait_for_stop()

        assert isinstance(caught.value.__cause__, OSError)
        assert engine.program(tmp_path).train(1) == 2

    def test_of_the_last_checkpoint_are_an_error_of_the_run(self, engine, tmp_path):
        program = engine.program(tmp_path, save_model_secs=0, saving=Saving(save_at_end=True, max_unprotected_secs=0))
        _fail_writes(program, [OSError(errno.ENOSPC, "no space") for _ in range(99)])

        with pytest.raises(SaveFailedError), program.sv.managed_session() as session:
            program.run_step(session)

        assert not program.is_open(session)
        assert engine.committed(tmp_path) == []

    def test_that_are_no_fault_of_the_disk_stop_the_run_at_once(self, engine, tmp_path):
        program = engine.program(tmp_path, save_model_secs=0.01)
        _fail_writes(program, [ZeroDivisionError("a bug")])

        with pytest.raises(ZeroDivisionError, match="a bug"), program.sv.managed_session():
            program.sv.wait_for_stop()

        assert engine.committed(tmp_path) == []


def _after_each_write(program: Program, look: Any) -> None:
    original = program.sv._engine.write

    def write(snapshot: Any, stage: Path, name: str) -> None:
        original(snapshot, stage, name)
        look(stage / name)

    program.sv._engine.write = write


def _fail_writes(program: Program, errors: list[Exception]) -> None:
    def fail(*_: object) -> None:
        if errors:
            raise errors.pop(0)

    program.intercept("write", fail)


def _raising(error: Exception) -> Any:
    def fail() -> None:
        raise error

    return fail


def _manifest_times(logdir: Path) -> dict[str, float]:
    store = CheckpointStore(logdir)
    return {one.name: store.verify(one).time for one in store.candidates()}


def _content(logdir: Path) -> dict[str, bytes]:
    """Every checkpoint file, wherever it lies below the logdir."""
    return {
        str(path.relative_to(logdir)): path.read_bytes()
        for path in logdir.rglob("*")
        if path.is_file() and ("model.ckpt" in str(path.relative_to(logdir)) or path.name == "checkpoint")
    }
