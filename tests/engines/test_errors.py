"""Errors of a supervised run: the first is raised, once, by the block; everything has stopped by then."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from programs import SOON_SECS, EngineUnderTest, Gate, Program, wait_until

from stepguard.errors import SaveFailedError
from stepguard.options import Saving, Stopping
from stepguard.store import statefile


class BoomError(Exception):
    """What goes wrong in these tests."""


class TestOfServices:
    def test_an_error_of_a_loop_stops_the_run_and_is_raised_by_the_block(self, engine: EngineUnderTest, tmp_path):
        program = engine.program(tmp_path)
        error = BoomError("in the loop")

        with pytest.raises(BoomError) as caught, program.sv.managed_session() as session:
            program.sv.loop(None, _raising(error))
            while not program.sv.should_stop():
                program.run_step(session)

        assert caught.value is error
        assert not program.is_open(session)

    @pytest.mark.parametrize("method", ["summarise", "snapshot", "write"])
    def test_an_error_of_the_engine_in_a_service_stops_the_run(self, method, engine, tmp_path):
        program = engine.program(tmp_path, save_model_secs=0.01, save_summaries_secs=0.01)
        error = BoomError(method)
        program.intercept(method, _raising(error))

        with pytest.raises(BoomError) as caught, program.sv.managed_session():
            program.sv.wait_for_stop()

        assert caught.value is error

    def test_later_errors_are_notes_of_the_first(self, engine, tmp_path):
        program = engine.program(tmp_path)
        first = BoomError("the first")
        done = threading.Event()

        def fail_later() -> None:
            program.sv.wait_for_stop()
            done.set()
            raise BoomError("the second")

        with pytest.raises(BoomError) as caught, program.sv.managed_session():
            program.sv.loop(None, fail_later)
            program.sv.loop(None, _raising(first))
            assert done.wait(60)

        assert caught.value is first
        assert [note for note in _notes(first) if "the second" in note]

    def test_an_error_of_the_block_comes_after_one_of_a_service(self, engine, tmp_path):
        program = engine.program(tmp_path)
        first = BoomError("of a service")

        with pytest.raises(BoomError) as caught, program.sv.managed_session():
            program.sv.loop(None, _raising(first))
            program.sv.wait_for_stop()
            raise BoomError("of the block")

        assert caught.value is first
        assert [note for note in _notes(first) if "of the block" in note]

    def test_the_error_is_raised_by_stop_as_well_when_there_is_no_block(self, engine, tmp_path):
        program = engine.program(tmp_path)
        session = program.open_session()
        program.sv.loop(None, _raising(BoomError()))
        program.sv.wait_for_stop()

        with pytest.raises(BoomError):
            program.sv.stop()

        program.sv._engine.close(session)

    def test_the_next_run_of_the_same_supervisor_begins_without_it(self, engine, tmp_path):
        program = engine.program(tmp_path, save_model_secs=0)
        with pytest.raises(BoomError), program.sv.managed_session() as session:
            program.run_steps(session, 2)
            raise BoomError

        assert program.train(2) == 0

    def test_an_error_given_to_request_stop_is_raised_by_the_block(self, engine, tmp_path):
        program = engine.program(tmp_path)
        error = BoomError()

        with pytest.raises(BoomError) as caught, program.sv.managed_session():
            program.sv.request_stop(error)

        assert caught.value is error

    def test_a_thread_of_the_program_ends_the_run_by_stop_on_exception(self, engine, tmp_path):
        program = engine.program(tmp_path)

        def work() -> None:
            with program.sv.stop_on_exception():
                raise BoomError

        with pytest.raises(BoomError), program.sv.managed_session():
            threading.Thread(target=work).start()
            program.sv.wait_for_stop()


class TestWhilePreparing:
    @pytest.mark.parametrize("kind", ["an error", "the end of the input", "Ctrl-C"])
    def test_an_error_is_raised_as_itself(self, kind, engine, tmp_path):
        program = engine.program(tmp_path)
        errors = {"an error": BoomError(), "the end of the input": engine.end_of_input(), "Ctrl-C": KeyboardInterrupt()}
        error = errors[kind]
        program.fail_prepare(error)

        with pytest.raises(type(error)) as caught, program.sv.managed_session():
            raise AssertionError("the block must not be entered")

        assert caught.value is error
        assert engine.committed(tmp_path) == []

    def test_an_error_after_the_session_was_made_closes_it(self, engine, tmp_path):
        program = engine.program(tmp_path)
        closed: list[Any] = []
        error = BoomError()
        program.intercept("close", closed.append)
        program.intercept("step", _raising(error))

        with pytest.raises(BoomError) as caught, program.sv.managed_session():
            raise AssertionError("the block must not be entered")

        assert caught.value is error
        (session,) = closed
        assert not program.is_open(session)

    def test_an_error_of_a_plain_prepare_leaves_a_supervisor_that_can_be_stopped_and_used_again(self, engine, tmp_path):
        program = engine.program(tmp_path)
        program.fail_prepare(BoomError())
        with pytest.raises(BoomError):
            program.open_session()
        program.sv.stop()

        program.fail_prepare(None)
        assert program.train(1) == 0


class TestInterrupts:
    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_leave_the_block_as_themselves_after_the_last_step_was_saved(self, kind, engine, tmp_path):
        program = engine.program(tmp_path, save_model_secs=3600)
        error = kind(3)

        with pytest.raises(kind) as caught, program.sv.managed_session() as session:
            program.run_steps(session, 3)
            raise error

        assert caught.value is error
        assert not program.is_open(session)
        assert engine.saved(tmp_path)[3] == [3] * 6

    def test_carry_an_error_of_a_service_as_a_note(self, engine, tmp_path):
        program = engine.program(tmp_path)

        with pytest.raises(KeyboardInterrupt) as caught, program.sv.managed_session():
            program.sv.loop(None, _raising(BoomError("in the loop")))
            program.sv.wait_for_stop()
            raise KeyboardInterrupt

        assert [note for note in _notes(caught.value) if "in the loop" in note]

    def test_that_the_program_handles_itself_do_not_end_the_run(self, engine, tmp_path):
        program = engine.program(tmp_path)

        with program.sv.managed_session() as session:
            try:
                program.run_step(session)
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                assert not program.sv.should_stop()
            program.run_step(session)

        assert max(engine.committed(tmp_path)) == 2


# In which a busy machine saves the last step, too.
GRACE_SECS = 2.0


class TestAThreadThatDoesNotStop:
    def test_is_waited_for_no_longer_than_the_grace_period_and_named(self, engine, tmp_path, gate: Gate):
        program = engine.program(tmp_path, stopping=Stopping(stop_grace_secs=0.3))

        with pytest.raises(RuntimeError, match="stuck-one"), program.sv.managed_session() as session:
            _start_stuck_thread(program, gate)
            began = time.monotonic()
        took_secs = time.monotonic() - began

        assert 0.3 <= took_secs < SOON_SECS
        assert not program.is_open(session)

    def test_is_only_warned_of_when_the_program_says_so(self, engine, tmp_path, gate: Gate, caplog):
        program = engine.program(tmp_path, stopping=Stopping(stop_grace_secs=GRACE_SECS))
        session = program.open_session()
        program.run_step(session)
        _start_stuck_thread(program, gate)

        program.sv.stop(ignore_live_threads=True)

        assert "stuck-one" in caplog.text
        assert max(engine.committed(tmp_path)) == 1
        program.sv._engine.close(session)

    def test_does_not_hide_the_error_that_stopped_the_run(self, engine, tmp_path, gate: Gate):
        program = engine.program(tmp_path, stopping=Stopping(stop_grace_secs=0.3))

        with pytest.raises(BoomError) as caught, program.sv.managed_session():
            _start_stuck_thread(program, gate)
            raise BoomError

        assert [note for note in _notes(caught.value) if "stuck-one" in note]

    def test_does_not_cost_the_last_step(self, engine, tmp_path, gate: Gate):
        program = engine.program(tmp_path, stopping=Stopping(stop_grace_secs=GRACE_SECS), save_model_secs=3600)

        with pytest.raises(RuntimeError, match="stuck-one"), program.sv.managed_session() as session:
            program.run_steps(session, 3)
            _start_stuck_thread(program, gate)

        assert max(engine.committed(tmp_path)) == 3


class TestAWriteThatDoesNotEnd:
    @pytest.mark.filterwarnings("ignore:Attempting to use a closed FileWriter:UserWarning")
    def test_is_waited_for_no_longer_than_the_grace_period(self, engine, tmp_path, gate: Gate):
        program = engine.program(tmp_path, stopping=Stopping(stop_grace_secs=0.3), save_model_secs=3600)
        program.intercept("write", gate.pass_through)

        with pytest.raises(SaveFailedError), program.sv.managed_session() as session:
            program.run_step(session)
            gate.wait_until_reached()
            began = time.monotonic()
        took_secs = time.monotonic() - began

        assert took_secs < SOON_SECS
        assert not program.is_open(session)
        gate.open()
        wait_until(lambda: engine.committed(tmp_path), "the end of the write that was given up")

    def test_and_was_given_up_does_not_come_between_the_next_run_and_its_readers(self, engine, tmp_path, gate: Gate):
        given_up = engine.program(
            tmp_path, stopping=Stopping(stop_grace_secs=0.1), save_model_secs=0, saving=Saving(save_at_end=True)
        )
        given_up.intercept("write", gate.pass_through)
        with pytest.raises(SaveFailedError), given_up.sv.managed_session() as session:
            given_up.run_step(session)
        writing = [thread for thread in threading.enumerate() if thread.name == "stepguard-writer"]
        engine.program(tmp_path, save_model_secs=0, saving=Saving(save_at_end=True)).train(5)

        gate.open()
        for thread in writing:
            thread.join(60)

        state = statefile.read(tmp_path)
        assert state is not None
        assert state.newest == "model.ckpt-5"


def _start_stuck_thread(program: Program, gate: Gate) -> None:
    looper = program.sv.loop(None, gate.pass_through)
    looper.name = "stuck-one"
    gate.wait_until_reached()


def _raising(error: BaseException) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))
