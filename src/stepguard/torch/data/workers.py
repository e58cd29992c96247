"""Random numbers in a DataLoader's workers: the same for a batch, whichever worker loads it and whenever.

PyTorch seeds each worker once, so the numbers that a worker draws depend on all its earlier draws. A resumed run has
new workers, which would draw other numbers. Here each batch has its own seed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import get_worker_info


@dataclass(frozen=True, slots=True)
class SeededIndex:
    """The indices of one batch (or, without batches, the index of one item), and the seed for loading it."""

    index: Any
    seed: str


class SeededDataset:
    """A map-style dataset whose random draws in ``__getitem__`` are the same for the same batch."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, seeded: SeededIndex) -> Any:
        """The items of a batch."""
        _seed(seeded.seed)
        many = getattr(self._dataset, "__getitems__", None)
        return many(seeded.index) if many else [self._dataset[one] for one in seeded.index]

    def __getitem__(self, seeded: SeededIndex) -> Any:
        """One item, for a loader that makes no batches."""
        _seed(seeded.seed)
        return self._dataset[seeded.index]

    def __len__(self) -> int:
        """The length of the dataset itself."""
        return len(self._dataset)


class InitWorker:
    """Calls the program's own ``worker_init_fn`` with the program's own dataset in ``get_worker_info()``."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self._worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        """Called in the worker, before its first batch."""
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, SeededDataset):
            # This is the worker's own copy, not the parent's. A WorkerInfo refuses ordinary assignment.
            object.__setattr__(info, "dataset", info.dataset._dataset)
        if self._worker_init_fn is not None:
            self._worker_init_fn(worker_id)


def _seed(text: str) -> None:
    # Python's generator seeds its whole state from a string; the other two are seeded by numbers from it.
    random.seed(text)
    torch.default_generator.manual_seed(random.getrandbits(63))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(random.getrandbits(32))
