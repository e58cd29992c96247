"""What decides the next step and is in no state_dict: it is put back, or a warning names it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from stepguard.options import Saving
from stepguard.torch import Supervisor, Values

X = torch.linspace(-1, 1, 32)[:, None]


def session(state, logdir):
    saving = Saving(save_model_secs=0, save_at_end=True)
    return Supervisor(state, logdir, saving=saving, save_summaries_secs=0).managed_session()


def loader():
    return DataLoader(TensorDataset(X), batch_size=4)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


class Tempered(torch.nn.Module):
    def __init__(self, temperature=1.0):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
        self.temperature = temperature
        self.hidden = None
        self.register_buffer("mean", torch.zeros(1), persistent=False)

    def forward(self, x):
        return self.inner(x) / self.temperature


class TestAttributesOfModules:
    def test_that_the_run_has_changed_are_put_back(self, tmp_path, caplog):
        model = Tempered()
        with session({"model": model}, tmp_path) as sess:
            for _ in sess.steps(max_steps=2):
                model.temperature *= 0.5
                model.inner[1].eval()
                model.inner[2].p = 0.1
        again = Tempered()
        with session({"model": again}, tmp_path):
            assert again.temperature == 0.25
            assert again.inner[2].p == 0.1
            assert [one.training for one in again.inner] == [True, False, True]
        assert not caplog.text

    def test_that_the_program_builds_otherwise_stay_and_are_named(self, tmp_path, caplog):
        model = Tempered()
        with session({"model": model}, tmp_path) as sess:
            for _ in sess.steps(max_steps=2):
                model.temperature *= 0.5
        again = Tempered(temperature=3.0)
        with session({"model": again}, tmp_path):
            assert again.temperature == 3.0
        assert "model.temperature (3.0 in the program, 0.25 in the checkpoint)" in caplog.text

    def test_that_are_tensors_are_named(self, tmp_path, caplog):
        model = Tempered()
        with session({"model": model}, tmp_path) as sess:
            for _ in sess.steps(max_steps=2):
                model.hidden = torch.ones(2)
                model.mean.add_(1)
        with session({"model": Tempered()}, tmp_path):
            pass
        assert "in no state_dict, and they begin as the program makes them: model.hidden, model.mean." in caplog.text

    def test_that_are_results_of_a_step_are_not(self, tmp_path, caplog):
        model = Tempered()
        with session({"model": model}, tmp_path) as sess:
            for _ in sess.steps(max_steps=2):
                model.hidden = model(X)
        with session({"model": Tempered()}, tmp_path):
            pass
        assert not caplog.text


class TestWhatTrainsAndIsNotInTheState:
    def run(self, tmp_path, make, *, names=()):
        torch.manual_seed(1)
        model = torch.nn.Linear(1, 1)
        optimizer = adam(model)
        step, others = make(model, optimizer)
        state = {"model": model, "optimizer": optimizer, **{name: others[name] for name in names}}
        with session(state, tmp_path) as sess:
            for (x,) in sess.steps(loader(), max_steps=4):
                step(x)

    def second(self, model, optimizer):
        other = adam(model)

        def step(x):
            train(model, optimizer, x)
            train(model, other, x)

        return step, {"other": other}

    def schedule(self, model, optimizer):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)

        def step(x):
            train(model, optimizer, x)
            schedule.step()

        return step, {"other": schedule}

    def scaler(self, model, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

        def step(x):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

        return step, {"other": scaler}

    @pytest.mark.parametrize(
        ("kind", "said"),
        [
            ("second", "an optimizer (Adam) trains in the steps, and it is not in the state"),
            ("schedule", "optimizer has a learning rate scheduler, and that is not in the state"),
            ("scaler", "optimizer is stepped by a GradScaler, and that is not in the state"),
        ],
    )
    def test_is_named_once(self, kind, said, tmp_path, caplog):
        self.run(tmp_path / "without", getattr(self, kind))
        assert caplog.text.count(said) == 1
        caplog.clear()
        self.run(tmp_path / "with", getattr(self, kind), names=["other"])
        assert not caplog.text

    def test_may_be_an_optimizer_for_one_step(self, tmp_path, caplog):
        def inner(model, optimizer):
            def step(x):
                train(model, optimizer, x)
                fast = torch.nn.Linear(1, 1)
                train(fast, adam(fast), x)

            return step, {}

        self.run(tmp_path, inner)
        assert not caplog.text


MODULE_RANDOM = random.Random(3)


class TestGeneratorsOfTheProgram:
    @pytest.mark.parametrize("kind", [np.random.default_rng, random.Random, lambda _: torch.Generator().manual_seed(1)])
    def test_that_the_steps_draw_from_are_named_at_the_restart(self, kind, tmp_path, caplog):
        for _ in range(2):
            source = kind(1)
            with session({"values": Values(sum=0)}, tmp_path) as sess:
                assert not sess.global_step or "they begin anew: source." in caplog.text
                for _ in sess.steps(max_steps=sess.global_step + 2):
                    torch.rand((), generator=source) if isinstance(source, torch.Generator) else source.random()

    def test_may_be_of_the_module(self, tmp_path, caplog):
        for _ in range(2):
            with session({"values": Values(sum=0)}, tmp_path) as sess:
                for _ in sess.steps(max_steps=sess.global_step + 2):
                    MODULE_RANDOM.random()
        assert "they begin anew: MODULE_RANDOM." in caplog.text

    def test_that_are_saved_are_not(self, tmp_path, caplog):
        for _ in range(2):
            source, of_order = random.Random(1), torch.Generator().manual_seed(1)
            data = DataLoader(TensorDataset(X), batch_size=4, shuffle=True, generator=of_order)
            with session({"source": source, "values": Values(sum=0)}, tmp_path) as sess:
                for _ in sess.steps(data, max_steps=sess.global_step + 2):
                    source.random()
        assert not caplog.text


class TestACountAroundTheSteps:
    @pytest.mark.parametrize(
        ("around", "said"),
        [
            (enumerate, "enumerate() around steps()"),
            (lambda steps: zip(range(100), steps, strict=False), "zip() around steps()"),
        ],
    )
    def test_that_begins_anew_is_named_at_the_restart(self, around, said, tmp_path, caplog):
        for end in (3, 5):
            with session({"values": Values(sum=0)}, tmp_path) as sess:
                for _ in around(sess.steps(loader(), max_steps=end)):
                    pass
            assert (said in caplog.text) == (end == 5)

    def test_that_begins_at_the_step_is_right(self, tmp_path, caplog):
        for end in (3, 5):
            with session({"values": Values(sum=0)}, tmp_path) as sess:
                for _ in enumerate(sess.steps(loader(), max_steps=end), sess.global_step):
                    pass
        assert not caplog.text


def test_containers_in_values_stay_the_same_objects(tmp_path):
    averages, seen = {"weight": torch.zeros(1)}, [1]
    values = Values(averages=averages, seen=seen)
    with session({"values": values}, tmp_path) as sess:
        for _ in sess.steps(max_steps=1):
            averages["weight"] += 2
            seen.append(2)
    averages, seen = {"weight": torch.zeros(1)}, [1]
    values = Values(averages=averages, seen=seen)
    with session({"values": values}, tmp_path):
        assert values.averages is averages
        assert averages["weight"].tolist() == [2]
        assert values.seen is seen
        assert seen == [1, 2]
