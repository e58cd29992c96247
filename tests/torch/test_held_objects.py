"""What a program holds of the objects in its state, such as a parameter group, is still theirs after a restore."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepguard.options import Guarding, Restoring, Saving
from stepguard.torch import Supervisor

X = torch.linspace(-1, 1, 8).reshape(8, 1)


def session(state, logdir, **options):
    saving = Saving(save_model_secs=0, save_at_end=True)
    return Supervisor(state, logdir, saving=saving, save_summaries_secs=0, **options).managed_session()


def train(model, optimizer, x=X):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


class Sharpness(torch.optim.Optimizer):
    """It hands its groups to an optimizer inside, when it is made and when it is loaded, as SAM does."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        self.base.step(closure)

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)
        self.param_groups = self.base.param_groups


class TestOptimizers:
    @pytest.mark.parametrize(
        "restoring", [Restoring(), Restoring(only=("model", "optimizer")), Restoring(hyperparameters="program")]
    )
    @pytest.mark.parametrize("kind", [lambda given: torch.optim.Adam(given, lr=0.1), Sharpness])
    def test_keep_their_groups(self, kind, restoring, tmp_path):
        for _ in range(2):
            model = nn.Linear(1, 1)
            optimizer = kind(model.parameters())
            groups, (group,), state = optimizer.param_groups, optimizer.param_groups, optimizer.state
            with session({"model": model, "optimizer": optimizer}, tmp_path, restoring=restoring) as sess:
                assert optimizer.param_groups is groups
                assert groups[0] is group
                assert optimizer.state is state
                if sess.global_step:
                    assert group["lr"] == 0.01
                for _ in sess.steps(max_steps=1):
                    train(model, optimizer)
                    group["lr"] = 0.01

    def test_keep_a_learning_rate_that_is_a_tensor(self, tmp_path):
        for _ in range(2):
            model, rate = nn.Linear(1, 1), torch.tensor(0.1)
            optimizer = torch.optim.Adam(model.parameters(), lr=rate)
            with session({"model": model, "optimizer": optimizer}, tmp_path) as sess:
                assert optimizer.param_groups[0]["lr"] is rate
                if sess.global_step:
                    assert rate.item() == torch.tensor(0.01).item()
                for _ in sess.steps(max_steps=1):
                    train(model, optimizer)
                    rate.fill_(0.01)

    def test_keep_their_groups_at_a_return_of_the_nan_guard(self, tmp_path):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        (group,), bad = optimizer.param_groups, [3]
        guarding = Guarding(nan_guard="return")
        options = {"save_summaries_secs": 0, "save_model_secs": 0, "save_model_steps": 1, "guarding": guarding}
        sv = Supervisor({"model": model, "optimizer": optimizer}, tmp_path, **options)
        with sv.managed_session() as sess:
            for _ in sess.steps(max_steps=5):
                assert sv._saving.writer.drain(20)
                assert optimizer.param_groups[0] is group
                assert group["lr"] == (0.1 if not sess.global_step else 0.5**sess.global_step)
                is_bad = sess.global_step in bad
                train(model, optimizer, X * (float("nan") if is_bad else 1))
                group["lr"] = 7.0 if is_bad else 0.5 ** (sess.global_step + 1)
                if is_bad:
                    bad.clear()
                sess.summary({"loss": model.weight.sum()})
        assert not bad

    def test_that_share_a_rate_in_the_program_get_the_two_that_were_saved(self, tmp_path):
        for _ in range(2):
            model, rate = nn.Linear(1, 1), torch.tensor(0.1)
            optimizer = torch.optim.Adam([{"params": [one], "lr": rate} for one in model.parameters()])
            with session({"model": model, "optimizer": optimizer}, tmp_path) as sess:
                if sess.global_step:
                    rates = [group["lr"].item() for group in optimizer.param_groups]
                    assert rates == pytest.approx([0.1, 0.01])
                for _ in sess.steps(max_steps=1):
                    optimizer.param_groups[1]["lr"] = torch.tensor(0.01)

    def test_keep_the_types_of_what_is_nested_in_their_state(self, tmp_path):
        for _ in range(2):
            model = nn.Linear(1, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with session({"model": model, "optimizer": optimizer}, tmp_path) as sess:
                if sess.global_step:
                    kept = optimizer.state[model.weight]
                    assert kept["factors"][0].tolist() == [1 / 3]
                    assert kept["factors"][1]["counts"].tolist() == [2**40 + 1]
                for _ in sess.steps(max_steps=1):
                    factors = [torch.tensor([1 / 3], dtype=torch.float64), {"counts": torch.tensor([2**40 + 1])}]
                    optimizer.state[model.weight]["factors"] = factors
