"""A small training run that uses all that must be resumed: shuffling, augmentation in workers, dropout, a
scheduler, a scaler of gradients.

``main`` trains in a process of its own, to be killed by a test.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stepguard.options import Watching
from stepguard.torch import Supervisor, Values

ITEMS = 50
BATCH = 8


class Augmented(Dataset):
    """Items that every load changes at random, by each of the generators that a program may use."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(ITEMS, 4, generator=generator)
        self.targets = torch.randn(ITEMS, 1, generator=generator)

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> Any:
        import numpy as np

        noise = torch.rand(4) + random.random() + np.random.rand()
        return index, self.inputs[index] + 0.01 * noise, self.targets[index]


def plain() -> Dataset:
    data = Augmented()
    return TensorDataset(torch.arange(ITEMS), data.inputs, data.targets)


class Training:
    """The model with everything around it, new and seeded."""

    def __init__(self, logdir: Any, loader: Callable[[], Any] | None = None, **options: Any) -> None:
        import numpy as np

        random.seed(1)
        torch.manual_seed(1)
        np.random.seed(1)
        # Two workers fork from here: one thread is enough, and sums do not depend on how many there are.
        torch.set_num_threads(1)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(16, 1),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimizer, T_0=17)
        # It changes every few steps, and in a long run also loses one to an overflow.
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        self.progress = Values(lowest=float("inf"), seen=0)
        self.loader = DataLoader(Augmented(), BATCH, shuffle=True) if loader is None else loader()
        options = {"save_summaries_secs": 0, "save_model_secs": 3600, **options}
        state = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        state |= {"progress": self.progress, "scaler": self.scaler}
        self.sv = Supervisor(state, logdir, **options)
        self.batches: list[list[int]] = []
        self.began_at = -1
        self._outcome: tuple[Any, ...] | None = None

    def step(self, batch: Any) -> None:
        index, inputs, targets = batch
        self.batches.append(index.tolist() if index.dim() else [int(index)])
        loss = torch.nn.functional.mse_loss(self.model(inputs.reshape(-1, 4)), targets.reshape(-1, 1))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.progress.lowest = min(self.progress.lowest, loss.item())
        self.progress.seen += len(self.batches[-1])

    def train(self, max_steps: int | None = None, epochs: int | None = None) -> Training:
        with self.sv.managed_session() as session:
            self.began_at = session.global_step
            for batch in session.steps(self.loader, max_steps=max_steps, epochs=epochs):
                self.step(batch)
        self.outcome()
        return self

    def outcome(self) -> tuple[Any, ...]:
        """All that must not depend on where a run was stopped and gone on with, bit by bit; as it first was."""
        if self._outcome is None:
            self._outcome = self._read_outcome()
        return self._outcome

    def _read_outcome(self) -> tuple[Any, ...]:
        import numpy as np

        digest = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        for state in self.optimizer.state.values():
            for tensor in state.values():
                digest.update(tensor.numpy().tobytes())
        drawn = (random.random(), float(torch.rand(())), float(np.random.rand()))
        scale = self.scaler.state_dict()
        return digest.hexdigest(), self.scheduler.get_last_lr(), vars(self.progress), scale, drawn


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--logdir", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save-secs", type=float, default=0.05)
    parser.add_argument("--step-secs", type=float, default=0.01)
    parser.add_argument("--seen", help="append a line for each step: its number and its batch")
    parser.add_argument("--hold-at", type=int, help="come no further than to this step before LOGDIR.go-on is there")
    args = parser.parse_args(arguments)

    def loader() -> DataLoader:
        persistent = args.workers > 0  # else most of the time goes into starting them
        return DataLoader(Augmented(), BATCH, shuffle=True, num_workers=args.workers, persistent_workers=persistent)

    watching = Watching(trace="batches")
    training = Training(args.logdir, loader, save_model_secs=args.save_secs, watching=watching)
    with training.sv.managed_session() as session:
        for batch in session.steps(training.loader, max_steps=args.steps):
            if not training.batches:
                print("in the first step", flush=True)
            training.step(batch)
            session.summary({"lowest loss": training.progress.lowest})
            time.sleep(args.step_secs)
            if args.seen:
                with open(args.seen, "a") as seen:
                    seen.write(f"{session.global_step} {training.batches[-1]}\n")
            while session.global_step == args.hold_at and not os.path.exists(f"{args.logdir}.go-on"):
                time.sleep(0.01)
    print("outcome", training.outcome(), flush=True)
