"""Workers that persist, of a loader that the program itself iterates over: after a restart they draw as before."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
import torch
from loop_programs import Counting
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader


class Jittered(Dataset):
    """It draws from the streams of its worker, and from a generator of its own."""

    def __init__(self) -> None:
        self.own = np.random.default_rng(3)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> list[float]:
        return [float(torch.rand(())), random.random(), np.random.rand(), self.own.random()]


def seed_numpy(worker: int) -> None:
    np.random.seed(worker)


def evaluated(logdir, kind, epochs, *, is_begun_before=False):
    """What evaluations at the ends of epochs have drawn, by the number of the epoch."""
    torch.manual_seed(1)
    run, found = Counting(logdir), {}
    loader = kind(Jittered(), num_workers=2, batch_size=2, persistent_workers=True, worker_init_fn=seed_numpy)
    if is_begun_before:
        list(loader)
    with run.sv.managed_session() as session:
        for epoch in session.epochs(epochs):
            run.loop(session)
            with session.evaluating():
                found[epoch] = [torch.stack(one).tolist() for one in loader]
            torch.rand(1)
    loader._iterator = None
    gc.collect()
    return found


@pytest.mark.parametrize("is_begun_before", [False, True])
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_an_evaluation_in_workers_that_persist_draws_the_same_after_a_restart(kind, is_begun_before, tmp_path):
    whole = evaluated(tmp_path / "whole", kind, 3, is_begun_before=is_begun_before)
    assert whole[0] != whole[1] != whole[2]

    first = evaluated(tmp_path / "stopped", kind, 1, is_begun_before=is_begun_before)
    rest = evaluated(tmp_path / "stopped", kind, 3, is_begun_before=is_begun_before)
    assert {**first, **rest} == whole


def test_workers_that_persist_are_kept(tmp_path):
    run = Counting(tmp_path)
    loader = DataLoader(Jittered(), num_workers=1, persistent_workers=True)
    with run.sv.managed_session():
        iter(loader)
        worker = loader._iterator._workers[0].pid
        iter(loader)
        assert loader._iterator._workers[0].pid == worker
    loader._iterator = None
    gc.collect()
