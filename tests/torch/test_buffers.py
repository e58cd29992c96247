"""Buffers that steps make, or make larger."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from stepguard.errors import CheckpointMismatchError
from stepguard.options import Guarding, Saving
from stepguard.torch import Supervisor, Values

X = torch.linspace(-1, 1, 32)[:, None]


def session(state, logdir, **options):
    saving = Saving(save_model_secs=0, save_model_steps=options.pop("save_model_steps", None), save_at_end=True)
    return Supervisor(state, logdir, saving=saving, save_summaries_secs=0, **options).managed_session()


class Watched(torch.nn.Module):
    """Resizes a buffer, a tensor in an attribute, and one of complex numbers, in their own memory."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(1, 1)
        self.register_buffer("lowest", torch.zeros(1))
        self.register_buffer("phases", torch.zeros(1, dtype=torch.complex64), persistent=False)
        self.seen = torch.zeros(1)

    def forward(self, x):
        if self.lowest.numel() == 1:
            for one in (self.lowest, self.phases, self.seen):
                one.resize_(4).zero_()
        self.seen += 1
        self.lowest.copy_(torch.minimum(self.lowest, x.detach().min()))
        return self.inner(x)

    def _load_from_state_dict(self, state, prefix, *others):
        self.lowest.resize_(state[f"{prefix}lowest"].shape)
        super()._load_from_state_dict(state, prefix, *others)


def test_what_is_read_of_them_leaves_their_memory_resizable(tmp_path):
    data = TensorDataset(X.clone())
    found = []
    for max_steps in (4, 8):
        model, values = Watched(), Values(kept=torch.zeros(2))
        with session({"model": model, "values": values}, tmp_path) as sess:
            values.kept.resize_(2)
            for (x,) in sess.steps(DataLoader(data, batch_size=4), max_steps=max_steps):
                model(x)
        found.append(model.lowest.tolist())
    data.tensors[0].resize_(64, 1)
    assert found == [[-1.0] * 4] * 2


class Registering(torch.nn.Module):
    """Registers a buffer at its first batch, if that is missing, or by a flag of its own."""

    def __init__(self, by_flag):
        super().__init__()
        self.inner = torch.nn.Linear(1, 1)
        self.by_flag, self.is_ready = by_flag, False

    def forward(self, x):
        if not (self.is_ready if self.by_flag else hasattr(self, "seen")):
            self.register_buffer("seen", torch.zeros(1))
            self.is_ready = True
        self.seen += x.detach().sum()
        return self.inner(x) + self.seen


@pytest.mark.parametrize("by_flag", [False, True])
def test_those_that_the_first_batch_registers_are_registered_at_a_restart(by_flag, tmp_path):
    torch.manual_seed(0)
    started = torch.nn.ModuleList([Registering(by_flag)])
    for model, max_steps in [(started, 1), (copy.deepcopy(started), 2), (copy.deepcopy(started), 3)]:
        with session({"model": model}, tmp_path) as sess:
            for step in sess.steps(max_steps=max_steps):
                model[0](X[step])
    assert model[0].seen.item() == pytest.approx(X[:3].sum().item())


def test_those_that_the_run_had_not_registered_before_a_return_are_taken_away(tmp_path):
    model = Registering(by_flag=False)
    with session({"model": model}, tmp_path, guarding=Guarding(nan_guard="return")) as sess:
        for number, _ in enumerate(sess.steps(max_steps=2)):
            if number == 0:
                sess.save()
            else:
                assert not hasattr(model, "seen")
                model(X[0])
            sess.summary({"loss": float("nan") if number == 1 else 0.0})
    assert number == 2
    assert model.seen == X[0]


def test_those_of_a_module_that_the_program_has_no_more_are_refused(tmp_path):
    model = torch.nn.ModuleList([torch.nn.Linear(1, 1), Registering(by_flag=False)])
    with session({"model": model}, tmp_path) as sess:
        for step in sess.steps(max_steps=1):
            model[1](X[step])
    again = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Module()])
    again[1].inner, again[1].seen = torch.nn.Linear(1, 1), 0
    with pytest.raises(CheckpointMismatchError, match=r"the checkpoint holds model\.1\.seen, and the program does not"):
        session({"model": again}, tmp_path).__enter__()
