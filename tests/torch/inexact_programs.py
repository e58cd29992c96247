"""Programs whose resumes are not exact, each for one reason, and one that is right: the table of docs/prove.md."""

from __future__ import annotations

import collections
import os
import random

import numpy as np
import torch
from forked import begin
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from stepguard.torch import Supervisor

SAMPLES, BATCH = 64, 8


# In a dictionary, where nobody looks for it.
OWN = {"order": np.random.default_rng(0)}


class OwnOrder(Sampler):
    """A sampler that draws its order from a generator of the program's own, which nobody sees and saves."""

    def __iter__(self):
        yield from OWN["order"].permutation(SAMPLES).tolist()

    def __len__(self):
        return SAMPLES


class ReadsAhead:
    """A loader around another that reads two batches ahead, and saves the position of what it has read."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def __iter__(self):
        waiting = collections.deque()
        while self.at < 1000:
            waiting.append(self.data[self.at % len(self.data)] + self.at)
            self.at += 1
            if len(waiting) > 2:
                yield waiting.popleft()

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Noisy(Dataset):
    """An augmentation that draws from a generator without a seed."""

    def __init__(self, x):
        self.x, self.rng = x, np.random.default_rng()

    def __getitem__(self, index):
        return self.x[index] + 0.01 * float(self.rng.standard_normal())

    def __len__(self):
        return len(self.x)


def loader_of(cause, x):
    if cause in ("sampler", "forced sampler"):
        return DataLoader(TensorDataset(x), BATCH, sampler=OwnOrder(), collate_fn=stacked)
    if cause == "prefetcher":
        return ReadsAhead(x.split(BATCH))
    if cause == "augmentation":
        return DataLoader(Noisy(x), BATCH, shuffle=True)
    return DataLoader(TensorDataset(x), BATCH, shuffle=True, collate_fn=stacked)


def stacked(samples):
    return torch.stack([one for (one,) in samples])


def say_whether_deterministic(environment, output):
    """Print whether PyTorch uses deterministic algorithms only, before and after a Supervisor is made."""
    begin(output)
    os.environ.update(environment)
    print(torch.are_deterministic_algorithms_enabled())
    Supervisor({"model": torch.nn.Linear(1, 1)}, logdir="own")
    print(torch.are_deterministic_algorithms_enabled())


def main(cause, environment, output):
    """Run the program in this new process."""
    begin(output)
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    held = [torch.zeros_like(one) for one in model.parameters()]
    loader = loader_of(cause, torch.linspace(-1, 1, 4 * SAMPLES).reshape(SAMPLES, 4))
    sv = Supervisor({"model": model, "optimizer": optimizer}, logdir="own", save_summaries_secs=0)
    with sv.managed_session() as sess:
        for since_start, x in enumerate(
            sess.steps(loader, resume_data="unchecked" if cause == "forced sampler" else True)
        ):
            y = model(x)
            if cause == "kernel":
                # What atomic additions on a GPU do: the order, and so the last bits, differ from run to run.
                y = sum(y[one] for one in np.random.default_rng().permutation(len(y)).tolist())
            loss = (y * y).mean()
            optimizer.zero_grad()
            loss.backward()
            if cause == "gradients":
                for one, parameter in zip(held, model.parameters(), strict=True):
                    one += parameter.grad
                    parameter.grad = None
                if sess.global_step % 4 == 3:
                    for one, parameter in zip(held, model.parameters(), strict=True):
                        parameter.grad = one.clone()
                        one.zero_()
            optimizer.step()
            sess.summary({"loss": loss})
            if cause == "evaluation" and since_start % 8 == 7:
                with torch.no_grad():
                    model(x)
