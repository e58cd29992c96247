"""A run that was stopped and gone on with ends bit by bit where an uninterrupted one ends."""

from __future__ import annotations

import pytest
from jax_training import LOADERS, Training, batches, data

from stepguard.errors import CheckpointMismatchError

STEPS = 20


@pytest.mark.parametrize(("loader", "donates"), [("batches", True), *((loader, False) for loader in sorted(LOADERS))])
def test_is_the_run_that_was_not_stopped(tmp_path, loader, donates):
    whole = Training(None, LOADERS[loader](), donates=donates).train(STEPS)
    parts = [Training(tmp_path, LOADERS[loader](), donates=donates).train(stop) for stop in (3, 6, 13, STEPS)]

    assert [part.began_at for part in parts] == [0, 3, 6, 13]
    assert [batch for part in parts for batch in part.batches] == whole.batches
    assert parts[-1].outcome == whole.outcome


def test_a_resumed_run_saves_the_position_before_it_has_read_a_batch(tmp_path):
    expected = Training(None, LOADERS["Grain's DataLoader"]()).train(STEPS)
    Training(tmp_path, LOADERS["Grain's DataLoader"]()).train(4)
    Training(tmp_path, LOADERS["Grain's DataLoader"](), save_model_steps=1).train(4)
    last = Training(tmp_path, LOADERS["Grain's DataLoader"]()).train(STEPS)

    assert last.batches == expected.batches[4:]


def test_another_seed_of_the_batches_is_refused(tmp_path):
    Training(tmp_path, batches(data(), 8, seed=1)).train(3)

    with pytest.raises(CheckpointMismatchError, match="seed: expected 1, found 2"):
        Training(tmp_path, batches(data(), 8, seed=2)).train(6)


def test_another_sampler_of_grain_is_refused(tmp_path):
    from jax_training import grain_loader

    Training(tmp_path, grain_loader(seed=3)).train(3)

    with pytest.raises(CheckpointMismatchError, match="does not take the state"):
        Training(tmp_path, grain_loader(seed=4)).train(6)


def test_the_plain_iteration_of_batches_has_the_same_order_as_the_run():
    training = Training(None, batches(data(), 8, seed=1)).train(12)

    loader = batches(data(), 8, seed=1)
    assert training.batches == [batch["index"].tolist() for _ in range(2) for batch in loader]
    assert training.batches[:6] != training.batches[6:]


@pytest.mark.parametrize(("size", "drop_last", "count"), [(8, True, 6), (8, False, 7), (50, True, 1)])
def test_batches_leave_out_the_last_one_if_they_are_told_to(size, drop_last, count):
    loader = batches(data(), size, shuffle=False, drop_last=drop_last)

    assert len(loader) == len(list(loader)) == count
    assert [len(batch["index"]) for batch in loader][-1] == (50 % size or size if not drop_last else size)


@pytest.mark.parametrize("size", [0, 51])
def test_batches_that_cannot_be_are_refused(size):
    with pytest.raises(ValueError, match="batch_size of 1 to 50"):
        batches(data(), size)


def test_arrays_of_two_lengths_are_refused():
    with pytest.raises(ValueError, match="arrays of one length"):
        batches({"a": data()["index"], "b": data()["index"][1:]}, 8)
