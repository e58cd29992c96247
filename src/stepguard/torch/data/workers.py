"""Random numbers in the worker processes of a DataLoader: the same for a batch, whichever worker loads it and when.

PyTorch seeds each worker once, so that what a worker draws depends on all that it has drawn before, and a resumed run,
whose workers are new, would draw something else. Here each batch has a seed of its own.
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
    """What a sampler gave for one batch (or, without batches, for one item), and the seed for loading it."""

    index: Any
    seed: str


class SeededDataset:
    """A map-style dataset whose ``__getitem__`` may draw random numbers: it draws the same ones for the same batch."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, seeded: SeededIndex) -> Any:
        """The items of a batch."""
        _seed(seeded.seed)
        many = getattr(self._dataset, "__getitems__", None)
        return many(seeded.index) if many else [self._dataset[one] for one in seeded.index]

    def __getitem__(self, seeded: SeededIndex) -> Any:
        """The one item of a loader that makes no batches."""
        _seed(seeded.seed)
        return self._dataset[seeded.index]

    def __len__(self) -> int:
        """The length of the dataset itself."""
        return len(self._dataset)


class InitWorker:
    """The program's own ``worker_init_fn``, which finds its dataset where it expects it."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self._worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        """In the worker, before its first batch."""
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, SeededDataset):
            # The copy that this worker has, and not that of the parent. A WorkerInfo refuses to be assigned to.
            object.__setattr__(info, "dataset", info.dataset._dataset)
        if self._worker_init_fn is not None:
            self._worker_init_fn(worker_id)


def _seed(text: str) -> None:
    # Python spreads a string over the whole state; the other two get numbers from there.
    random.seed(text)
    torch.default_generator.manual_seed(random.getrandbits(63))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(random.getrandbits(32))
