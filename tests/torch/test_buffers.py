"""Buffers that steps make, or make larger."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, TensorDataset

from stepguard.options import Saving
from stepguard.torch import Supervisor, Values

X = torch.linspace(-1, 1, 32)[:, None]


def session(state, logdir):
    saving = Saving(save_model_secs=0, save_at_end=True)
    return Supervisor(state, logdir, saving=saving, save_summaries_secs=0).managed_session()


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
