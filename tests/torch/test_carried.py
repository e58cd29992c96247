"""An attribute that a step computes from its old value is named at a restart; one that it sets anew is not."""

from __future__ import annotations

import random
import time

import pytest
import torch

from stepguard.options import Saving
from stepguard.torch import Supervisor

X = torch.linspace(-1, 1, 8)[:, None]


class Model(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
        self.average, self.pair, self._hidden, self.window = 1.0, (1.0, 2.0), torch.zeros(1), []
        self.latest_loss, self.calls, self.losses, self.latest, self._mask = None, 0, [], None, None

    def forward(self, x):
        return super().forward(x) * self.note(x)

    def note(self, x):
        return 1.0


class Carries(Model):
    def note(self, x):
        self.average = 0.5 * self.average + x.mean().item()
        return 1.0


class CarriesByAnotherName(Model):
    def note(self, x):
        first, second = self.pair
        if self.training:
            first = first + second
        self.pair = (first, second)
        return first


class CarriesATensor(Model):
    def note(self, x):
        if self._hidden is None:
            self._hidden = torch.zeros(1)
        self._hidden = self._hidden + 1
        return self._hidden


class CarriesAWindow(Model):
    def note(self, x):
        self.window = [*self.window, random.random()][-3:]
        return sum(self.window)


class CarriesWhatItAsksFor(Model):
    def note(self, x):
        self.done = getattr(self, "done", 0) + 1
        return self.done


class CountsAndReads(Model):
    def note(self, x):
        self.calls += 1
        return 1.0 / self.calls


class DecidesLater(Model):
    """Whether it reads what is of this step or of the step before, its code does not say."""

    def note(self, x):
        if self.latest is None or len(self.losses) < 100:
            self.latest = random.random()
        return self.latest


class SetsAnew(Model):
    def note(self, x):
        self.latest_loss = random.random()
        self.latest = x + random.random()
        self.pair = (self.latest_loss, 1.0)
        return self.latest_loss + self.pair[0]


class CountsOnly(Model):
    def note(self, x):
        self.calls += 1
        self.average += x.mean().item()
        self.losses.append(random.random())
        return 1.0


class MakesAMask(Model):
    """As long as the batch, so that it is another one after a short one."""

    def note(self, x):
        if self._mask is None or len(self._mask) != len(x):
            self._mask = torch.ones(len(x), 1)
        return self._mask


class NotesTheTime(Model):
    def note(self, x):
        if self.latest is None or self.calls == 0:
            self.latest = time.time()
        return 1.0


def train(model, logdir, *, steps=3, look=lambda model: None):
    saving = Saving(save_model_secs=0, save_at_end=True)
    with Supervisor({"model": model}, logdir, saving=saving, save_summaries_secs=0).managed_session() as sess:
        for step in sess.steps(max_steps=sess.global_step + steps):
            look(model)
            model(X[: 8 - step % 3]).sum().backward()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Carries, "average"),
        (CarriesByAnotherName, "pair"),
        (CarriesATensor, "_hidden"),
        (CarriesAWindow, "window"),
        (CarriesWhatItAsksFor, "done"),
        (CountsAndReads, "calls"),
        (DecidesLater, "latest"),
    ],
)
def test_what_a_step_takes_over_from_the_step_before_is_named(kind, name, tmp_path, caplog):
    train(kind(), tmp_path)
    assert not caplog.text
    train(kind(), tmp_path)
    assert f"it begins as the program makes it: model.{name}" in caplog.text


@pytest.mark.parametrize("kind", [SetsAnew, CountsOnly, MakesAMask, NotesTheTime])
def test_what_a_step_sets_before_it_reads_it_is_not_named(kind, tmp_path, caplog):
    for _ in range(2):
        train(kind(), tmp_path)
    assert not caplog.text


def test_what_a_step_sets_and_the_loop_decides_by_is_named(tmp_path, caplog):
    class Decided(Model):
        def note(self, x):
            self.latest_of_decided = random.random()
            return 1.0

    def look(model):
        if model.latest_of_decided > 0.5:
            model.weight.data *= 0.5

    for _ in range(2):
        model = Decided()
        model.latest_of_decided = 0.0
        train(model, tmp_path, look=look)
    assert "model.latest_of_decided" in caplog.text


class Trainer:
    """An object of the program's own, which saves a part of what it keeps."""

    def __init__(self):
        self.model, self.averages, self.done, self.rate, self.began = Model(), [torch.zeros(2)], 0, 1.0, None
        self.seen = []

    def state_dict(self):
        return {"model": self.model.state_dict(), "averages": self.averages, "done": self.done, "seen": self.seen}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.averages, self.done, self.seen = state["averages"], state["done"], state["seen"]

    def step(self):
        self.began = self.began or time.time()
        self.averages[0] += 1
        self.seen.append(self.done + len(self.seen))
        self.done += 1
        if self.done > 1:
            self.rate *= 0.5
        self.model.weight.data += self.rate + self.averages[0].mean()


def test_what_an_object_of_the_program_keeps_and_does_not_save_is_named(tmp_path, caplog):
    for _ in range(2):
        trainer = Trainer()
        saving = Saving(save_model_secs=0, save_at_end=True)
        with Supervisor({"trainer": trainer}, tmp_path, saving=saving, save_summaries_secs=0).managed_session() as sess:
            for _ in sess.steps(max_steps=sess.global_step + 3):
                trainer.step()
    assert "it begins as the program makes it: trainer.rate (0.25 there, 0.5 here). If" in caplog.text
