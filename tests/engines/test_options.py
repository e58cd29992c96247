"""Every Supervisor takes its options flat and in groups, and none of them twice."""

from __future__ import annotations

import pytest

from stepguard.options import Saving, Stopping, Watching
from stepguard.watching import ledger


def test_flat_keywords_and_groups_come_together(engine, tmp_path):
    program = engine.program(tmp_path, save_model_secs=0, saving=Saving(save_model_steps=2, save_at_end=False))
    program.train(3)

    assert program.sv.save_model_secs == 0
    assert engine.committed(tmp_path) == [2]


def test_what_the_supervisor_says_of_itself_is_what_was_given_in_a_group(engine):
    sv = engine.program(None, saving=Saving(save_model_secs=7), watching=Watching(save_summaries_secs=8)).sv

    assert (sv.save_model_secs, sv.save_summaries_secs) == (7, 8)


@pytest.mark.parametrize(
    ("given", "both"),
    [
        (
            {"save_model_secs": 600, "saving": Saving(save_model_secs=60)},
            r"as save_model_secs=600, and in saving=Saving\(save_model_secs=60\)",
        ),
        (
            {"save_summaries_secs": 5, "watching": Watching(save_summaries_secs=5)},
            r"as save_summaries_secs=5, and in watching=Watching\(save_summaries_secs=5\)",
        ),
    ],
)
def test_what_is_given_in_both_ways_is_refused_and_nothing_is_made(engine, given, both, tmp_path):
    with pytest.raises(TypeError, match=both):
        engine.program(tmp_path / "run", **given)

    assert list(tmp_path.iterdir()) == []


def test_a_group_in_the_place_of_another_is_named(engine, tmp_path):
    with pytest.raises(TypeError, match=r"saving must be a stepguard\.Saving or None, got Stopping"):
        engine.program(tmp_path / "run", saving=Stopping())

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["s3://bucket/run", "hdfs://node/run", "file:///tmp/run", "s3:/bucket/run"])
def test_a_place_in_another_store_is_refused_by_name_and_no_folder_is_made(engine, place, tmp_path, monkeypatch):
    if engine.name == "tensorflow" and "://" in place:
        pytest.skip("TensorFlow itself writes to such places")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"got '{place}', which is in another store; .* mirror='{place}'"):
        engine.program(place)

    assert list(tmp_path.iterdir()) == []


def test_what_a_start_on_an_empty_disk_restores_is_what_the_mirror_has(engine, tmp_path):
    mirror = str(tmp_path / "mirror")
    engine.program(tmp_path / "run", save_model_secs=0, saving=Saving(save_model_steps=2), mirror=mirror).train(3)
    again = engine.program(tmp_path / "elsewhere", save_model_secs=0, saving=Saving(save_model_steps=2), mirror=mirror)
    again.train(2)

    assert engine.committed(tmp_path / "mirror")[-1] == 5
    assert engine.read(tmp_path / "elsewhere" / "model.ckpt-5") == [5] * 6


def test_each_start_tells_in_the_ledger_what_it_was_given(engine, tmp_path):
    engine.program(tmp_path, save_model_secs=0, saving=Saving(save_model_steps=2)).train(1)
    engine.program(tmp_path, save_model_secs=0, saving=Saving(save_model_steps=3)).train(1)

    told = [event["options"] for event in ledger.read(tmp_path) if event["event"] == "start"]
    assert [one["saving.save_model_secs"] for one in told] == [0, 0]
    assert [one["saving.save_model_steps"] for one in told] == [2, 3]
