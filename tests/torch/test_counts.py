"""What samplers and data sets count for themselves, and what they keep besides."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from stepguard.torch.data.counts import Counts


class Epochs:
    def __init__(self) -> None:
        self.epoch = 0
        self.items = torch.zeros(3)
        self.left: list[int] = []

    def use(self) -> None:
        self.epoch += 1
        self.left = []


class Cached:
    def __init__(self) -> None:
        self.count = 0
        self.kept: dict[int, torch.Tensor] = {0: torch.zeros(1, requires_grad=True)}

    def use(self) -> None:
        if not self.count:
            self.kept[1] = self.kept[0]
            self.count = 2


class CachedElsewhere:
    def __init__(self) -> None:
        self.is_loaded = False
        self.cache = Cached()

    def use(self) -> None:
        self.is_loaded = True
        self.cache.kept[1] = self.cache.kept[0]


class Opened:
    def __init__(self) -> None:
        self.pid: int | None = None
        self.file: Any = None

    def use(self) -> None:
        if self.pid != os.getpid():
            with open(os.devnull) as self.file:
                self.pid = os.getpid()


def inside(one: Any) -> list[Any]:
    return [one, one.cache] if isinstance(one, CachedElsewhere) else [one]


def test_numbers_go_on():
    one, other = Epochs(), Epochs()
    counts, restored = Counts([one], may_keep_more=True), Counts([other], may_keep_more=True)
    one.use()
    restored.put(counts.state())

    assert other.epoch == 1


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Cached, "Cached.count when the checkpoint was made, and also Cached.kept,"),
        (CachedElsewhere, "CachedElsewhere.is_loaded when the checkpoint was made, and also Cached.kept,"),
        (Opened, "Opened.pid when the checkpoint was made, and also Opened.file,"),
    ],
)
def test_a_number_that_may_describe_what_is_kept_is_not_put_back_without_it(kind, said, caplog):
    one, other = kind(), kind()
    fresh = dict(vars(other))
    counts, restored = Counts(inside(one), may_keep_more=True), Counts(inside(other), may_keep_more=True)
    one.use()
    restored.put(counts.state())

    assert vars(other) == fresh
    assert said in caplog.text
    other.use()  # It does what it would do in a new process.


def test_a_sampler_counts_its_epochs_whatever_it_keeps():
    one, other = Cached(), Cached()
    counts, restored = Counts([one], may_keep_more=False), Counts([other], may_keep_more=False)
    one.use()
    restored.put(counts.state())

    assert other.count == 2
