"""Curves and records in TensorBoard's event files, read by TensorBoard's own reader."""

from __future__ import annotations

import os
import sys

import jax.numpy as jnp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from stepguard.jax import Supervisor
from stepguard.steps.event_file import EventFile


def curve(logdir, tag):
    """(step, value) as TensorBoard shows them."""
    accumulator = EventAccumulator(str(logdir))
    accumulator.Reload()
    return [(one.step, one.value) for one in accumulator.Scalars(tag)]


def records(logdir):
    events = [event for path in sorted(logdir.glob("events.*")) for event in EventFileLoader(str(path)).Load()]
    names = {1: "START", 2: "STOP", 3: "CHECKPOINT"}
    return [(names[one.session_log.status], one.step) for one in events if one.HasField("session_log")]


def test_a_run_writes_its_summaries_its_rate_and_its_records(tmp_path):
    with Supervisor(tmp_path, save_summaries_secs=3600).managed_session({"a": jnp.zeros(1)}) as session:
        for step in session.steps(max_steps=3):
            session.state = {"a": session.state["a"] + 1}
            session.summary({"loss": session.state["a"], "rate": 2 * step, "huge": 1e300})

    assert curve(tmp_path, "loss") == [(0, 1.0), (1, 2.0), (2, 3.0)]
    assert curve(tmp_path, "rate") == [(0, 0.0), (1, 2.0), (2, 4.0)]
    assert curve(tmp_path, "huge")[0] == (0, float("inf"))
    assert [step for step, _ in curve(tmp_path, "global_step/sec")] == [3]
    found = records(tmp_path)
    assert found[0] == ("START", 0)
    assert ("CHECKPOINT", 3) in found
    assert found[-1][0] == "STOP"


def test_a_restart_leaves_one_curve(tmp_path):
    for stop in (4, 6):
        log = EventFile(str(tmp_path))
        log.started(stop - 4)
        for step in range(stop - 4, stop):
            log.summary({"loss": float(stop)}, step)
        log.close()

    assert curve(tmp_path, "loss") == [(0, 4.0), (1, 4.0), (2, 6.0), (3, 6.0), (4, 6.0), (5, 6.0)]


def test_after_a_disk_error_the_curve_has_a_gap_and_the_next_checkpoint_opens_a_file(tmp_path, monkeypatch, caplog):
    log, write = EventFile(str(tmp_path)), os.write
    log.started(0)
    log.scalar("loss", 1.0, 0)
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:7]))
    log.scalar("loss", 2.0, 1)
    monkeypatch.undo()
    log.scalar("loss", 3.0, 2)
    log.checkpointed(3, "model.ckpt-3")
    log.scalar("loss", 4.0, 3)
    log.close()

    assert curve(tmp_path, "loss") == [(0, 1.0), (3, 4.0)]
    (warning,) = [one for one in caplog.messages if "gap" in one]
    assert "tried again at the next checkpoint" in warning


@pytest.mark.parametrize(
    ("values", "message"), [(3, "by the names"), ({"a": jnp.zeros(2)}, "shape"), ({"a": "x"}, "'x'")]
)
def test_what_is_no_number_is_refused(tmp_path, values, message):
    with Supervisor(tmp_path).managed_session({"a": jnp.zeros(1)}) as session, pytest.raises(TypeError, match=message):
        session.summary(values)


def test_without_tensorboard_no_summaries_are_written_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with Supervisor(tmp_path).managed_session({"a": jnp.zeros(1)}) as session:
        for _ in session.steps(max_steps=2):
            session.summary({"loss": 1.0})
    assert "no summaries are written" in caplog.text
    assert not list(tmp_path.glob("events.*"))
