"""Loaders of all kinds, with the numbers of workers that they can have, for the tests of an exact resume.

Each is made by ``KINDS[kind](workers, persistent)``, as a program makes it when it starts.
"""

from __future__ import annotations

import functools
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
from torchdata import nodes
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


class OrderedStream(StatefulStream):
    """Its order is of its state, and drawn in each epoch from a generator of its own, needed or not."""

    order: list[int]

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = torch.randperm(ITEMS, generator=self.items.noise).tolist()
        if not self.is_loaded:
            self.at, self.order = 0, order
        self.is_loaded = False
        return self._rest()

    def _rest(self) -> Iterator[torch.Tensor]:
        while self.at < ITEMS:
            self.at += 1
            yield self._item(self.order[self.at - 1])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "order": getattr(self, "order", [])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.order = state["order"]


class StreamOfIterators(Stream):
    """The iterators that it makes know their position."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return Position(self)


class Position:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.order = torch.randperm(ITEMS).tolist()
        self.at = 0

    def __iter__(self) -> Position:
        return self

    def __next__(self) -> torch.Tensor:
        if self.at == ITEMS:
            raise StopIteration
        self.at += 1
        return self.stream._item(self.order[self.at - 1])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.order = state["at"], state["order"]


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


class InPlaceArraySampler(PythonSampler):
    """It shuffles the same array again and again."""

    def __init__(self) -> None:
        self.order = np.arange(ITEMS)

    def __iter__(self) -> Iterator[int]:
        np.random.shuffle(self.order)
        return iter(self.order.tolist())


class RebindingSampler(PythonSampler):
    """It draws the order of an epoch from that of the epoch before."""

    def __init__(self) -> None:
        self.order = torch.arange(ITEMS)

    def __iter__(self) -> Iterator[int]:
        self.order = self.order[torch.randperm(ITEMS)]
        return iter(self.order.tolist())


class MadeWhenNeeded(PythonSampler):
    """It makes the list that it shuffles with the first epoch, and keeps the order of each in another."""

    def __init__(self) -> None:
        self.order: list[int] | None = None

    def __iter__(self) -> Iterator[int]:
        if self.order is None:
            self.order = list(range(ITEMS))
        random.shuffle(self.order)
        self.current = list(self.order)
        return iter(self.current)


class RangeSampler(Sampler):
    """The ranges of items to read at once, as tuples."""

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(BATCH * number, BATCH) for number in torch.randperm(BATCHES).tolist()])


class BucketSampler(PythonSampler):
    """Batches of items of one kind, which are shuffled in place in their buckets."""

    def __init__(self) -> None:
        self.buckets = {kind: list(range(kind, ITEMS, 2)) for kind in range(2)}

    def __iter__(self) -> Iterator[list[int]]:
        batches = []
        for bucket in self.buckets.values():
            random.shuffle(bucket)
            batches += [bucket[at : at + BATCH] for at in range(0, len(bucket), BATCH)]
        random.shuffle(batches)
        return iter(batches)

    def __len__(self) -> int:
        return BATCHES


class LossSampler(WeightedRandomSampler):
    """Its weights change in the middle of an epoch, as those of hard examples do."""

    def __init__(self) -> None:
        super().__init__(torch.ones(ITEMS), ITEMS)

    def note(self, items: list[torch.Tensor]) -> torch.Tensor:
        """Called as ``collate_fn``, in the process of the training."""
        for one in items:
            self.weights[int(one[0])] += 1
        return torch.stack(items)


OF_MODULE = np.random.default_rng(7)


def jittered(items: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(items) + float(OF_MODULE.random())


class JitteredItems(Items):
    """They draw from a generator of their module, by a function that they name."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return jittered([super().__getitem__(index)])[0]


class ChangedItems(Items):
    """Each item is changed in place when it is given, as an augmentation without a copy does."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = torch.ones(ITEMS)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.factors[index] *= 1.5
        return super().__getitem__(index) * self.factors[index]


class ReadAtOnce(Items):
    """A list of numbers, or a range of them, is one item."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        numbers = range(index[0], sum(index)) if isinstance(index, tuple) else index
        return torch.stack([super(ReadAtOnce, self).__getitem__(number) for number in numbers])


class ShufflingStream(Stream):
    """It shuffles the list of its shards in place at the beginning of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.shards = list(range(ITEMS))

    def __iter__(self) -> Iterator[torch.Tensor]:
        random.shuffle(self.shards)
        return (self._item(index) for index in list(self.shards))


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


class Again:
    """A sampler that gives the batches of another one again and again."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.batches


class BegunOnce(DataLoader):
    """It begins its iterator when it is made, as timm's and YOLO's loaders do that keep their workers."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        object.__setattr__(self, "batch_sampler", Again(self.batch_sampler))
        self.endless = super().__iter__()

    def __len__(self) -> int:
        return len(self.batch_sampler.batches)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self)):
            yield next(self.endless)


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


def of_module(workers: int, persistent: bool) -> Any:
    OF_MODULE.bit_generator.state = np.random.default_rng(7).bit_generator.state
    return loader(JitteredItems(), workers, persistent, shuffle=True)


def of_closure(workers: int, persistent: bool) -> Any:
    mine = random.Random(8)

    def collate(items: list[torch.Tensor], noise: np.random.Generator) -> torch.Tensor:
        return torch.stack(items) + mine.random() + float(noise.random())

    noisy = functools.partial(collate, noise=np.random.default_rng(8))
    return loader(Items(), workers, persistent, shuffle=True, collate_fn=noisy)


def by_loss(*_: Any) -> Any:
    sampler = LossSampler()
    return loader(Items(), 0, False, sampler=sampler, collate_fn=sampler.note)


def of_torchdata(stream: Callable[[], Any]) -> Callable[[int, bool], Any]:
    return lambda workers, persistent: loader(stream(), workers, persistent, StatefulDataLoader)


def of_nodes(*_: Any) -> Any:
    items, ours = Items(), torch.Generator().manual_seed(9)
    batches = nodes.Batcher(nodes.SamplerWrapper(RandomSampler(range(ITEMS), generator=ours)), BATCH)
    return nodes.Loader(nodes.Mapper(batches, lambda numbers: torch.stack([items[number] for number in numbers])))


def of_nodes_in_threads(*_: Any) -> Any:
    batches = nodes.Batcher(nodes.SamplerWrapper(RandomSampler(range(ITEMS))), BATCH)
    return nodes.Loader(nodes.Prefetcher(nodes.ParallelMapper(batches, torch.tensor, num_workers=2), 2))


def read_at_once(sampler: Callable[[], Any]) -> Callable[[int, bool], Any]:
    return lambda workers, persistent: loader(ReadAtOnce(), workers, persistent, batch_size=None, sampler=sampler())


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
    "an array shuffled in place": of_items(sampler=InPlaceArraySampler),
    "an order made of the last": of_items(sampler=RebindingSampler),
    "a list made when it is needed": of_items(sampler=MadeWhenNeeded),
    "batches read at once": read_at_once(lambda: BatchSampler(RandomSampler(range(ITEMS)), BATCH, drop_last=False)),
    "ranges read at once": read_at_once(RangeSampler),
    "buckets": of_items(batch_sampler=BucketSampler),
    "weights that change": by_loss,
    "a generator of the module": of_module,
    "a generator in a closure": of_closure,
    "items changed in place": lambda *_: loader(ChangedItems(), 0, False, shuffle=True),
    "a stream that shuffles its shards": lambda *_: loader(ShufflingStream(), 0, False),
    "drawn lazily": of_items(sampler=LazySampler),
    "a sampler that counts": of_items(sampler=CountingSampler),
    "a stream that counts": lambda *_: loader(CountingStream(), 0, False),
    "items that are counted": lambda *_: loader(CountingItems(), 0, False, shuffle=True),
    "a subclass": of_items(Endless, shuffle=lambda: True),
    "begun when it was made": of_items(BegunOnce, shuffle=lambda: True),
    "torchdata's shuffled": of_items(StatefulDataLoader, shuffle=lambda: True),
    "torchdata's with PyTorch's sampler": of_items(StatefulDataLoader, sampler=lambda: RandomSampler(range(ITEMS))),
    "torchdata's with a subset": of_items(StatefulDataLoader, sampler=lambda: SubsetRandomSampler(range(ITEMS))),
    "torchdata's divided": of_items(StatefulDataLoader, sampler=lambda: DistributedSampler(range(2 * ITEMS), 2, 1)),
    "a stream": lambda workers, persistent: loader(Stream(), workers, persistent),
    "torchdata's stream": lambda workers, persistent: loader(Stream(), workers, persistent, StatefulDataLoader),
    "torchdata's stream with a state": of_torchdata(StatefulStream),
    "torchdata's stream with its order as state": of_torchdata(OrderedStream),
    "torchdata's stream of iterators with a state": of_torchdata(StreamOfIterators),
    "a stream with a state": lambda workers, persistent: loader(StatefulStream(), workers, persistent),
    "a stream with its order as state": lambda *_: loader(OrderedStream(), 0, False),
    "a loader with epochs of its own": lambda *_: OwnEpochs(),
    "a state_dict that fails": lambda *_: Raising(),
    "a wrapper": lambda workers, persistent: Wrapper(shuffled(workers, persistent)),
    "tqdm": barred,
    "Accelerate's": prepared,
    "Accelerate's stateful": lambda workers, persistent: prepared(workers, persistent, use_stateful_dataloader=True),
    "Accelerate's seedable": lambda workers, persistent: prepared(workers, persistent, use_seedable_sampler=True),
    "torchdata's nodes": of_nodes,
    "torchdata's nodes in threads": of_nodes_in_threads,
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
