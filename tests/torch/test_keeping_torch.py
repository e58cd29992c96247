"""Metrics and named checkpoints of a loop: they belong to the last step, wherever they are given."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from stepguard.options import Saving
from stepguard.store import CheckpointStore
from stepguard.torch import Supervisor

BATCHES = 3
LENT = -1000.0


class Counting:
    """A model whose one weight is the number of steps, so that any other weight is seen."""

    def __init__(self, logdir, **saving):
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.loader = DataLoader(TensorDataset(torch.ones(BATCHES, 1)), batch_size=1)
        saving = Saving(save_model_secs=0, **{"save_at_end": False, **saving})
        self.sv = Supervisor({"model": self.model}, logdir, save_summaries_secs=0, saving=saving)

    def train(self):
        with torch.no_grad():
            self.model.weight += 1.0

    def lend(self):
        """As who swaps averaged weights in for an evaluation."""
        self.model.weight.data.fill_(LENT)

    def give_back(self, step):
        self.model.weight.data.fill_(step)


def saved(logdir):
    """By step: the weight, the metrics and the names of the committed checkpoints."""
    store, found = CheckpointStore(logdir), {}
    for one in store.candidates():
        marks = store.read_manifest(one).marks
        weight = torch.load(one.path / "model.pt", weights_only=True)["weight"].item()
        found[one.step] = weight, dict(marks.metrics), marks.names
    return found


@pytest.mark.parametrize("epochs", [4, 40])
def test_a_best_epoch_is_saved_as_its_last_step_left_it_whatever_the_model_holds_meanwhile(tmp_path, epochs):
    """Also of 40 short epochs, of which not each is copied where nobody wants the copies."""
    program = Counting(tmp_path, max_to_keep=1, keep_best=("val_loss", "min", 2))
    with program.sv.managed_session() as session:
        for epoch in session.epochs(epochs):
            for _ in session.steps(program.loader):
                program.train()
            program.lend()
            session.metrics({"val_loss": torch.tensor(float(epochs - epoch))})
            program.give_back(session.global_step)

    last = epochs * BATCHES
    assert saved(tmp_path) == {
        last - 2 * BATCHES: (last - 2 * BATCHES, {"val_loss": 3.0}, ()),
        last - BATCHES: (last - BATCHES, {"val_loss": 2.0}, ()),
        last: (last, {"val_loss": 1.0}, ()),
    }


def test_inside_a_step_they_belong_to_its_end(tmp_path):
    program = Counting(tmp_path, keep_best=("val_loss", "min", 1))
    with program.sv.managed_session() as session:
        for number in session.steps(max_steps=5):
            program.train()
            if number == 1:
                session.metrics({"val_loss": 0.5})
                session.save("early")
                program.model.weight.data.mul_(1.0)

    assert saved(tmp_path) == {2: (2.0, {"val_loss": 0.5}, ("early",))}


def test_of_a_step_that_is_left_by_break_they_are_not_lost(tmp_path):
    program = Counting(tmp_path, keep_best=("val_loss", "min", 1))
    with program.sv.managed_session() as session:
        for number in session.steps(max_steps=5):
            program.train()
            if number == 2:
                session.metrics({"val_loss": 0.5})
                session.save("last")
                break

    assert saved(tmp_path) == {3: (3.0, {"val_loss": 0.5}, ("last",))}


def test_after_single_steps_they_belong_to_the_last_one(tmp_path):
    program = Counting(tmp_path, keep_best=("val_loss", "max", 1))
    with program.sv.managed_session() as session:
        for value in (1.0, 3.0, 2.0):
            with session.step():
                program.train()
            session.metrics({"val_loss": value})
        session.save("end")

    assert saved(tmp_path) == {
        1: (1.0, {"val_loss": 1.0}, ()),
        2: (2.0, {"val_loss": 3.0}, ()),
        3: (3.0, {"val_loss": 2.0}, ("end",)),
    }


def test_a_save_after_a_loop_that_was_too_short_to_be_copied_says_so_and_the_next_is_taken(tmp_path, caplog):
    program = Counting(tmp_path, save_model_steps=1000)
    with program.sv.managed_session() as session:
        program.sv._saving.checkpointer._budget.allows_one = lambda: False
        for end in (2, 4):
            for _ in session.steps(max_steps=end):
                program.train()
            program.lend()
            session.save(f"after-{end}")
            program.give_back(end)

    assert "the last one was too short to be copied at its end" in caplog.text
    assert saved(tmp_path) == {4: (4.0, {}, ("after-4",))}
