"""A run goes on at an earlier checkpoint, once, and nothing of the newer ones is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from programs import EngineUnderTest

from stepguard.errors import CheckpointCorruptError, CheckpointError
from stepguard.options import Restoring, Saving
from stepguard.watching import ledger


@pytest.fixture
def logdir(engine: EngineUnderTest, tmp_path: Path) -> Path:
    """A run of 6 steps: 2 is the best, 4 is named."""
    program = engine.program(tmp_path, saving=saving(save_model_steps=2))
    with program.sv.managed_session() as session:
        for step in (2, 4, 6):
            program.run_steps(session, 2)
            program.wait_until_saved(step, engine, tmp_path)
            program.metrics(session, val_loss=float(step))
            if step == 4:
                program.save(session, "middle")
    assert engine.committed(tmp_path) == [2, 4, 6]
    return tmp_path


def saving(**others: Any) -> Saving:
    return Saving(save_model_secs=0, save_at_end=True, keep_best=("val_loss", "min", 1), **others)


def starts_at(engine: EngineUnderTest, logdir: Path, step: int | str | None, count: int = 1, **options: Any) -> int:
    options = {"saving": saving(), **options}
    return engine.program(logdir, restoring=Restoring(step=step), **options).train(count)


@pytest.mark.parametrize(("asked", "step"), [("best", 2), ("middle", 4), (4, 4), ("model.ckpt-2", 2)])
def test_a_start_goes_on_where_the_program_asks_and_puts_the_newer_ones_aside(engine, logdir, asked, step):
    assert starts_at(engine, logdir, asked) == step

    assert engine.committed(logdir) == [*range(2, step + 1, 2), step + 1]
    aside = {one.name for one in (logdir / "aside" / "1").glob("*.manifest.json")}
    assert aside == {f"model.ckpt-{newer}.manifest.json" for newer in range(step + 2, 7, 2)}
    told = [one for one in ledger.read(logdir) if one["event"] == "rollback"]
    assert [(one["checkpoint"], one["step"], one["previous_step"]) for one in told] == [(f"model.ckpt-{step}", step, 6)]


def test_it_is_done_once_and_again_when_it_is_asked_for_anew(engine, logdir):
    assert starts_at(engine, logdir, 2) == 2
    # As after a crash.
    assert starts_at(engine, logdir, 2) == 3
    assert starts_at(engine, logdir, None) == 4
    assert starts_at(engine, logdir, 2) == 2

    assert engine.committed(logdir) == [2, 3]
    assert sorted(one.name for one in (logdir / "aside").iterdir()) == ["1", "2"]


def test_who_only_reads_gets_it_each_time_and_moves_nothing(engine, logdir):
    for _ in range(2):
        nothing = Saving(save_model_secs=0, save_at_end=False)
        assert starts_at(engine, logdir, "middle", count=0, saving=nothing) == 4

    assert engine.committed(logdir) == [2, 4, 6]


@pytest.mark.parametrize("asked", [3, "nothing"])
def test_what_is_not_there_is_an_error_that_names_what_is(engine, logdir, asked):
    with pytest.raises(CheckpointError, match="found the steps 6, 4, 2 and the names middle"):
        starts_at(engine, logdir, asked)

    assert engine.committed(logdir) == [2, 4, 6]


def test_one_that_is_damaged_is_an_error_and_no_other_is_taken(engine, logdir):
    engine.damage(logdir, 4)
    with pytest.raises(CheckpointCorruptError):
        starts_at(engine, logdir, 4)

    assert engine.committed(logdir) == [2, 4, 6]
