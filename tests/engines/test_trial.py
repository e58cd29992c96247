"""Every Supervisor obeys a trial of `stepguard prove`: another logdir, more saves, and an end at exactly one step."""

from __future__ import annotations

import json

import pytest

from stepguard.watching import ledger, trial
from stepguard.watching.trial import Trial


@pytest.fixture
def a_trial(tmp_path, monkeypatch):
    made = Trial(str(tmp_path / "scratch"), stop_at=7, save_every=3)
    trial.write(tmp_path / "scratch" / "trial.json", made)
    monkeypatch.setenv(trial.VARIABLE, str(tmp_path / "scratch" / "trial.json"))
    return made


def test_it_ends_exactly_there_with_its_last_step_saved_and_nothing_in_its_own_logdir(engine, tmp_path, a_trial):
    own = tmp_path / "own"
    program = engine.program(own, save_model_secs=600)
    with program.sv.managed_session() as session:
        for _ in range(20):
            if program.sv.should_stop():
                break
            program.run_step(session)

    assert not own.exists()
    assert 7 in engine.committed(a_trial.logdir)
    assert max(engine.committed(a_trial.logdir)) == 7
    stop = [one for one in ledger.read(a_trial.logdir) if one["event"] == "stop"][-1]
    assert (stop["reason"], stop["step"], stop["error"]) == ("trial", 7, None)


def test_a_loop_that_never_asks_ends_there_too(engine, tmp_path, a_trial):
    program = engine.program(tmp_path / "own")
    with program.sv.managed_session() as session:
        for _ in range(20):
            program.run_step(session)

    assert max(engine.committed(a_trial.logdir)) == 7


def test_a_run_that_is_resumed_in_the_trial_ends_at_the_same_step(engine, tmp_path, a_trial):
    first = engine.program(tmp_path / "own")
    with first.sv.managed_session() as session:
        for _ in range(4):
            first.run_step(session)
    second = engine.program(tmp_path / "own")
    with second.sv.managed_session() as session:
        assert second.step(session) == 4
        for _ in range(20):
            second.run_step(session)

    assert max(engine.committed(a_trial.logdir)) == 7
    assert {one.path for one in trial.notes(tmp_path / "scratch")} == {str(tmp_path / "own")}


def test_a_trial_whose_file_is_gone_starts_nothing(engine, tmp_path, monkeypatch):
    monkeypatch.setenv(trial.VARIABLE, str(tmp_path / "gone.json"))
    with pytest.raises(RuntimeError, match="the run would go on in the program's own logdir"):
        engine.program(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_without_a_trial_nothing_changes(engine, tmp_path, monkeypatch):
    monkeypatch.delenv(trial.VARIABLE, raising=False)
    program = engine.program(tmp_path / "own", save_model_secs=600)
    with program.sv.managed_session() as session:
        for _ in range(9):
            program.run_step(session)

    assert engine.committed(tmp_path / "own")[-1] == 9


def test_the_file_of_a_trial_is_plain(tmp_path):
    trial.write(tmp_path / "trial.json", Trial(str(tmp_path), stop_at=5))
    assert json.loads((tmp_path / "trial.json").read_text())["stop_at"] == 5
