"""Data sets of tf.data: a resumed run reads the seen batches again, in the order that each epoch had, or is refused."""

from __future__ import annotations

import itertools

import pytest
from jax_training import BATCH, ITEMS, Training, data

from stepguard.errors import CheckpointMismatchError
from stepguard.steps.batch_marks import mark, peek

tf = pytest.importorskip("tensorflow")

STEPS = 20
BATCHES = ITEMS // BATCH


def dataset(**shuffle):
    rows = tf.data.Dataset.from_tensor_slices(data())
    return rows.shuffle(ITEMS, **shuffle).batch(BATCH, drop_remainder=True)


def parts(logdir, stops, **shuffle):
    """The batches of a run that was stopped at these steps, and its outcome."""
    ended = [Training(logdir, dataset(**shuffle).as_numpy_iterator).train(stop) for stop in stops]
    return [batch for one in ended for batch in one.batches], ended[-1].outcome


def test_each_epoch_has_its_own_order_again(tmp_path):
    whole = Training(None, dataset(seed=3).as_numpy_iterator).train(STEPS)

    # In the first epoch, in the second one, at the beginning of the third one, and after its first batch.
    stops = (4, BATCHES + 2, 2 * BATCHES, 2 * BATCHES + 1, STEPS)
    assert parts(tmp_path, stops, seed=3) == (whole.batches, whole.outcome)
    assert whole.batches[:BATCHES] != whole.batches[BATCHES : 2 * BATCHES]
    assert whole.batches == [
        one["index"].tolist()
        for seeded in [dataset(seed=3)]
        for one in itertools.islice(
            itertools.chain.from_iterable(seeded.as_numpy_iterator() for _ in range(STEPS)), STEPS
        )
    ]


def test_an_order_without_a_seed_is_refused(tmp_path):
    parts(tmp_path, [4])

    with pytest.raises(CheckpointMismatchError, match="read again, batch 4 of epoch 0 is not what it was"):
        parts(tmp_path, [STEPS])


def test_tensors_are_told_apart_by_their_values():
    def mark_of(numbers):
        return mark(peek([{"index": tf.constant(numbers)}]))

    assert mark_of([[1, 2], [3, 4]]) == mark_of([[1, 2], [3, 4]]) != mark_of([[1, 2], [3, 5]])
    assert mark_of(["a"]) != mark_of(["b"])


@pytest.mark.parametrize("as_method", [True, False])
def test_a_data_set_that_is_named_anew_in_each_epoch_is_the_same_loader(as_method):
    from stepguard.jax import Supervisor

    seeded, seen = dataset(seed=3, reshuffle_each_iteration=False), []
    with Supervisor(None).managed_session({"step": 0}) as sess:
        for _ in sess.epochs(2):
            for batch in sess.steps(seeded.as_numpy_iterator if as_method else seeded):
                assert sess.is_last_batch == (sess.global_step % BATCHES == BATCHES - 1)
                seen.append(list(map(int, batch["index"])))
                sess.state = {"step": sess.state["step"] + 1}
    assert seen[:BATCHES] == seen[BATCHES:]


def test_another_number_of_batches_is_refused(tmp_path):
    parts(tmp_path, [4], seed=3)

    with pytest.raises(CheckpointMismatchError, match="batches in an epoch: expected 6, found 5"):
        Training(tmp_path, dataset(seed=3).take(5).as_numpy_iterator).train(STEPS)
