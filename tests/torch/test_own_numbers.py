"""Numbers in the states of the program's own schedules, averages and values: a user may have changed them."""

from __future__ import annotations

import logging
import time

import torch

from stepguard.options import Restoring
from stepguard.torch import Supervisor, Values


def train(state, logdir, until, **options):
    sv = Supervisor(state, logdir, save_model_secs=0, save_model_steps=until, **options)
    with sv.managed_session() as session:
        for _ in session.steps(max_steps=until):
            if "scheduler" in state:
                state["scheduler"].step()


def warnings_in(caplog):
    return "\n".join(one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING)


class Warmup:
    """A schedule of the program's own, whose number of steps and rate its state has."""

    def __init__(self, optimizer, steps, peak):
        self.optimizer, self.steps, self.peak, self.done, self.began = optimizer, steps, peak, 0, time.time()

    def step(self):
        self.done += 1
        self.optimizer.param_groups[0]["lr"] = self.peak * min(1.0, self.done / self.steps)

    def state_dict(self):
        kept = {"steps": self.steps, "shape": {"peak": self.peak, "kind": "linear"}, "rates": [None, float("nan")]}
        return {**kept, "done": self.done, "began": self.began, "average": torch.full((1,), float(self.done))}

    def load_state_dict(self, state):
        self.steps, self.peak, self.done = state["steps"], state["shape"]["peak"], state["done"]


class Stubborn(Warmup):
    """It leaves its settings as the program has made them."""

    def load_state_dict(self, state):
        self.done = state["done"]


class TestANumberInAnObjectOfTheProgramsOwn:
    def train(self, logdir, until, steps, peak, kind=Warmup, **options):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
        state = {"scheduler": kind(optimizer, steps, peak)}
        train(state, logdir, until, **options)
        return state["scheduler"]

    def test_that_only_the_training_has_moved_is_not_named(self, tmp_path, caplog):
        self.train(tmp_path, 2, 4, 0.1)
        self.train(tmp_path, 3, 4, 0.1)
        assert warnings_in(caplog) == ""

    def test_is_told_with_both_values_and_the_checkpoint_wins(self, tmp_path, caplog):
        self.train(tmp_path, 2, 4, 0.1)
        again = self.train(tmp_path, 3, 40, 0.2)
        assert (again.steps, again.peak) == (4, 0.1)
        assert "scheduler.steps of Warmup (40 in the program, 4 in the checkpoint)" in warnings_in(caplog)
        assert "scheduler.shape.peak of Warmup (0.2 in the program, 0.1 in the checkpoint)" in warnings_in(caplog)

    def test_is_taken_from_the_program_if_that_is_asked_for(self, tmp_path, caplog):
        self.train(tmp_path, 2, 4, 0.1)
        again = self.train(tmp_path, 3, 40, 0.1, restoring=Restoring(hyperparameters="program"))
        assert (again.steps, again.done) == (40, 3)
        assert "those of the program are used" in warnings_in(caplog)

    def test_that_the_object_does_not_load_is_said_to_be_the_programs(self, tmp_path, caplog):
        self.train(tmp_path, 2, 4, 0.1, Stubborn)
        again = self.train(tmp_path, 3, 40, 0.1, Stubborn)
        assert again.steps == 40
        assert "those of the program are used" in warnings_in(caplog)

    def test_that_the_checkpoint_has_too_by_now_is_not_named(self, tmp_path, caplog):
        """As in a notebook, where the objects of an earlier run go on."""
        values = Values(done=0, lowest=9.0)
        for until in (2, 4):
            with Supervisor(
                {"values": values}, tmp_path, save_model_secs=0, save_model_steps=until
            ).managed_session() as session:
                for _ in session.steps(max_steps=until):
                    values.done += 1
        assert values.done == 4
        assert warnings_in(caplog) == ""

    def test_may_be_one_of_values(self, tmp_path, caplog):
        for patience in (3, 5):
            values = Values(patience=patience, started=str(time.time()), seen=0)
            train({"values": values}, tmp_path, patience)
        assert values.patience == 3
        assert "values.patience of Values (5 in the program, 3 in the checkpoint)" in warnings_in(caplog)
        assert "started" not in warnings_in(caplog)
