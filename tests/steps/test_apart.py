"""Iterators that draw from streams of their own, apart from those of the training."""

from __future__ import annotations

import random

import pytest

from stepguard.steps.apart import PROBES, ApartIterator
from stepguard.steps.random_streams import RandomStreams

STREAMS = RandomStreams()
SHARD = 2 * PROBES


def shards():
    """Numbers that are shuffled shard by shard, so that nothing is drawn for more batches than are looked at."""
    while True:
        numbers = list(range(SHARD))
        random.shuffle(numbers)
        yield from numbers


def read(steps):
    """The numbers of so many steps, each of which draws too."""
    iterator = ApartIterator(shards, STREAMS, STREAMS.side("data"))
    numbers = []
    for _ in range(steps):
        numbers.append(next(iterator))
        random.random()
    return numbers


def test_an_iterator_that_draws_rarely_gives_the_same_when_it_is_read_again():
    random.seed(1)
    expected = read(3 * SHARD)
    random.seed(1)
    iterator = ApartIterator(shards, STREAMS, STREAMS.side("data"))
    # Read again in one piece, as after a restart: the training draws nothing in between.
    assert [next(iterator) for _ in expected] == expected


@pytest.mark.parametrize(("draws", "probes"), [(False, 0), (True, -1)])
def test_one_that_draws_nothing_is_left_alone_and_no_other(draws, probes):
    def numbers():
        for number in range(100):
            if draws and number == 5:
                random.random()
            yield number

    iterator = ApartIterator(numbers, STREAMS, STREAMS.side("data"))
    assert [next(iterator) for _ in range(PROBES)] == list(range(PROBES))
    assert iterator.probes == probes


def test_one_that_is_resumed_comes_to_the_same_decision():
    iterator = ApartIterator(lambda: iter(range(100)), STREAMS, STREAMS.side("data"))
    for _ in range(5):
        next(iterator)
    resumed = ApartIterator(
        lambda: iter(range(5, 100)), STREAMS, STREAMS.side("data"), iterator.states, iterator.probes
    )
    for _ in range(PROBES - 5):
        next(resumed)
    assert resumed.probes == 0
