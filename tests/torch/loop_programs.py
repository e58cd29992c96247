"""Programs whose loops the tests of loops and of epochs leave, kill and begin again."""

from __future__ import annotations

import time

import torch
from torch.utils.data import DataLoader, TensorDataset

from stepguard.options import Saving
from stepguard.store import CheckpointStore
from stepguard.torch import Supervisor

BATCHES = 5
LENT = -1000.0
SOON_SECS = 60.0


class Killed(Exception):  # noqa: N818 - it stands for what no program sees
    """Nothing is saved after it, as after a SIGKILL."""


class Counting:
    """A model whose one weight is the number of steps, so that any other weight is seen."""

    def __init__(self, logdir, **options):
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.loader = DataLoader(TensorDataset(torch.ones(BATCHES, 1)), batch_size=1)
        # No timer: the tests say when it is over.
        options = {"save_model_secs": 0, "saving": Saving(save_at_end=True), **options}
        self.sv = Supervisor({"model": self.model}, logdir, save_summaries_secs=0, **options)

    def loop(self, session, **options):
        for _ in session.steps(self.loader, **options):
            with torch.no_grad():
                self.model.weight += 1.0

    def lend(self):
        """As who swaps averaged weights in: behind the back of all counters."""
        self.model.weight.data.fill_(LENT)

    def save(self):
        """What the timer does when it is over."""
        self.sv._saving.checkpointer()
        assert self.sv._saving.writer.drain(SOON_SECS)


def committed(logdir):
    return sorted(one.step for one in CheckpointStore(logdir).candidates())


def until(is_so, within_secs=SOON_SECS):
    deadline = time.monotonic() + within_secs
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def restored(logdir):
    again = Counting(logdir)
    with again.sv.managed_session() as session:
        return session.global_step, again.model.weight.item()


class Tutorial:
    """The loop of every tutorial, with random numbers in the steps and in the evaluation."""

    EPOCHS = 4

    def __init__(self, logdir):
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        self.loader = DataLoader(TensorDataset(torch.randn(4 * BATCHES, 2)), batch_size=4, shuffle=True)
        self.values = DataLoader(torch.randn(8, 2), batch_size=4, shuffle=True)
        state = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        saving = Saving(save_at_end=True)
        self.sv = Supervisor(state, logdir, save_summaries_secs=0, save_model_secs=0, saving=saving)
        self.done = []

    def step(self, batch):
        self.optimizer.zero_grad()
        self.model(batch).pow(2).mean().backward()
        self.optimizer.step()

    def save_and_die(self):
        self.sv._saving.checkpointer()
        assert self.sv._saving.writer.drain(SOON_SECS)
        raise Killed

    def train(self, dies=None, max_steps=None):
        """``dies`` is where: ``(epoch, place)``."""
        with self.sv.managed_session() as session:
            for epoch in session.epochs(self.EPOCHS):
                if dies == (epoch, "begin"):
                    self.save_and_die()
                torch.rand(())  # what belongs to the beginning of an epoch
                for number, (batch,) in enumerate(session.steps(self.loader, max_steps=max_steps)):
                    self.step(batch)
                    if session.is_last_batch:
                        self.done.append(f"last batch of {epoch}")
                    if dies == (epoch, "step") and number == 2:
                        session.finish_step()
                        self.save_and_die()
                self.done.append(f"end of {epoch}")
                for values in self.values:
                    self.model(values)  # with dropout: it draws
                if dies == (epoch, "end"):
                    self.save_and_die()
                self.scheduler.step()
        return self

    def outcome(self):
        weights = torch.cat([one.detach().flatten() for one in self.model.parameters()]).tolist()
        return weights, self.scheduler.last_epoch, self.optimizer.param_groups[0]["lr"], torch.rand(()).item()
