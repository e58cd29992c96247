"""Modules that the steps change and that are not in the state: a warning names them, and no others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from stepguard.options import Saving
from stepguard.torch import Supervisor

X = torch.linspace(-1, 1, 8)[:, None]
SAID = "the steps change a module"


def session(state, logdir):
    saving = Saving(save_model_secs=0, save_model_steps=2)
    return Supervisor(state, logdir, saving=saving, save_summaries_secs=0).managed_session()


class Centred(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1), persistent=False)

    def forward(self, y):
        self.last = y.detach().sum().reshape(1)
        self.center = 0.9 * self.center + 0.1 * y.detach().mean()
        return (y - self.center).square().mean()


class Trainer:
    """An object of the program, which saves its average, as a copy, or not."""

    def __init__(self):
        self.model = torch.nn.Linear(1, 1)
        self.average = copy.deepcopy(self.model)

    def step(self):
        train(self.model, torch.nn.functional.mse_loss)
        for mine, other in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mine.data.lerp_(other.data, 0.5)

    def state_dict(self):
        return {"model": self.model.state_dict(), "average": copy.deepcopy(self.average.state_dict())}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])


def train(model, loss):
    model.zero_grad()
    y = model(X)
    (loss(y) if isinstance(loss, torch.nn.Module) else loss(y, X)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad


@pytest.mark.parametrize("own_loop", [False, True])
def test_buffers_of_a_loss_are_named_once(own_loop, tmp_path, caplog):
    model, loss = torch.nn.Linear(1, 1), Centred()
    with session({"model": model}, tmp_path / "without") as sess:
        for _ in range(6) if own_loop else sess.steps(max_steps=6):
            if own_loop:
                with sess.step():
                    train(model, loss)
            else:
                train(model, loss)
    assert caplog.text.count(f"{SAID} (loss) that is not in the state: loss.center; a restart begins") == 1
    caplog.clear()
    with session({"model": model, "loss": loss}, tmp_path / "with") as sess:
        for _ in sess.steps(max_steps=6):
            train(model, loss)
    assert SAID not in caplog.text


def test_an_average_is_named_also_in_an_object_of_the_program(tmp_path, caplog):
    trainer, model = Trainer(), torch.nn.Linear(1, 1)
    swa = AveragedModel(model)
    with session({"model": model, "trained": trainer.model}, tmp_path) as sess:
        for _ in sess.steps(max_steps=6):
            trainer.step()
            train(model, torch.nn.functional.mse_loss)
            swa.update_parameters(model)
    assert f"{SAID} (trainer.average)" in caplog.text
    assert f"{SAID} (swa)" in caplog.text
    assert caplog.text.count(SAID) == 2


def test_what_an_object_of_the_state_saves_or_no_step_changes_is_not_named(tmp_path, caplog):
    trainer, model = Trainer(), torch.nn.Linear(1, 1)
    wrapped, teacher, evaluated = torch.nn.Sequential(model), copy.deepcopy(model), copy.deepcopy(model)
    with session({"model": model, "trainer": trainer}, tmp_path) as sess:
        for _ in sess.epochs(3):
            for _ in sess.steps(max_steps=sess.global_step + 3):
                trainer.step()
                train(wrapped, torch.nn.functional.mse_loss)
                teacher(X)
            evaluated.load_state_dict(model.state_dict())
    assert SAID not in caplog.text
