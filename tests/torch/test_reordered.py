"""What the program shuffles in place for each epoch: a restart that does not come to the same order names it."""

from __future__ import annotations

import gc
import random
import sys

import numpy as np
import pytest
import torch
from loop_programs import Counting
from torch.utils.data import DataLoader, TensorDataset

from stepguard.torch.data.reordered import Reordered

NAMED = "the program shuffles order in place"


def array_in_place():
    order = np.arange(8)

    def batches(epoch):
        np.random.shuffle(order)
        return range(2)

    return batches, order


def data_made_of_a_list():
    order = list(range(8))

    def batches(epoch):
        random.shuffle(order)
        return DataLoader(TensorDataset(torch.tensor(order)), batch_size=4)

    return batches, order


def order_made_anew():
    def batches(epoch):
        order = list(range(8))
        random.shuffle(order)
        return DataLoader(TensorDataset(torch.tensor(order)), batch_size=4)

    return batches, None


def order_set_by_the_epoch():
    order = np.arange(8)

    def batches(epoch):
        order[:] = np.random.default_rng(epoch).permutation(8)
        return DataLoader(TensorDataset(torch.tensor(order)), batch_size=4)

    return batches, order


def run(logdir, kind, caplog, stop_at=None, stop_after=None):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    caplog.clear()
    program, seen = Counting(logdir), {}
    batches, order = kind()
    with program.sv.managed_session() as session:
        for epoch in session.epochs(3):
            given = batches(epoch)
            for batch in session.steps(given):
                seen[session.global_step] = str(batch)
                if session.global_step == stop_at:
                    program.sv.request_stop()
            if epoch == stop_after:
                program.sv.request_stop()
    del order
    return seen, caplog.text


@pytest.mark.parametrize("kind", [array_in_place, data_made_of_a_list])
def test_an_order_that_was_shuffled_in_place_is_named_in_a_later_epoch(kind, tmp_path, caplog):
    run(tmp_path, kind, caplog, stop_at=2)
    _, said = run(tmp_path, kind, caplog)

    assert NAMED in said


def batches_of_a_list():
    order = list(range(8))

    def batches(epoch):
        random.shuffle(order)
        return [order[:4], order[4:]]

    return batches, order


def test_batches_that_were_made_of_a_shuffled_list_are_those_of_their_epoch(tmp_path, caplog):
    whole, _ = run(tmp_path / "whole", batches_of_a_list, caplog)
    run(tmp_path / "stopped", batches_of_a_list, caplog, stop_at=2)
    rest, said = run(tmp_path / "stopped", batches_of_a_list, caplog)

    assert rest[3] == whole[3]
    assert NAMED in said


@pytest.mark.parametrize("stop_at", [0, 2, 3])
@pytest.mark.parametrize("kind", [order_made_anew, order_set_by_the_epoch])
def test_an_order_that_is_made_again_is_not_named(kind, stop_at, tmp_path, caplog):
    whole, _ = run(tmp_path / "whole", kind, caplog)
    run(tmp_path / "stopped", kind, caplog, stop_at=stop_at)
    rest, said = run(tmp_path / "stopped", kind, caplog)

    assert rest.items() <= whole.items()
    assert "in place" not in said


def test_an_order_of_the_first_epoch_is_not_named(tmp_path, caplog):
    whole, _ = run(tmp_path / "whole", data_made_of_a_list, caplog)
    run(tmp_path / "stopped", data_made_of_a_list, caplog, stop_at=0)
    rest, said = run(tmp_path / "stopped", data_made_of_a_list, caplog)

    assert "in place" not in said
    assert rest.items() <= whole.items()


def batches_drawn_anew():
    return lambda epoch: [random.sample(range(8), 4) for _ in range(2)], None


def batches_drawn_at_the_start():
    found = [[random.SystemRandom().random()] for _ in range(2)]
    return lambda epoch: found, None


def made_otherwise(logdir, kind, caplog):
    gc.unfreeze()  # The tests have what was there before them left out by the garbage collector.
    whole, _ = run(logdir / "whole", kind, caplog)
    run(logdir / "stopped", kind, caplog, stop_after=0)
    rest, said = run(logdir / "stopped", kind, caplog)
    return rest.items() <= whole.items(), "otherwise than in the run that is resumed" in said


def test_a_list_that_is_drawn_anew_in_each_epoch_is_not_named(tmp_path, caplog):
    assert made_otherwise(tmp_path, batches_drawn_anew, caplog) == (True, False)


def test_a_list_that_each_start_draws_otherwise_is_named(tmp_path, caplog):
    assert made_otherwise(tmp_path, batches_drawn_at_the_start, caplog) == (False, True)


def test_all_are_looked_at_in_the_first_epochs_alone():
    looked = []
    frame = sys._getframe()
    order, other = np.arange(8), np.arange(9)
    found = Reordered()
    for epoch in range(6):
        found.begin_body(frame, is_begun=False)
        looked.append(sorted(found._at_body))
        np.random.default_rng(epoch).shuffle(order)
        found.begin_loop(frame)

    assert {"order", "other"} <= set(looked[0])
    assert other.tolist() == list(range(9))
    assert looked[3:] == [["order"]] * 3
    assert set(found.saved(is_begun=True)) == {"order"}
