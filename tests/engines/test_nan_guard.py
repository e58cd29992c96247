"""The NaN guard: what is not finite stops the run, or takes it back, and is never saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from programs import EngineUnderTest, Program, wait_until

from stepguard import NonFiniteError
from stepguard.options import Guarding, Saving
from stepguard.watching import ledger

NAN = math.nan
EVERY_FIFTH = {"save_model_secs": 0, "saving": Saving(save_model_steps=5), "save_summaries_secs": 0}


def train_to(program: Program, session: Any, step: int, *, saved: int, engine: EngineUnderTest, logdir: Path) -> None:
    """Steps until ``step``, with a stop at ``saved`` until that is committed."""
    program.run_steps(session, saved - program.step(session))
    program.wait_until_saved(saved, engine, logdir)
    program.run_steps(session, step - saved)


def returns(logdir: Path) -> list[dict[str, Any]]:
    return [event for event in ledger.read(logdir) if event["event"] == "return"]


def wait_until_back(logdir: Path, *, times: int = 1) -> None:
    # The ledger's line is the last thing that is done.
    wait_until(lambda: len(returns(logdir)) == times, f"return {times}")


def test_a_number_that_is_not_finite_stops_a_loop_that_never_asks(engine, tmp_path):
    program = engine.program(tmp_path, guarding=Guarding(nan_guard="stop"), **EVERY_FIFTH)

    with pytest.raises(NonFiniteError, match=r"loss is inf at step 7\..*model\.ckpt-5 \(step 5\)") as caught:  # noqa: SIM117
        with program.sv.managed_session() as session:
            train_to(program, session, 7, saved=5, engine=engine, logdir=tmp_path)
            program.report(session, math.inf)
            while True:
                program.run_step(session)

    assert caught.value.names == ("loss",)
    assert caught.value.step == 7
    assert engine.committed(tmp_path) == [5]
    assert ledger.read(tmp_path)[-1]["reason"] == "error"


def test_finite_numbers_are_nothing_to_stop_for(engine, tmp_path):
    program = engine.program(tmp_path, guarding=Guarding(nan_guard="stop"), **EVERY_FIFTH)

    with program.sv.managed_session() as session:
        for number in (0.0, -1e30, 1e30):
            program.run_step(session)
            program.report(session, number)

    assert engine.saved(tmp_path)[3] == [3] * 6


def test_without_the_guard_nothing_is_looked_at(engine, tmp_path):
    program = engine.program(tmp_path, **EVERY_FIFTH)

    with program.sv.managed_session() as session:
        program.run_step(session)
        program.report(session, NAN)
        program.spoil(session)
        program.run_step(session)

    assert engine.committed(tmp_path) == [2]


def test_a_state_that_is_not_finite_is_not_saved_and_stops_the_run(engine, tmp_path):
    program = engine.program(tmp_path, guarding=Guarding(nan_guard="stop"), **EVERY_FIFTH)

    with pytest.raises(NonFiniteError, match=r"not finite at step 10: .*weight") as caught:  # noqa: SIM117
        with program.sv.managed_session() as session:
            train_to(program, session, 7, saved=5, engine=engine, logdir=tmp_path)
            program.spoil(session)
            while True:
                program.run_step(session)

    assert caught.value.step == 10
    assert engine.committed(tmp_path) == [5]


@pytest.mark.parametrize("mode", ["stop", "return"])
def test_nor_is_it_saved_as_the_last(engine, mode, tmp_path):
    program = engine.program(
        tmp_path, guarding=Guarding(nan_guard=mode), save_model_secs=0, saving=Saving(save_at_end=True)
    )

    with pytest.raises(NonFiniteError, match="not finite at step 2"), program.sv.managed_session() as session:
        program.run_steps(session, 2)
        program.spoil(session)

    assert engine.committed(tmp_path) == []


def test_a_number_that_is_not_finite_takes_the_run_back(engine, tmp_path, caplog):
    program = engine.program(tmp_path, guarding=Guarding(nan_guard="return"), **EVERY_FIFTH)

    with program.sv.managed_session() as session:
        train_to(program, session, 7, saved=5, engine=engine, logdir=tmp_path)
        program.report(session, NAN)
        wait_until_back(tmp_path)
        assert program.values(session) == [program.step(session)] * 6 == [5] * 6
        program.run_steps(session, 6)

    assert engine.saved(tmp_path)[11] == [11] * 6
    (event,) = returns(tmp_path)
    assert (event["step"], event["to_step"], event["number"]) == (7, 5, 1)
    assert event["reason"] == "loss is nan at step 7"
    assert [one.message for one in caplog.records if "has returned to model.ckpt-5" in one.message]


def test_a_state_that_is_not_finite_takes_the_run_back_and_the_step_is_saved_when_it_comes_again(engine, tmp_path):
    program = engine.program(tmp_path, guarding=Guarding(nan_guard="return"), **EVERY_FIFTH)

    with program.sv.managed_session() as session:
        train_to(program, session, 8, saved=5, engine=engine, logdir=tmp_path)
        program.spoil(session)
        program.run_steps(session, 2)
        wait_until_back(tmp_path)
        assert program.step(session) == 5
        assert engine.committed(tmp_path) == [5]
        train_to(program, session, 12, saved=10, engine=engine, logdir=tmp_path)

    assert engine.saved(tmp_path) == {step: [step] * 6 for step in (5, 10, 12)}


def test_after_so_many_returns_the_run_stops_and_says_where_it_has_been(engine, tmp_path):
    program = engine.program(tmp_path, guarding=Guarding(nan_guard="return", nan_returns=1), **EVERY_FIFTH)

    with pytest.raises(NonFiniteError, match=r"returned 1 of at most 1 times.*nan at step 7: back to step 5"):  # noqa: SIM117
        with program.sv.managed_session() as session:
            train_to(program, session, 7, saved=5, engine=engine, logdir=tmp_path)
            program.report(session, NAN)
            wait_until_back(tmp_path)
            program.run_step(session)
            program.report(session, NAN)
            while True:
                program.run_step(session)

    assert engine.committed(tmp_path) == [5]


def test_with_nothing_to_return_to_the_run_stops(engine, tmp_path):
    program = engine.program(tmp_path, guarding=Guarding(nan_guard="return"), **EVERY_FIFTH)

    with pytest.raises(NonFiniteError, match="no checkpoint was saved in"), program.sv.managed_session() as session:
        program.run_step(session)
        program.report(session, NAN)
        while True:
            program.run_step(session)

    assert engine.committed(tmp_path) == []


def test_what_is_damaged_or_was_saved_spoilt_by_a_run_without_a_guard_is_not_returned_to(engine, tmp_path):
    program = engine.program(tmp_path, **EVERY_FIFTH)
    with program.sv.managed_session() as session:
        train_to(program, session, 10, saved=5, engine=engine, logdir=tmp_path)
        program.wait_until_saved(10, engine, tmp_path)
        program.spoil(session)
        program.run_steps(session, 5)
    assert engine.committed(tmp_path) == [5, 10, 15]

    guarded = engine.program(tmp_path, guarding=Guarding(nan_guard="return"), **EVERY_FIFTH)
    with guarded.sv.managed_session() as session:
        engine.damage(tmp_path, 10)
        guarded.report(session, NAN)
        wait_until_back(tmp_path)
        assert guarded.values(session) == [guarded.step(session)] * 6 == [5] * 6
        guarded.run_step(session)

    assert engine.read(tmp_path / "model.ckpt-6") == [6] * 6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nan_guard": "halt"}, ValueError, "nan_guard must be 'stop', 'return' or None, got 'halt'"),
        ({"nan_guard": True}, ValueError, "nan_guard must be"),
        ({"nan_returns": 0}, ValueError, "nan_returns must be a number of returns >= 1, got 0"),
        ({"nan_returns": 1.5}, TypeError, "nan_returns must be"),
        ({"nan_guard": "return"}, ValueError, "needs checkpoints to return to"),
    ],
)
def test_options_that_mean_nothing_are_refused(engine, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        engine.program(tmp_path, guarding=Guarding(**options), save_model_secs=0)


def test_without_a_logdir_a_run_can_stop_but_not_return(engine):
    with pytest.raises(ValueError, match="a chief with a logdir"):
        engine.program(None, guarding=Guarding(nan_guard="return"))
