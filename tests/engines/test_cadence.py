"""Checkpoints as often as they are cheap: real runs, whose cost is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from programs import EngineUnderTest, wait_until

from stepguard import Saving
from stepguard.watching import heartbeat

# Nearly everything is allowed, so that the cost on a busy machine decides nothing.
OFTEN = Saving(save_model_secs=0, overhead=0.9, min_interval_secs=0.05)


def cadence(logdir: Path) -> dict[str, Any] | None:
    found = heartbeat.read_one(logdir, "chief")
    return None if found is None else found.cadence


def test_the_checkpoints_of_a_run_hold_one_step_each_and_it_says_what_they_cost(engine: EngineUnderTest, tmp_path):
    program = engine.program(tmp_path, saving=OFTEN)
    with program.sv.managed_session() as session:

        def trains_until_it_says_so() -> bool:
            program.run_step(session)
            return cadence(tmp_path) is not None

        wait_until(trains_until_it_says_so, "what the checkpoints have cost", within_secs=120)

    saved = engine.saved(tmp_path)
    assert len(saved) > 2
    assert all(values == [step] * 6 for step, values in saved.items())
    said = cadence(tmp_path)
    assert said is not None
    assert said["overhead"] == 0.9
    assert said["interval_secs"] >= 0.05
    assert 0 <= said["cost"] < 1
    assert said["bytes_per_day"] > 0


def test_the_last_step_is_saved_when_the_cadence_is_the_only_one_that_saves(engine, tmp_path):
    assert engine.program(tmp_path, saving=Saving(save_model_secs=0, overhead=0.01)).train(3) == 0

    assert engine.committed(tmp_path)[-1] == 3
    assert engine.program(tmp_path).train(0) == 3
