"""What a program says of its steps is in their checkpoints, and the best and the named stay."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from programs import EngineUnderTest

from stepguard.options import Saving
from stepguard.store import CheckpointStore
from stepguard.store.marks import Marks

BY_HAND = {"save_model_secs": 0, "save_at_end": False}


def marks(logdir: Path) -> dict[int | None, Marks]:
    """The marks of the committed checkpoints, by step."""
    store = CheckpointStore(logdir)
    found = {one.step: store.read_manifest(one) for one in store.candidates()}
    return {step: manifest.marks for step, manifest in found.items() if manifest is not None}


def keeps(engine: EngineUnderTest) -> dict[str, int]:
    """Only the newest is kept by its number; with TensorFlow the Saver's own five."""
    return {} if engine.name == "tensorflow" else {"max_to_keep": 1}


def test_metrics_are_in_the_checkpoint_of_their_step_whether_it_was_saved_before_or_after(engine, tmp_path):
    program = engine.program(tmp_path, saving=Saving(save_model_secs=0, save_model_steps=2))
    with program.sv.managed_session() as session:
        program.run_steps(session, 2)
        program.wait_until_saved(2, engine, tmp_path)
        program.metrics(session, val_loss=0.5)
        program.run_step(session)
        program.metrics(session, val_loss=0.25, accuracy=0.9)
        program.metrics(session, accuracy=0.8)

    found = marks(tmp_path)
    assert found[2].metrics == {"val_loss": 0.5}
    assert found[3].metrics == {"val_loss": 0.25, "accuracy": 0.8}


def test_the_best_are_saved_when_they_are_measured_and_stay(engine: EngineUnderTest, tmp_path):
    losses = [5.0, 3.0, float("nan"), 4.0, 6.0, 2.0, 3.0]
    program = engine.program(tmp_path, saving=Saving(**BY_HAND, **keeps(engine), keep_best=("val_loss", "min", 2)))
    with program.sv.managed_session() as session:
        for loss in losses:
            program.run_step(session)
            program.metrics(session, val_loss=loss)

    kept = marks(tmp_path)
    best = CheckpointStore(tmp_path).pins.standing
    assert [kept[int(name.rpartition("-")[2])].metrics["val_loss"] for name in best.best] == [2.0, 3.0]
    assert best.best == ("model.ckpt-6", "model.ckpt-2")
    assert engine.saved(tmp_path)[6] == [6] * 6
    if engine.name != "tensorflow":
        # 4 was one of the best until 6 came, and counts by its number now.
        assert engine.committed(tmp_path) == [2, 4, 6]


def test_a_named_checkpoint_is_taken_now_and_outlives_the_others(engine, tmp_path):
    program = engine.program(tmp_path, saving=Saving(save_model_secs=0, save_model_steps=2, **keeps(engine)))
    with program.sv.managed_session() as session:
        program.run_step(session)
        program.save(session, "before-lr-drop")
        program.run_steps(session, 2)
        program.save(session, "after")
        program.save(session)
        program.wait_until_saved(3, engine, tmp_path)
        for step in range(4, 17, 2):
            program.run_steps(session, 1 + (step > 4))
            program.wait_until_saved(step, engine, tmp_path)

    found = marks(tmp_path)
    assert {step: one.names for step, one in found.items() if one.names} == {1: ("before-lr-drop",), 3: ("after",)}
    assert len(found) == (7 if engine.name == "tensorflow" else 3)
    assert engine.saved(tmp_path)[1] == [1] * 6
    assert engine.program(tmp_path).train(1) == 16


def test_the_pinned_outlive_restarts_too(engine, tmp_path):
    saving = Saving(save_model_secs=0, save_model_steps=1, keep_best=("val_loss", "max", 1), **keeps(engine))
    program = engine.program(tmp_path, saving=saving)
    with program.sv.managed_session() as session:
        program.run_step(session)
        program.metrics(session, val_loss=0.5)
        program.save(session, "first")
        program.run_step(session)
        program.metrics(session, val_loss=0.75)
    for _ in range(8):
        engine.program(tmp_path, saving=Saving(save_model_secs=0, save_at_end=True, **keeps(engine))).train(1)

    assert engine.committed(tmp_path)[:2] == [1, 2]
    assert len(engine.committed(tmp_path)) == (7 if engine.name == "tensorflow" else 3)


def test_what_is_no_number_is_refused_by_its_name(engine, tmp_path):
    program = engine.program(tmp_path)
    with program.sv.managed_session() as session:
        for value in ("low", "0.5", None, 10**400, [1.0]):
            with pytest.raises(TypeError, match="'val_loss'"):
                program.metrics(session, val_loss=value)


def test_without_a_logdir_nothing_is_kept_and_nothing_fails(engine, caplog):
    program = engine.program(None)
    with program.sv.managed_session() as session:
        program.run_step(session)
        program.metrics(session, val_loss=0.5)
        program.save(session, "now")

    assert "this run saves nothing" in caplog.text


def test_a_best_step_that_the_disk_refuses_is_tried_again_and_kept(engine, tmp_path):
    program = engine.program(tmp_path, saving=Saving(**BY_HAND, keep_best=("val_loss", "min", 1)))
    refusals = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

    def refuse(*_: object) -> None:
        if refusals:
            raise refusals.pop()

    program.intercept("write", refuse)
    with program.sv.managed_session() as session:
        program.run_step(session)
        program.metrics(session, val_loss=0.5)
        program.wait_until_saved(1, engine, tmp_path)

    assert marks(tmp_path)[1].metrics == {"val_loss": 0.5}
