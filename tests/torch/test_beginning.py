"""What is saved beside a program that comes to its first step: the beginning of the run, whatever it just does."""

from __future__ import annotations

import torch
from loop_programs import Counting
from torch.utils.data import DataLoader, IterableDataset

from stepguard.steps.progress import Progress


def test_a_checkpoint_beside_the_beginning_of_the_first_loop_has_the_draws_before_it(tmp_path, monkeypatch):
    seen, begin_loop = [], Progress.begin_loop

    def beside(progress, *given):
        seen.append(session.process_state.capture())
        return begin_loop(progress, *given)

    monkeypatch.setattr(Progress, "begin_loop", beside)
    run = Counting(tmp_path)
    with run.sv.managed_session() as session:
        before = torch.get_rng_state()
        for _ in session.epochs(1):
            torch.randperm(5)
            run.loop(session)

    assert torch.equal(seen[0]["random"]["torch"], before)
    assert seen[0]["is_first"]


class Drawing(IterableDataset):
    """It draws each item, and tells of that."""

    def __init__(self, told):
        self.told = told

    def __iter__(self):
        for _ in range(4):
            yield torch.rand(1)
            self.told()


def test_a_checkpoint_beside_the_reading_of_seen_batches_is_that_of_the_restart(tmp_path):
    for _ in range(2):
        run, seen = Counting(tmp_path), []
        with run.sv.managed_session() as session:
            before = session.process_state.capture()["random"]["torch"]
            loader = DataLoader(Drawing(lambda: seen.append(session.process_state.capture())), batch_size=None)  # noqa: B023
            for _ in session.steps(loader):
                if session.global_step >= 1:
                    run.sv.request_stop()

    assert torch.equal(seen[0]["random"]["torch"], before)
    assert seen[0]["loaders"][0]["batches"] == 2
