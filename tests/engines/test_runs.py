"""The life of a supervised run: it begins at the right step, ends cleanly, and can be begun again."""

from __future__ import annotations

import logging
import os
import traceback
from typing import Any

import pytest
from programs import EngineUnderTest, Program, wait_until

from stepguard import Saving, Stopping
from stepguard.watching import ledger

# TensorFlow's FileWriter warns when it is told something after it was closed; nothing is written twice.
later_stops_may_warn = pytest.mark.filterwarnings("ignore:Attempting to use a closed FileWriter:UserWarning")


def test_a_new_run_begins_at_step_zero(engine: EngineUnderTest, tmp_path):
    assert engine.program(tmp_path).train(3) == 0


def test_the_session_is_closed_at_the_end_of_the_block(engine, tmp_path):
    program = engine.program(tmp_path)

    with program.sv.managed_session() as session:
        assert program.is_open(session)

    assert not program.is_open(session)
    assert program.sv.should_stop()


def test_each_run_on_a_logdir_goes_on_where_the_one_before_ended(engine, tmp_path):
    begun_at = [engine.program(tmp_path).train(3) for _ in range(3)]

    assert begun_at == [0, 3, 6]


def test_a_supervisor_can_supervise_several_runs(engine, tmp_path):
    program = engine.program(tmp_path)

    assert [program.train(3) for _ in range(3)] == [0, 3, 6]


def test_a_run_resumes_from_the_newest_checkpoint_and_not_from_another(engine, tmp_path):
    # Without a timer, whose first tick comes late on a busy machine.
    for steps in (2, 9, 1):
        engine.program(tmp_path, save_model_secs=0, saving=Saving(save_at_end=True)).train(steps)

    assert engine.committed(tmp_path) == [2, 11, 12]
    assert engine.program(tmp_path).train(0) == 12


def test_a_run_after_a_failed_one_goes_on_from_the_checkpoint_before_the_failure(engine, tmp_path):
    engine.program(tmp_path).train(4)
    # The timer's first turn may come late, on a busy machine, and find new steps.
    program = engine.program(tmp_path, save_model_secs=0)
    with pytest.raises(ZeroDivisionError), program.sv.managed_session() as session:
        program.run_steps(session, 3)
        raise ZeroDivisionError

    assert engine.program(tmp_path).train(1) == 4


@later_stops_may_warn
def test_stop_can_be_called_again(engine, tmp_path):
    program = engine.program(tmp_path)
    session = program.open_session()
    program.run_step(session)

    program.sv.stop()
    saved = engine.saved(tmp_path)
    program.sv.stop()

    assert engine.saved(tmp_path) == saved
    assert max(saved) == 1
    program.sv._engine.close(session)


def test_stop_can_be_called_before_any_session(engine, tmp_path):
    program = engine.program(tmp_path)

    program.sv.stop()

    assert program.sv.should_stop()
    assert program.train(2) == 0


@later_stops_may_warn
def test_stop_inside_the_block_ends_the_run_and_the_block_ends_quietly(engine, tmp_path):
    program = engine.program(tmp_path)

    with program.sv.managed_session() as session:
        program.run_steps(session, 2)
        program.sv.stop()
        assert program.is_open(session)
        assert max(engine.committed(tmp_path)) == 2

    assert not program.is_open(session)


@later_stops_may_warn
def test_an_error_after_a_stop_inside_the_block_still_closes_the_session(engine, tmp_path):
    program = engine.program(tmp_path)

    with pytest.raises(ZeroDivisionError), program.sv.managed_session() as session:
        program.sv.stop()
        raise ZeroDivisionError

    assert not program.is_open(session)


def test_the_traceback_of_an_error_in_the_block_has_the_frames_of_the_program_only(engine, tmp_path):
    program = engine.program(tmp_path)

    with pytest.raises(ZeroDivisionError) as raised, program.sv.managed_session():
        raise ZeroDivisionError

    assert {frame.filename for frame in traceback.extract_tb(raised.value.__traceback__)} == {__file__}


def test_request_stop_reaches_the_training_loop(engine, tmp_path):
    program = engine.program(tmp_path)

    with program.sv.managed_session() as session:
        program.sv.loop(None, program.sv.request_stop)
        while not program.sv.should_stop():
            program.run_step(session)
        last = program.step(session)

    assert max(engine.committed(tmp_path)) == last


def test_a_time_limit_asks_for_a_stop_and_is_its_reason(engine, tmp_path):
    program = engine.program(tmp_path, stopping=Stopping(after_secs=0.1, exit_codes={"time_limit": 75}))

    with pytest.raises(SystemExit) as ended, program.sv.managed_session() as session:
        while not program.sv.should_stop():
            program.run_step(session)

    assert ended.value.code == 75
    assert [event["reason"] for event in ledger.read(tmp_path) if event["event"] == "stop"] == ["time_limit"]


def test_a_session_without_standard_services_saves_nothing(engine, tmp_path):
    program = engine.program(tmp_path)

    with program.sv.managed_session(start_standard_services=False) as session:
        program.run_steps(session, 2)

    assert engine.committed(tmp_path) == []


def test_a_second_session_before_the_first_has_stopped_leaves_no_thread_behind(engine, tmp_path):
    if engine.name in ("torch", "jax"):
        pytest.skip("refused: both would train one model; see the tests of their sessions")
    program = engine.program(tmp_path, save_model_secs=0.01)
    first = program.open_session()
    wait_until(lambda: engine.committed(tmp_path), "a checkpoint")
    second = program.open_session()
    program.run_step(second)

    program.sv.stop()

    for session in (first, second):
        program.sv._engine.close(session)


def test_the_services_of_a_session_that_the_program_has_closed_say_nothing_more(engine, tmp_path):
    program = engine.program(tmp_path, save_model_secs=0.01, save_summaries_secs=0.01)
    for method in ("summarise", "step", "snapshot"):
        program.intercept(method, lambda session: _check_is_open(program, session))
    first = program.open_session()
    program.run_steps(first, 3)
    first.close()
    ticks: list[None] = []
    program.sv.loop(0.01, lambda: ticks.append(None))
    wait_until(lambda: len(ticks) >= 5, "what they would have done by now")

    second = program.open_session()
    program.run_steps(second, 2)
    wait_until(lambda: len(ticks) >= 10, "what they would have done by now")

    assert not program.sv.should_stop()
    program.sv.stop()
    assert max(engine.committed(tmp_path)) == 5
    program.sv._engine.close(second)


def _check_is_open(program: Program, session: Any) -> None:
    if not program.is_open(session):
        raise RuntimeError("Attempted to use a closed session")


def test_a_supervisor_that_was_never_stopped_does_not_hinder_the_next(engine, tmp_path):
    forgotten = engine.program(tmp_path, save_model_secs=0.01)
    session = forgotten.open_session()
    forgotten.run_steps(session, 3)
    wait_until(lambda: 3 in engine.committed(tmp_path), "the checkpoint of step 3")

    assert engine.program(tmp_path).train(4) == 3

    assert max(engine.committed(tmp_path)) == 7
    forgotten.sv.stop()
    forgotten.sv._engine.close(session)
    assert engine.program(tmp_path).train(0) == 7


class TestWithoutALogdir:
    def test_a_run_warns_and_writes_nothing(self, engine, tmp_path, monkeypatch, caplog):
        monkeypatch.chdir(tmp_path)
        program = engine.program(None)

        with caplog.at_level(logging.WARNING, "stepguard"), program.sv.managed_session() as session:
            program.run_steps(session, 2)
            assert program.step(session) == 2

        assert [record.message for record in caplog.records if "no logdir" in record.message]
        assert os.listdir(tmp_path) == []

    def test_the_standard_services_cannot_be_started(self, engine):
        program = engine.program(None)

        with (
            program.sv.managed_session(start_standard_services=False) as session,
            pytest.raises(ValueError, match="logdir"),
        ):
            program.sv.start_standard_services(session)


class TestAWorker:
    def test_starts_no_standard_services(self, engine, tmp_path):
        chief, worker = engine.program(tmp_path), engine.program(tmp_path, is_chief=False)

        with (
            chief.sv.managed_session(start_standard_services=False) as session,
            pytest.raises(RuntimeError, match="chief"),
        ):
            worker.sv.start_standard_services(session)

    def test_does_not_become_the_chief_of_the_logdir(self, engine, tmp_path):
        worker = engine.program(tmp_path / "of-the-chief", is_chief=False)

        assert not worker.sv._saving.holds_logdir
        assert not worker.sv.is_chief
        assert not (tmp_path / "of-the-chief").exists()
