"""An epoch that goes on with another batch size, and is stopped again: no sample is lost, and none is seen twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.data import DataLoader

from stepguard.torch.data.feeds import feed_of

NUMBERS = list(range(60))


LOADERS: dict[str, Callable[[int], DataLoader]] = {
    "shuffled": lambda size: DataLoader(NUMBERS, size, shuffle=True),
    "a generator of its own": lambda size: DataLoader(NUMBERS, size, shuffle=True, generator=torch.Generator()),
    "two workers": lambda size: DataLoader(NUMBERS, size, shuffle=True, num_workers=2),
    "in order": lambda size: DataLoader(NUMBERS, size),
}


class Run:
    """An epoch, each part of it in a new process, whose random states are those of no process before."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._position: dict | None = None
        self.seen: list[int] = []

    def train(self, size: int, steps: int) -> None:
        torch.manual_seed(len(self.seen))
        feed = feed_of(LOADERS[self._kind](size))
        if self._position is not None:
            feed.resume(self._position)
        for _ in range(steps):
            self.seen += feed.next(None).tolist()
            feed.consumed()
        self._position = feed.position()
        feed.close()


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(("before", "after"), [(10, 5), (6, 8), (10, 7)])
def test_each_sample_is_seen_once_in_the_order_of_the_epoch(kind, before, after):
    whole, resized = Run(kind), Run(kind)
    whole.train(10, 6)
    resized.train(before, 3)
    while len(resized.seen) < len(NUMBERS):
        resized.train(after, 1)

    assert sorted(whole.seen) == NUMBERS
    assert resized.seen == whole.seen
