"""Curves and records in TensorBoard's event files, read by TensorBoard's own reader."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from training import Training

from stepguard.torch import Supervisor


def curve(logdir, tag):
    """(step, value) as TensorBoard shows them."""
    accumulator = EventAccumulator(str(logdir))
    accumulator.Reload()
    return [(one.step, one.value) for one in accumulator.Scalars(tag)]


def records(logdir):
    events = [event for path in sorted(logdir.glob("events.*")) for event in EventFileLoader(str(path)).Load()]
    names = {1: "START", 2: "STOP", 3: "CHECKPOINT"}
    return [(names[one.session_log.status], one.step) for one in events if one.HasField("session_log")]


def supervisor(logdir, **options):
    return Supervisor({"model": nn.Linear(1, 1)}, logdir, **{"save_model_secs": 3600, **options})


def test_a_run_writes_its_summaries_its_rate_and_its_records(tmp_path):
    with supervisor(tmp_path, save_summaries_secs=3600).managed_session() as session:
        for step in session.steps(max_steps=3):
            session.summary({"loss": torch.tensor(float(step), requires_grad=True), "rate": 2 * step})

    assert curve(tmp_path, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert curve(tmp_path, "rate") == [(0, 0.0), (1, 2.0), (2, 4.0)]
    ((step, rate),) = curve(tmp_path, "global_step/sec")
    assert step == 3
    assert rate > 0
    found = records(tmp_path)
    assert found[0] == ("START", 0)
    assert ("CHECKPOINT", 3) in found
    assert found[-1][0] == "STOP"


def test_a_restart_leaves_one_curve(tmp_path):
    """The first run wrote further than its last checkpoint; those steps are done again."""
    with (
        pytest.raises(ZeroDivisionError),
        supervisor(tmp_path, save_model_secs=0, save_model_steps=4).managed_session() as session,
    ):
        for step in session.steps():
            session.summary({"loss": step})
            if step == 5:
                raise ZeroDivisionError
    with supervisor(tmp_path).managed_session() as session:
        assert session.global_step == 4
        for step in session.steps(max_steps=8):
            session.summary({"loss": 10 * step})

    assert curve(tmp_path, "loss") == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60), (7, 70)]


def test_the_summary_function_is_called_between_steps_and_moves_no_random_state(tmp_path):
    whole = Training(tmp_path / "whole").train(200)
    seen = []

    def look():
        assert not torch.is_grad_enabled()
        counted = int(training.model.state_dict()["1.num_batches_tracked"])
        seen.append(counted)
        return {"drawn": torch.rand(()), "counted": counted}

    training = Training(tmp_path / "summarised", save_summaries_secs=0.005, summaries=look)
    assert training.train(200).outcome() == whole.outcome()
    assert len(seen) > 2
    assert all(step == value for step, value in curve(tmp_path / "summarised", "counted"))


def test_an_error_of_the_summary_function_stops_the_run(tmp_path):
    def fail():
        raise ZeroDivisionError

    sv = supervisor(tmp_path, save_summaries_secs=0.01, summaries=fail)
    with pytest.raises(ZeroDivisionError), sv.managed_session() as session:
        for _ in session.steps():
            pass


def test_the_programs_own_writer_is_used(tmp_path):
    writer = SummaryWriter(str(tmp_path / "curves"))
    sv = supervisor(tmp_path / "run", summary_writer=writer)
    assert sv.summary_writer is writer
    with sv.managed_session() as session:
        for _ in session.steps(max_steps=2):
            sv.summary_computed(session, {"loss": 1.0})
            writer.add_scalar("mine", 1, session.global_step)

    assert [step for step, _ in curve(tmp_path / "curves", "loss")] == [0, 1]
    assert [step for step, _ in curve(tmp_path / "curves", "mine")] == [0, 1]
    assert list((tmp_path / "run").glob("events.*")) == []


def test_opening_the_log_draws_nothing_from_the_program(tmp_path, monkeypatch):
    class Drawing(SummaryWriter):
        """As the import of TensorFlow does, which the first writer of a process brings along."""

        def __init__(self, **options):
            random.random()
            torch.rand(())
            super().__init__(**options)

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Drawing)
    random.seed(1)
    torch.manual_seed(1)
    expected = (random.random(), torch.rand(()))
    model = nn.Linear(1, 1)
    random.seed(1)
    torch.manual_seed(1)
    Supervisor({"model": model}, tmp_path)

    assert (random.random(), torch.rand(())) == expected


@pytest.mark.parametrize("is_used", [False, True])
def test_tensorflow_is_imported_by_a_program_that_uses_it_and_no_other(is_used, tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "tensorflow.py").write_text("from tensorboard.compat.tensorflow_stub import *\n")
    program = f"""
import sys
{"import tensorflow" if is_used else ""}
import torch
from stepguard.torch import Supervisor

sv = Supervisor({{"model": torch.nn.Linear(1, 1)}}, {str(tmp_path / "run")!r})
with sv.managed_session() as sess:
    for step in sess.steps(max_steps=2):
        sess.summary({{"loss": step}})
import tensorboard.compat
print("tensorflow" in sys.modules, tensorboard.compat.tf.__name__)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    stub = "tensorboard.compat.tensorflow_stub"
    assert ended.stdout == f"{is_used} {'tensorflow' if is_used else stub}\n", ended.stderr
    assert [step for step, _ in curve(tmp_path / "run", "loss")] == [0, 1]


def test_a_second_run_of_one_supervisor_opens_the_log_again(tmp_path):
    sv = supervisor(tmp_path)
    for end in (2, 4):
        with sv.managed_session() as session:
            for step in session.steps(max_steps=end):
                session.summary({"loss": step})

    assert [step for step, _ in curve(tmp_path, "loss")] == [0, 1, 2, 3]


NO_NUMBERS = [
    ({"fine": 1, "v": torch.ones(3)}, r"{where}: expected a number for the curve 'v', found a tensor of shape \[3\]"),
    ({"loss": "abc"}, r"{where}: expected a number for the curve 'loss', found str: 'abc'"),
    (torch.tensor(1.0), r"{where}: expected numbers by the names of their curves, found Tensor: tensor\(1\.\)"),
]


@pytest.mark.parametrize(("values", "said"), NO_NUMBERS, ids=["a vector", "a word", "no dictionary"])
def test_what_is_no_number_is_named_with_its_curve(values, said, tmp_path):
    sv = supervisor(tmp_path)
    with sv.managed_session() as session:
        with pytest.raises(TypeError, match=said.format(where="summary")):
            session.summary(values)
        with pytest.raises(TypeError, match=said.format(where="summary_computed")):
            sv.summary_computed(session, values)


@pytest.mark.parametrize(("values", "said"), NO_NUMBERS, ids=["a vector", "a word", "no dictionary"])
def test_what_the_summary_function_returns_and_is_no_number_is_named_with_its_curve(values, said, tmp_path):
    sv = supervisor(tmp_path, save_summaries_secs=0.01, summaries=lambda: values)
    with pytest.raises(TypeError, match=said.format(where="summaries")), sv.managed_session() as session:
        for _ in session.steps():
            pass


def test_summary_computed_says_what_it_needs(tmp_path):
    sv = supervisor(None)
    with sv.managed_session() as session:
        session.summary({"loss": 1})
        with pytest.raises(RuntimeError, match="logdir"):
            sv.summary_computed(session, {"loss": 1})
    sv = supervisor(tmp_path)
    with sv.managed_session() as session, pytest.raises(TypeError, match="by the names"):
        sv.summary_computed(session, 3)


def test_what_was_summarised_before_a_checkpoint_is_on_disk_with_it(tmp_path):
    model = torch.nn.Linear(1, 1)
    sv = Supervisor({"model": model}, tmp_path, save_model_secs=0, save_model_steps=5, save_summaries_secs=0)
    with sv.managed_session() as session:
        for step in session.steps(max_steps=6):
            session.summary({"loss": 1.0 / (step + 1)})
            if step == 5:
                sv._saving.writer.drain(30)
                # As after SIGKILL: nothing of what the writer still holds.
                (path,) = tmp_path.glob("events.out.tfevents.*")
                found = path.read_bytes().count(b"loss")
    assert found >= 5


@pytest.mark.parametrize("way", ["max_steps", "break"])
def test_no_summary_is_computed_after_a_loop(way, tmp_path):
    """The program may be evaluating its model then, and a summary function puts it into another mode."""
    computed, looks = [], []
    sv = supervisor(tmp_path, save_summaries_secs=0.002, summaries=lambda: computed.append(1) or {"x": 1.0})
    summarise = sv._engine.summarise

    def look(session):
        summarise(session)
        looks.append(1)

    sv._engine.summarise = look
    with sv.managed_session() as session:
        for end in (20, 40):
            before = len(computed)
            for _ in session.steps(max_steps=end if way == "max_steps" else None):
                if way == "break" and len(computed) > before:
                    break
            after, looked = len(computed), len(looks)
            deadline = time.monotonic() + 60
            while len(looks) < looked + 3:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            assert len(computed) == after
