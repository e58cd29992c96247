"""Optimizers of other forms than PyTorch's own, inside objects of the program, or outside of its state."""

from __future__ import annotations

import collections
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from stepguard.options import Restoring, Saving
from stepguard.torch import Supervisor

X = torch.linspace(-1, 1, 8).reshape(8, 1)


def session(state, logdir, **options):
    saving = Saving(save_model_secs=0, save_at_end=True)
    return Supervisor(state, logdir, saving=saving, save_summaries_secs=0, **options).managed_session()


def train(model, optimizer):
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def adam(model, rate=0.1):
    return torch.optim.Adam(model.parameters(), lr=rate)


class Around(torch.optim.Optimizer):
    """Leaves out the constructor of its base."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.defaults = inner, inner.param_groups, inner.defaults
        self.state = collections.defaultdict(dict)

    def step(self, closure=None):
        self.inner.step(closure)

    def zero_grad(self):
        self.inner.zero_grad()

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


class AroundWithHooks(Around):
    """Makes those of its base's attributes that a schedule asks for."""

    def __init__(self, inner):
        super().__init__(inner)
        self._optimizer_step_pre_hooks = collections.OrderedDict()
        self._optimizer_step_post_hooks = collections.OrderedDict()


class Several(torch.optim.Optimizer):
    def __init__(self, *optimizers):
        self.optimizers = optimizers
        super().__init__([one for optimizer in optimizers for one in optimizer.param_groups[0]["params"]], {})

    def step(self, closure=None):
        for one in self.optimizers:
            one.step(closure)

    def state_dict(self):
        return [one.state_dict() for one in self.optimizers]

    def load_state_dict(self, state):
        for one, saved in zip(self.optimizers, state, strict=True):
            one.load_state_dict(saved)


class Sharpness(torch.optim.Optimizer):
    """Saves the groups, and not what the optimizer inside has for its parameters."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        self.base.step(closure)

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.base.param_groups = self.param_groups


class Trainer:
    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def weights(model):
    return [parameter.tolist() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "make",
    [
        lambda model: Around(adam(model)),
        lambda model: AroundWithHooks(adam(model)),
        lambda model: Several(adam(model[0]), adam(model[1])),
        lambda model: torch.optim.Adam(model.parameters(), lr=np.float64(0.1)),
    ],
    ids=[
        "without the constructor of its base",
        "with some of its hooks",
        "with a list as its state",
        "with a number of NumPy's",
    ],
)
def test_an_optimizer_of_another_form_goes_on(make, tmp_path, caplog):
    def run(logdir, *ends):
        for end in ends:
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
            optimizer = make(model)
            with session({"model": model, "optimizer": optimizer}, logdir) as sess:
                for _ in sess.steps(max_steps=end):
                    train(model, optimizer)
        return weights(model)

    assert run(tmp_path / "stopped", 3, 6) == run(tmp_path / "whole", 6)
    assert not caplog.text


class TestAnOptimizerInsideAnother:
    def test_that_is_saved_and_scheduled_through_their_groups_is_not_named(self, tmp_path, caplog):
        for end in (3, 6):
            model = nn.Linear(1, 1)
            optimizer = Sharpness(model.parameters())
            schedule = StepLR(optimizer, 2)
            state = {"model": model, "optimizer": optimizer, "base": optimizer.base, "schedule": schedule}
            with session(state, tmp_path) as sess:
                for _ in sess.steps(max_steps=end):
                    train(model, optimizer)
                    schedule.step()
        assert not caplog.text

    def test_whose_moments_are_not_saved_is_named(self, tmp_path, caplog):
        model = nn.Linear(1, 1)
        optimizer = Sharpness(model.parameters())
        with session({"model": model, "optimizer": optimizer}, tmp_path) as sess:
            for _ in sess.steps(max_steps=2):
                train(model, optimizer)
        assert "an optimizer (SGD) trains in the steps, and it is not in the state" in caplog.text

    def test_of_a_schedule_in_the_state_is_named(self, tmp_path, caplog):
        model = nn.Linear(1, 1)
        optimizer = adam(model)
        with session({"model": model, "schedule": StepLR(optimizer, 2)}, tmp_path) as sess:
            for _ in sess.steps(max_steps=2):
                train(model, optimizer)
        assert "an optimizer (Adam) trains in the steps, and it is not in the state" in caplog.text


class TestAnOptimizerOfATrainer:
    @pytest.mark.parametrize("winner", ["program", "checkpoint"])
    def test_has_its_rate_compared(self, winner, tmp_path, caplog):
        for rate in (0.1, 0.5):
            model = nn.Linear(1, 1)
            trainer = Trainer(model, adam(model, rate))
            restoring = Restoring(hyperparameters=winner)
            with session({"trainer": trainer}, tmp_path, restoring=restoring) as sess:
                for _ in sess.steps(max_steps=2):
                    train(model, trainer.optimizer)
        assert "trainer.optimizer.param_groups[0].lr of Trainer (0.5 in the program, 0.1 in the" in caplog.text
        assert trainer.optimizer.param_groups[0]["lr"] == (0.5 if winner == "program" else 0.1)

    def test_has_its_gradients_saved(self, tmp_path):
        for end in (2, 3):
            model = nn.Linear(1, 1)
            trainer = Trainer(model, adam(model))
            with session({"trainer": trainer}, tmp_path) as sess:
                if end == 3:
                    assert model.weight.grad.tolist() == [[2.0]]
                for _ in sess.steps(max_steps=end):
                    model.weight.sum().backward()


class Deep(Trainer):
    """It has its optimizer far inside."""

    def __init__(self, model, optimizer):
        self.model, self.parts = model, [{"engine": SimpleNamespace(part=SimpleNamespace(optimizer=optimizer))}]

    @property
    def optimizer(self):
        return self.parts[0]["engine"].part.optimizer


class InAModule(nn.Module):
    """It saves its optimizer as the extra state of a module."""

    def __init__(self, model, optimizer):
        super().__init__()
        self.model, self.optimizer = model, optimizer

    def get_extra_state(self):
        return self.optimizer.state_dict()

    def set_extra_state(self, state):
        self.optimizer.load_state_dict(state)


def in_a_closure(model, optimizer):
    class Both:
        def state_dict(self):
            # Copies, as a program makes them that moves its state to the CPU.
            return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

        def load_state_dict(self, state):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])

    return Both()


class TestAnOptimizerThatIsSavedFromOutOfSight:
    @pytest.mark.parametrize("rule", [adam, lambda model: torch.optim.SGD(model.parameters(), lr=0.01)])
    @pytest.mark.parametrize("make", [Deep, InAModule, in_a_closure])
    def test_is_not_named(self, make, rule, tmp_path, caplog):
        for end in (3, 6):
            model = nn.Linear(1, 1)
            optimizer = rule(model)
            schedule = StepLR(optimizer, 2)
            with session({"both": make(model, optimizer), "schedule": schedule}, tmp_path) as sess:
                for _ in sess.steps(max_steps=end):
                    train(model, optimizer)
                    schedule.step()
        assert not caplog.text


class TestAnOptimizerOutsideOfTheState:
    def test_has_its_gradients_saved_between_its_steps(self, tmp_path, caplog):
        for end in (6, 7):
            model = nn.Linear(1, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with session({"model": model}, tmp_path) as sess:
                if end == 7:
                    assert model.weight.grad.tolist() == [[2.0]]
                for step in sess.steps(max_steps=end):
                    model.weight.sum().backward()
                    if step % 2 == 1 and step < 5:
                        optimizer.step()
                        optimizer.zero_grad()
        assert not caplog.text

    def test_has_no_gradients_saved_that_it_has_applied(self, tmp_path):
        for end in (3, 4):
            model = nn.Linear(1, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with session({"model": model}, tmp_path) as sess:
                assert model.weight.grad is None
                for _ in sess.steps(max_steps=end):
                    train(model, optimizer)

    def test_whose_rate_was_lowered_is_named_at_the_restart(self, tmp_path, caplog):
        for end in (3, 6):
            model = nn.Linear(1, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with session({"model": model}, tmp_path) as sess:
                assert not caplog.text
                for _ in sess.steps(max_steps=end):
                    train(model, optimizer)
                    optimizer.param_groups[0]["lr"] *= 0.5
        assert caplog.text.count("SGD.lr (0.0125 there, 0.1 here)") == 1

    def test_whose_rate_the_loop_sets_from_the_step_is_not_named(self, tmp_path, caplog):
        for end in (3, 6, 9):
            model = nn.Linear(1, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with session({"model": model}, tmp_path) as sess:
                for step in sess.steps(max_steps=end):
                    optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
                    train(model, optimizer)
        assert not caplog.text


def test_gradients_that_a_program_applies_by_hand_are_saved(tmp_path):
    for end in (2, 3):
        model = nn.Linear(1, 1)
        with session({"model": model}, tmp_path) as sess:
            if end == 3:
                assert model.weight.grad.tolist() == [[2.0]]
            for _ in sess.steps(max_steps=end):
                model.weight.sum().backward()


def test_gradients_that_no_optimizer_of_the_program_applies_are_not_saved(tmp_path):
    for end in (2, 3):
        model, beside = nn.Linear(1, 1), nn.Linear(1, 1)
        optimizer = adam(model)
        with session({"model": model, "optimizer": optimizer, "beside": beside}, tmp_path) as sess:
            assert beside.weight.grad is None
            for _ in sess.steps(max_steps=end):
                beside.weight.sum().backward()
                train(model, optimizer)
