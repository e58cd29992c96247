"""What modules compute from parameters in forward(): the end of an epoch reads it in a restart without a forward()."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from stepguard.options import Saving
from stepguard.torch import Supervisor

X = torch.linspace(-1, 1, 16).reshape(8, 2)


class Dropped(torch.nn.Linear):
    """Sets a weight that it makes from a raw one, as a dropout of weights does."""

    def __init__(self):
        super().__init__(2, 3)
        self.weight_raw = self._parameters.pop("weight")
        self.weight = self.weight_raw.detach()

    def forward(self, x):
        self.weight = torch.nn.functional.dropout(self.weight_raw, 0.5)
        return super().forward(x)


def normed():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return torch.nn.utils.weight_norm(torch.nn.Linear(2, 3))


KINDS = {
    "weight_norm": normed,
    "spectral_norm": lambda: torch.nn.utils.spectral_norm(torch.nn.Linear(2, 3)),
    "pruned": lambda: prune.identity(torch.nn.Linear(2, 3), "weight"),
    "dropped": Dropped,
}


def read_at_ends(kind, logdir, stop_at=None):
    """The weights that the program reads at the end of each epoch, by its number."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(KINDS[kind](), torch.nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saving = Saving(save_model_secs=0, save_at_end=True)
    sv = Supervisor({"model": model, "optimizer": optimizer}, logdir, saving=saving, save_summaries_secs=0)
    found = {}
    with sv.managed_session() as sess:
        for epoch in sess.epochs(3):
            for (x,) in sess.steps(DataLoader(TensorDataset(X), batch_size=4)):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            if epoch == stop_at:
                raise KeyboardInterrupt
            found[epoch] = model[0].weight.tolist()
            if kind == "pruned":
                prune.l1_unstructured(model[0], "weight", amount=1)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_that_of_the_last_forward(kind, tmp_path, caplog):
    whole = read_at_ends(kind, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        read_at_ends(kind, tmp_path / "cut", stop_at=1)
    caplog.clear()
    assert read_at_ends(kind, tmp_path / "cut") == {epoch: whole[epoch] for epoch in (1, 2)}
    assert not caplog.text
