"""Loops of the program's own around `sess.step()`: the work between two steps counts once, wherever a run was left."""

from __future__ import annotations

import random
import signal
import threading

import pytest
import torch
from loop_programs import SOON_SECS, Killed
from torch import nn

from stepguard.options import Saving
from stepguard.torch import Supervisor, Values

STEPS = 7
INPUTS = torch.linspace(-1, 1, 32)[:, None]


class Stream:
    """Data with a state of its own."""

    def __init__(self):
        self.at = 0

    def batch(self):
        self.at += 4
        return INPUTS[torch.arange(self.at, self.at + 4) % len(INPUTS)]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Program:
    """A process. ``left`` is how and in which step it is left, or ``None``."""

    def __init__(self, logdir, left=None):
        torch.manual_seed(1)
        random.seed(1)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.average = nn.Linear(8, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.9)
        self.noise, self.stream, self.values = torch.Generator().manual_seed(2), Stream(), Values(seen=0)
        self.how, self.at = left or ("", -1)
        parts = ("model", "average", "optimizer", "scheduler", "noise", "stream", "values")
        every = 1 if self.how == "killed" else None
        saving = Saving(save_model_secs=0, save_model_steps=every, save_at_end=True)
        self.sv = Supervisor(
            {name: getattr(self, name) for name in parts}, logdir, save_summaries_secs=0, saving=saving
        )
        self.batches = {}

    def train(self, step, x):
        self.batches[step] = x.flatten().tolist(), self.values.seen
        self.optimizer.zero_grad()
        (self.model(x) - x).square().mean().backward()
        self.optimizer.step()
        if self.how in ("killed", "timer") and step > self.at:
            assert self.sv._saving.writer.drain(SOON_SECS)
            raise Killed
        if step == self.at and self.how == "stopped":
            # As after SIGTERM.
            self.sv._session.boundary.stop(lambda: False)
            self.sv.request_stop()
        elif step == self.at and self.how == "interrupted":
            signal.raise_signal(signal.SIGINT)

    def between(self, step):
        """What the program passes after its block, before anything that it does there."""
        assert self.sv._saving.writer.drain(SOON_SECS)
        if step == self.at and self.how == "timer":
            saving = threading.Thread(target=self.sv._saving.checkpointer)
            saving.start()
            saving.join(SOON_SECS)

    def step(self, sess, x=None):
        with sess.step() as step:
            self.train(step, INPUTS[torch.randint(32, (4,))] if x is None else x)
        self.between(step)

    def outcome(self):
        optimizer = [one["momentum_buffer"].tolist() for one in self.optimizer.state.values()]
        weights = [one.tolist() for module in (self.model, self.average) for one in module.parameters()]
        rest = self.values.state_dict(), self.stream.at, self.optimizer.param_groups[0]["lr"], self.scheduler.last_epoch
        drawn = torch.rand(1).item(), random.random(), torch.rand(1, generator=self.noise).item()
        return weights, optimizer, rest, drawn


def schedule_after_each_step(run, sess):
    while sess.global_step < STEPS:
        run.step(sess)
        run.scheduler.step()


def schedule_after_each_third_step(run, sess):
    for step in range(sess.global_step, STEPS):
        run.step(sess)
        if step % 3 == 0:
            run.scheduler.step()


def average_and_counts_after_each_step(run, sess):
    while sess.global_step < STEPS:
        run.step(sess)
        with torch.no_grad():
            run.average.weight.lerp_(run.model[2].weight, 0.1)
        run.values.seen += 4


def rate_changed_before_each_step(run, sess):
    while sess.global_step < STEPS:
        run.optimizer.param_groups[0]["lr"] *= 0.9
        run.step(sess)


def rate_set_before_each_step(run, sess):
    while sess.global_step < STEPS:
        run.optimizer.param_groups[0]["lr"] = 0.1 / (1 + sess.global_step)
        run.step(sess)


def work_before_the_loop(run, sess):
    run.optimizer.param_groups[0]["lr"] *= 0.5
    nn.init.zeros_(run.model[2].weight)
    order = torch.randperm(32)
    while sess.global_step < STEPS:
        run.step(sess, INPUTS[order[torch.randint(32, (4,))]] if sess.global_step < 0 else None)
        run.values.seen += int(order[sess.global_step])


def draws_before_the_loop_and_before_each_step(run, sess):
    order = torch.randperm(32)
    while sess.global_step < STEPS:
        rows = order[torch.randint(32, (4,))]
        run.step(sess, INPUTS[rows] * random.random())


def draws_after_each_second_step(run, sess):
    while sess.global_step < STEPS:
        run.step(sess)
        if sess.global_step % 2 == 0:
            torch.rand(3)


def draws_from_a_generator_of_the_state(run, sess):
    while sess.global_step < STEPS:
        run.step(sess, INPUTS[torch.randint(32, (4,), generator=run.noise)])


def batches_of_a_stream_of_the_state(run, sess):
    while sess.global_step < STEPS:
        run.step(sess, run.stream.batch())


def work_between_two_loops(run, sess):
    while sess.global_step < 3:
        run.step(sess)
    run.optimizer.param_groups[0]["lr"] *= 0.1
    while sess.global_step < STEPS:
        run.step(sess)


def work_in_finally(run, sess):
    while sess.global_step < STEPS:
        try:
            run.step(sess)
        finally:
            run.values.seen += 1


def weights_swapped_for_an_evaluation(run, sess):
    while sess.global_step < STEPS:
        with sess.step() as step:
            run.train(step, INPUTS[:4])
        kept = run.model[0].weight.detach().clone()
        run.model[0].weight.data.fill_(-1000.0)
        run.between(step)
        run.model[0].weight.data.copy_(kept)


def work_at_the_end_of_an_epoch(run, sess):
    for epoch in sess.epochs(3):
        run.values.seen += 1
        while sess.global_step < 3 * (epoch + 1):
            run.step(sess)
        run.scheduler.step()


PROGRAMS = [
    schedule_after_each_step,
    schedule_after_each_third_step,
    average_and_counts_after_each_step,
    rate_changed_before_each_step,
    rate_set_before_each_step,
    work_before_the_loop,
    draws_before_the_loop_and_before_each_step,
    draws_after_each_second_step,
    draws_from_a_generator_of_the_state,
    batches_of_a_stream_of_the_state,
    work_between_two_loops,
    work_in_finally,
    weights_swapped_for_an_evaluation,
    work_at_the_end_of_an_epoch,
]


def runs(program, logdir, left=None):
    """Run ``program`` to where it is left; return the process."""
    run = Program(logdir, left)
    try:
        with run.sv.managed_session() as sess:
            program(run, sess)
    except (Killed, KeyboardInterrupt):
        assert run.how in ("killed", "timer", "interrupted")
    # At once: the next draws are part of it.
    run.result = run.outcome()
    return run


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("how", ["killed", "stopped", "interrupted", "timer"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: one.__name__)
def test_the_work_between_two_steps_counts_once(program, how, at, tmp_path, caplog):
    whole = runs(program, tmp_path / "whole")
    first = runs(program, tmp_path / "left", (how, at))
    caplog.clear()
    second = Program(tmp_path / "left")
    assert second.sv.newest_step() == at + 1
    with second.sv.managed_session() as sess:
        program(second, sess)

    kept = {step: batch for step, batch in first.batches.items() if step <= at}
    assert {**kept, **second.batches} == whole.batches
    assert second.outcome() == whole.result
    assert not [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]


def order_of_an_epoch(run, sess):
    for epoch in range(sess.global_step // 3, 3):
        order = torch.randperm(32)
        for number in range(sess.global_step - 3 * epoch, 3):
            run.step(sess, INPUTS[order[4 * number :][:4]])


def order_between_two_loops(run, sess):
    while sess.global_step < 2:
        run.step(sess)
    order = torch.randperm(32)
    while sess.global_step < STEPS:
        run.step(sess, INPUTS[order[:4]])


def draws_before_and_after_each_step(run, sess):
    while sess.global_step < STEPS:
        rows = torch.randint(32, (4,))
        run.step(sess, INPUTS[rows])
        torch.rand(3)


@pytest.mark.parametrize(
    "program",
    [order_of_an_epoch, order_between_two_loops, draws_before_and_after_each_step],
    ids=lambda one: one.__name__,
)
def test_other_draws_before_the_first_step_than_those_of_the_interrupted_run_are_told_of(program, tmp_path, caplog):
    runs(program, tmp_path, ("stopped", 4))
    assert "draws random numbers" not in caplog.text
    runs(program, tmp_path)
    assert "draws random numbers between the steps of its own loop, and those" in caplog.text


def test_what_is_taken_from_an_object_that_other_work_changes_too_is_told_of(tmp_path, caplog):
    def program(run, sess):
        while sess.global_step < STEPS:
            run.values.seen += 1
            run.step(sess, INPUTS[:4] * run.values.seen)
            run.values.seen *= 2

    runs(program, tmp_path, ("stopped", 4))
    caplog.clear()
    runs(program, tmp_path)
    assert "takes something from values between two steps of its own loop" in caplog.text


def test_a_rate_that_is_set_before_the_loop_is_undone_and_named(tmp_path, caplog):
    def program(run, sess):
        while sess.global_step < STEPS:
            run.step(sess)

    def with_another_rate(run, sess):
        run.optimizer.param_groups[0]["lr"] = 0.01
        program(run, sess)
        assert run.optimizer.param_groups[0]["lr"] == 0.1

    runs(program, tmp_path, ("stopped", 2))
    runs(with_another_rate, tmp_path)
    assert "optimizer.lr is 0.1 again, not 0.01" in caplog.text


def test_ctrl_c_between_two_steps_waits_for_the_next_and_a_second_one_is_told_of(tmp_path, caplog):
    run = Program(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.sv.managed_session() as sess:
        for _ in range(3):
            run.step(sess)
            signal.raise_signal(signal.SIGINT)
            run.scheduler.step()
    assert "Ctrl-C: stopping before the next step" in caplog.text
    assert run.scheduler.last_epoch == 1

    run = Program(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.sv.managed_session() as sess:
        run.step(sess)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert "made to end at once" not in caplog.text
    run = Program(tmp_path)
    with run.sv.managed_session() as sess:
        run.step(sess)
    assert caplog.text.count("was made to end at once, between two steps of its own loop") == 1
