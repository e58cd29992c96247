"""Data of Grain after a restart with another number of processes: divided anew where Grain can, and else refused."""

from __future__ import annotations

import logging

import grain.experimental
import grain.python as grain
import pytest
from jax_training import BATCH, FEW_THREADS, ITEMS, Rows

from stepguard.errors import CheckpointMismatchError
from stepguard.jax.data.feeds import feed_of
from stepguard.steps.random_streams import RandomStreams

STREAMS = RandomStreams()
EPOCHS = 2


def elastic(rank, processes):
    rows = grain.MapDataset.source(Rows()).seed(7).shuffle().repeat(EPOCHS)
    shard = grain.ShardOptions(rank, processes)
    return grain.experimental.ElasticIterator(rows, BATCH, shard, read_options=FEW_THREADS)


def sharded(rank, processes):
    sampler = grain.IndexSampler(ITEMS, shuffle=True, num_epochs=1, seed=3)
    batch = [grain.Batch(BATCH // processes, drop_remainder=True)]
    return grain.DataLoader(
        data_source=Rows(),
        sampler=sampler,
        operations=batch,
        shard_options=grain.ShardOptions(rank, processes),
        read_options=FEW_THREADS,
    )


def started(loader, processes, position=None, **options):
    """The feeds of all processes, which go on at the position that the chief has saved."""
    feeds = [feed_of(loader(rank, processes), STREAMS, {}) for rank in range(processes)]
    for feed in feeds if position else ():
        feed.resume(position, processes, **options)
    return feeds


def read(feeds, count):
    """The rows of the next steps of all processes together; fewer if the data end."""
    found = []
    for _ in range(count):
        try:
            batches = [feed.next(None)["index"].tolist() for feed in feeds]
        except StopIteration:
            break
        for feed in feeds:
            feed.consumed()
        found.append(sorted(row for batch in batches for row in batch))
    return found


def saved(feeds, processes):
    return {**feeds[0].position(), "processes": processes}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_an_elastic_iterator_of_grain_goes_on_with_another_number_of_processes(before, after):
    whole = read(started(elastic, 1), 100)
    first = started(elastic, before)
    seen = read(first, 5)
    seen += read(started(elastic, after, saved(first, before)), 100)

    assert seen == whole
    assert len(whole) == EPOCHS * ITEMS // BATCH


def test_a_loader_of_grain_refuses_another_number_of_processes_in_an_epoch():
    first = started(sharded, 2)
    read(first, 3)

    with pytest.raises(CheckpointMismatchError) as raised:
        started(sharded, 1, saved(first, 2))
    assert "of 2 processes in the middle of an epoch (batch 3), there are 1 now" in str(raised.value)
    assert "Go on with 2; use a loader that is divided anew" in str(raised.value)
    assert "stepguard.jax.batches or Grain's ElasticIterator for JAX" in str(raised.value)


def test_a_loader_of_grain_goes_on_unchecked_if_the_program_wants_it(caplog):
    first = started(sharded, 2)
    read(first, 3)
    with caplog.at_level(logging.WARNING, "stepguard"):
        (feed,) = started(sharded, 1, saved(first, 2), is_checked=False)

    assert "going on unchecked" in caplog.text
    assert len(read([feed], 1)[0]) == BATCH


def test_a_loader_of_grain_goes_on_with_another_number_of_processes_between_two_epochs():
    first = started(sharded, 2)
    (rows,) = [read(first, ITEMS // BATCH)]
    for feed in first:
        assert next(feed._iterator, None) is None
        feed.end_epoch()
    (alone,) = started(sharded, 1, saved(first, 2))

    assert alone.epoch == 1
    assert len(read([alone], 1)[0]) == BATCH
    assert len(rows) == ITEMS // BATCH
