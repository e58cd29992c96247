"""What samplers and data sets count for themselves, and what they keep besides."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import pytest
import torch

from stepguard.torch.data.counts import Counts, numbers_of


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


class Masks:
    """As a collate function that seeds its masks by the number of the batch, which its workers share."""

    def __init__(self, lock: bool) -> None:
        self.begun = multiprocessing.Value("i", 0, lock=lock)
        self.others: list[int] = []


@pytest.mark.parametrize("lock", [False, True])
def test_a_number_that_processes_share_goes_on_in_its_place(lock):
    one, other = Masks(lock), Masks(lock)
    counts, restored, place = (Counts([one], may_keep_more=True), Counts([other], may_keep_more=True), other.begun)
    one.begun.value += 3
    restored.put(counts.state())

    assert other.begun is place
    assert place.value == 3
    restored.go_back({})
    assert place.value == 3  # Workers that are started count on.
    assert numbers_of([other]) == [3]


def test_a_sampler_counts_its_epochs_whatever_it_keeps():
    one, other = Cached(), Cached()
    counts, restored = Counts([one], may_keep_more=False), Counts([other], may_keep_more=False)
    one.use()
    restored.put(counts.state())

    assert other.count == 2
