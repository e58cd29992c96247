"""Random numbers in a DataLoader's workers: the same for a batch, whichever worker loads it and whenever.

PyTorch seeds each worker once, so the numbers that a worker draws depend on all its earlier draws. A resumed run has
new workers, which would draw other numbers. Here each batch of a map-style data set has its own seed, and each worker
has one for each epoch of an iterable data set. Workers that persist also get to know the number of the epoch here.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from stepguard.torch.data import generators
from stepguard.torch.data.counts import numbers_of
from stepguard.torch.data.inside import Inside


@dataclass(frozen=True, slots=True)
class SeededIndex:
    """The indices of one batch (or, without batches, the index of one item), its epoch, and the seed for loading it."""

    index: Any
    epoch: int
    seed: str


class _Prepared:
    """A data set in a worker, which is told the epoch and gets its random numbers from seeds.

    ``collate`` may hold a generator too. In a worker it is the worker's own, as the data set is.
    """

    def __init__(self, dataset: Any, collate: Any) -> None:
        self._dataset = dataset
        self._collate = collate
        self._inside: Inside | None = None
        self._epoch: int | None = None
        self._numbers: list[Any] = []
        # In shared memory, because workers tell their parent by it.
        self._has_counted = torch.zeros(1, dtype=torch.bool).share_memory_()

    @property
    def counts_in_workers(self) -> bool:
        """Whether numbers go on changing in the workers' copies of the data set, so that new workers lack them."""
        return bool(self._has_counted)

    def _note_change(self) -> None:
        """Compare the numbers of the data set with those with which the batch or the epoch began."""
        if self._inside is not None and numbers_of(self._inside.objects) != self._numbers:
            self._has_counted[0] = True

    @property
    def dataset(self) -> Any:
        """The program's own data set."""
        return self._dataset

    def _prepare(self, epoch: int, seed: str) -> None:
        if self._inside is None:
            self._look()
        assert self._inside is not None
        if epoch != self._epoch:
            self._epoch = epoch
            self._inside.set_epoch(epoch)
        _seed(seed)
        generators.reseed(self._inside.generators, seed)
        self._numbers = numbers_of(self._inside.objects)

    def _look(self) -> int:
        """Look for generators, if there are more than before; return how many there are now."""
        if self._inside is None or self._inside.new_generators(self._dataset, self._collate):
            self._inside = Inside(self._dataset, self._collate)
        return len(self._inside.generators)

    def _loaded(self, seeded: SeededIndex, load: Callable[[], Any]) -> Any:
        """What ``load`` returns, with the random numbers of this batch.

        A data set may make its generator when it is first needed. That one, too, has to draw the same numbers for this
        batch as in a worker that has had the generator before; so the batch is loaded again.
        """
        is_warm = self._inside is not None  # What is set once, with the first batch, is no count.
        self._prepare(seeded.epoch, seeded.seed)
        before = 0 if self._inside is None else len(self._inside.generators)
        loaded = load()
        if self._look() > before:
            self._prepare(seeded.epoch, seeded.seed)
            loaded = load()
        if is_warm:
            self._note_change()
        return loaded

    def __len__(self) -> int:
        """The length of the dataset itself."""
        return len(self._dataset)


class SeededDataset(_Prepared):
    """A map-style dataset whose random draws in ``__getitem__`` are the same for the same batch."""

    def __getitems__(self, seeded: SeededIndex) -> Any:
        """The items of a batch."""
        many = getattr(self._dataset, "__getitems__", None) or self._one_by_one
        return self._loaded(seeded, lambda: many(seeded.index))

    def _one_by_one(self, indices: Any) -> list[Any]:
        return [self._dataset[one] for one in indices]

    def __getitem__(self, seeded: SeededIndex) -> Any:
        """One item, for a loader that makes no batches."""
        return self._loaded(seeded, lambda: self._dataset[seeded.index])


class SeededStream(_Prepared, IterableDataset):
    """An iterable dataset whose random draws in a worker are the same for the same epoch."""

    def __init__(self, dataset: Any, collate: Any) -> None:
        super().__init__(dataset, collate)
        # In shared memory, because workers that persist must get to know the next epoch: its number, and its seed.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()

    def begin(self, epoch: int, seed: int) -> None:
        """Set the epoch that the workers begin next. Called in the main process, before the loader is iterated over."""
        self._shared[0], self._shared[1] = epoch, seed

    def __iter__(self) -> Iterator[Any]:
        """The items of the epoch."""
        epoch, seed = self._shared.tolist()
        self._note_change()
        info = get_worker_info()
        self._prepare(epoch, f"{seed}/{epoch}/{0 if info is None else info.id}")
        return iter(self._dataset)


class InitWorker:
    """Calls the program's own ``worker_init_fn`` with the program's own dataset in ``get_worker_info()``."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self._worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        """Called in the worker, before its first batch."""
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, _Prepared):
            # This is the worker's own copy, not the parent's. A WorkerInfo refuses ordinary assignment.
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self._worker_init_fn is not None:
            self._worker_init_fn(worker_id)


def _seed(text: str) -> None:
    # Python's generator seeds its whole state from a string; the other two are seeded by numbers from it.
    random.seed(text)
    torch.default_generator.manual_seed(random.getrandbits(63))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(random.getrandbits(32))
    info = get_worker_info()
    if info is not None:
        # A data set may seed a generator of its own with it. A WorkerInfo refuses ordinary assignment.
        object.__setattr__(info, "seed", torch.initial_seed())
