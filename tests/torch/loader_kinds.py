"""Loaders of all kinds, with the numbers of workers that they can have, for the tests of an exact resume.

Each is made by ``KINDS[kind](workers, persistent)``, as a program makes it when it starts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader

ITEMS = 24
BATCH = 4
BATCHES = ITEMS // BATCH


class Items(Dataset):
    """Numbers, each with a random part from every generator that a data set may use."""

    def __init__(self) -> None:
        self.own = np.random.default_rng(5)
        self.mine = random.Random(5)
        self.noise = torch.Generator().manual_seed(5)

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = [np.random.rand(), random.random(), self.own.random(), self.mine.random()]
        return torch.tensor([float(index), *drawn, float(torch.rand(())), float(torch.rand((), generator=self.noise))])


class Stream(IterableDataset):
    """The same numbers one after the other, each worker its share, through a buffer that shuffles."""

    def __init__(self) -> None:
        self.items = Items()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        number, of = (0, 1) if info is None else (info.id, info.num_workers)
        buffer: list[int] = []
        for index in range(number, ITEMS, of):
            buffer.append(index)
            if len(buffer) > 4:
                yield self._item(buffer.pop(random.randrange(len(buffer))))
        while buffer:
            yield self._item(buffer.pop(int(torch.randint(len(buffer), ()))))

    def _item(self, index: int) -> torch.Tensor:
        return torch.cat([self.items[index], torch.tensor([float(self.epoch)])])


class StatefulStream(Stream):
    """It knows its position, as the data sets of torchdata and of others do."""

    def __init__(self) -> None:
        super().__init__()
        self.at = 0
        self.is_loaded = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.at, self.is_loaded = (self.at if self.is_loaded else 0), False
        while self.at < ITEMS:
            self.at += 1
            yield self._item(self.at - 1)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.is_loaded = state["at"], True


class OwnEpochs:
    """A loader that counts its epochs itself, and draws the order of an epoch from that number."""

    def __init__(self) -> None:
        self.epoch = self.at = 0
        self.items = Items()

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = np.random.default_rng(self.epoch).permutation(ITEMS)
        while self.at < BATCHES:
            self.at += 1
            yield torch.stack([self.items[int(one)] for one in order[(self.at - 1) * BATCH : self.at * BATCH]])
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


class Raising(OwnEpochs):
    """A loader with a state_dict that fails, as one of Accelerate's has."""

    def __init__(self) -> None:
        super().__init__()
        self.loader = loader(Items(), 0, False, shuffle=True)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.loader)

    def state_dict(self) -> dict[str, int]:
        raise AttributeError("there is none")


class NumPySampler(Sampler):
    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.permutation(ITEMS).tolist())

    def __len__(self) -> int:
        return ITEMS


class OldNumPySampler(NumPySampler):
    def __init__(self) -> None:
        self.rng = np.random.RandomState(3)


class PythonSampler(Sampler):
    def __init__(self) -> None:
        self.rng = random.Random(3)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.sample(range(ITEMS), ITEMS))

    def __len__(self) -> int:
        return ITEMS


class InPlaceSampler(PythonSampler):
    """It shuffles the same list again and again, so that an epoch depends on those before it."""

    def __init__(self) -> None:
        self.order = list(range(ITEMS))

    def __iter__(self) -> Iterator[int]:
        random.shuffle(self.order)
        return iter(self.order)


class LazySampler(PythonSampler):
    """It draws each index when it is asked for it, from a pool: between the draws of the training."""

    def __iter__(self) -> Iterator[int]:
        pool = list(range(ITEMS))
        while pool:
            yield pool.pop(random.randrange(len(pool)))


class CountingSampler(PythonSampler):
    """It counts its epochs itself, and draws the order of an epoch from that number."""

    def __init__(self) -> None:
        self.begun = 0

    def __iter__(self) -> Iterator[int]:
        self.begun += 1
        return iter(random.Random(self.begun).sample(range(ITEMS), ITEMS))


class CountingStream(Stream):
    """It goes on in each epoch where the last one has ended."""

    at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(ITEMS):
            self.at += 5
            yield self._item(self.at % ITEMS)


class CountingItems(Items):
    """What an item is depends on how many there were before."""

    given = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.given += 1
        return super().__getitem__(index) + self.given


class Wrapper:
    """As prefetchers are: it passes batches and attributes on."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __iter__(self) -> Iterator[Any]:
        yield from self.base

    def __len__(self) -> int:
        return len(self.base)

    def __getattr__(self, name: str) -> Any:
        if name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)


class Endless(DataLoader):
    """A loader whose iterator is made once and goes on for ever, of which an epoch is a part."""

    def __iter__(self) -> Iterator[Any]:
        inner = super().__iter__()
        for _ in range(len(self)):
            yield next(inner)


def loader(data: Any, workers: int, persistent: bool, kind: Any = DataLoader, **options: Any) -> Any:
    options = options if "batch_sampler" in options else {"batch_size": BATCH, **options}
    return kind(data, num_workers=workers, persistent_workers=persistent and workers > 0, **options)


def of_items(kind: Any = DataLoader, **make: Callable[[], Any]) -> Callable[[int, bool], Any]:
    """A maker of loaders over a map-style data set; ``make`` has what is made anew for each of them."""
    return lambda workers, persistent: loader(
        Items(), workers, persistent, kind, **{name: one() for name, one in make.items()}
    )


def shuffled(workers: int, persistent: bool) -> Any:
    return loader(Items(), workers, persistent, shuffle=True)


def prepared(workers: int, persistent: bool, **configuration: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**configuration))
    return accelerator.prepare(shuffled(workers, persistent))


def barred(workers: int, persistent: bool) -> Any:
    from tqdm import tqdm

    return tqdm(shuffled(workers, persistent), disable=True)


def zipped(workers: int, persistent: bool) -> Any:
    return zip(shuffled(workers, persistent), shuffled(workers, persistent), strict=False)


def zipped_by_function(workers: int, persistent: bool) -> Any:
    one, other = shuffled(workers, False), shuffled(workers, False)
    return lambda: zip(one, other, strict=False)


KINDS: dict[str, Callable[[int, bool], Any]] = {
    "in order": of_items(),
    "shuffled": shuffled,
    "a generator": of_items(shuffle=lambda: True, generator=lambda: torch.Generator().manual_seed(9)),
    "with replacement": of_items(sampler=lambda: RandomSampler(range(ITEMS), replacement=True)),
    "weighted": of_items(sampler=lambda: WeightedRandomSampler(range(1, ITEMS + 1), ITEMS)),
    "a batch sampler": of_items(batch_sampler=lambda: BatchSampler(RandomSampler(range(ITEMS)), BATCH, True)),
    "divided": of_items(sampler=lambda: DistributedSampler(range(2 * ITEMS), 2, 1)),
    "NumPy's generator": of_items(sampler=NumPySampler),
    "NumPy's old generator": of_items(sampler=OldNumPySampler),
    "Python's generator": of_items(sampler=PythonSampler),
    "a list shuffled in place": of_items(sampler=InPlaceSampler),
    "drawn lazily": of_items(sampler=LazySampler),
    "a sampler that counts": of_items(sampler=CountingSampler),
    "a stream that counts": lambda *_: loader(CountingStream(), 0, False),
    "items that are counted": lambda *_: loader(CountingItems(), 0, False, shuffle=True),
    "a subclass": of_items(Endless, shuffle=lambda: True),
    "torchdata's shuffled": of_items(StatefulDataLoader, shuffle=lambda: True),
    "torchdata's with PyTorch's sampler": of_items(StatefulDataLoader, sampler=lambda: RandomSampler(range(ITEMS))),
    "torchdata's with a subset": of_items(StatefulDataLoader, sampler=lambda: SubsetRandomSampler(range(ITEMS))),
    "torchdata's divided": of_items(StatefulDataLoader, sampler=lambda: DistributedSampler(range(2 * ITEMS), 2, 1)),
    "a stream": lambda workers, persistent: loader(Stream(), workers, persistent),
    "torchdata's stream": lambda workers, persistent: loader(Stream(), workers, persistent, StatefulDataLoader),
    "a stream with a state": lambda workers, persistent: loader(StatefulStream(), workers, persistent),
    "a loader with epochs of its own": lambda *_: OwnEpochs(),
    "a state_dict that fails": lambda *_: Raising(),
    "a wrapper": lambda workers, persistent: Wrapper(shuffled(workers, persistent)),
    "tqdm": barred,
    "Accelerate's": prepared,
    "Accelerate's stateful": lambda workers, persistent: prepared(workers, persistent, use_stateful_dataloader=True),
    "Accelerate's seedable": lambda workers, persistent: prepared(workers, persistent, use_seedable_sampler=True),
    "a list of batches": lambda *_: list(loader(Items(), 0, False)),
    "a mapping": lambda workers, persistent: {
        "one": shuffled(workers, persistent),
        "other": loader(Stream(), workers, persistent),
    },
    "a function": zipped_by_function,
    "zip": zipped,
    "enumerate": lambda workers, persistent: enumerate(shuffled(workers, persistent)),
}

ONE_TIME = {"zip", "enumerate"}
"""Iterators, which have one epoch."""
