"""What is saved beside a program that comes to its first step, or to its end."""

from __future__ import annotations

import pytest
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


class Ending(IterableDataset):
    """At the end of its items it does something."""

    def __init__(self, at_end):
        self.at_end = at_end

    def __iter__(self):
        yield from range(3)
        self.at_end()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_stop_at_the_end_of_the_last_loop_is_not_told_that_its_work_after_it_is_repeated(
    is_stopped, tmp_path, caplog
):
    for _ in range(2):
        run = Counting(tmp_path)
        with run.sv.managed_session() as session:
            loader = DataLoader(Ending(run.sv.request_stop if is_stopped else int), batch_size=None)
            for _ in session.steps(loader, epochs=1):
                pass

    assert ("repeats its work after this loop" in caplog.text) is not is_stopped
