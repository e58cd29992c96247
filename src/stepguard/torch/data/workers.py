"""Random numbers in a DataLoader's workers: the same for a batch, whichever worker loads it and whenever.

PyTorch seeds each worker once, so the numbers that a worker draws depend on all its earlier draws. A resumed run has
new workers, which would draw other numbers. Here each batch of a map-style data set has its own seed, and each worker
has one for each epoch of an iterable data set. Workers that persist also get to know the number of the epoch here.
"""

from __future__ import annotations

import inspect
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils.worker import _ResumeIteration

from stepguard.torch.data import generators
from stepguard.torch.data.counts import numbers_of
from stepguard.torch.data.inside import Inside

_END = object()


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
        self._seed_of_epoch = ""

    def begin(self, epoch: int, seed: int) -> bool:
        """Set the epoch that the workers begin next. Called in the main process, before the loader is iterated over.

        Returns whether it is another than before.
        """
        before = self._shared.tolist()
        self._shared[0], self._shared[1] = epoch, seed
        return before != [epoch, seed]

    def __iter__(self) -> Iterator[Any]:
        """The items of the epoch."""
        epoch, seed = self._shared.tolist()
        self._note_change()
        info = get_worker_info()
        self._seed_of_epoch = f"{seed}/{epoch}/{0 if info is None else info.id}"
        self._prepare(epoch, self._seed_of_epoch)
        return iter(self._dataset)


class SeededBatches(SeededStream):
    """The same for a data set that a loader resumes in the middle of an epoch: each batch has its own seed.

    ``batch_size`` is the number of items in a batch. :meth:`of` makes one with a state if the data set has one.
    """

    def __init__(self, dataset: Any, collate: Any, batch_size: int) -> None:
        super().__init__(dataset, collate)
        self._batch_size = batch_size
        self._items: _Items | None = None
        # What the earlier process's worker had given, until an iterator has it.
        self._before: Mapping[str, Any] | None = None
        # The generators that were made late, with their states; and, in shared memory, whether they matter.
        self._new: dict[int, tuple[Any, bytes]] = {}
        self._has_new = torch.zeros(1, dtype=torch.bool).share_memory_()

    @staticmethod
    def of(dataset: Any, collate: Any, batch_size: int) -> SeededBatches:
        """The data set for the workers."""
        kind = _StatefulSeededBatches if has_state(dataset) else SeededBatches
        return kind(dataset, collate, batch_size)

    @property
    def has_new_generators(self) -> bool:
        """Whether a worker has made a generator after its first batch had begun, and goes on to draw from it."""
        return bool(self._has_new)

    def __iter__(self) -> Iterator[Any]:
        """The items of the epoch, or of its rest."""
        iterator = self.begin_epoch()
        kind = _StatefulItems if iterator is not self._dataset and has_state(iterator) else _Items
        self._items = kind(self, iterator)
        if self._before is not None:
            self._items.go_on(self._before)
            self._before = None
        return self._items

    def begin_epoch(self) -> Iterator[Any]:
        """An iterator over the items of the data set."""
        return super().__iter__()

    def begin_item(self, number: int) -> None:
        """Begin the random numbers of a batch, if the item is its first."""
        if not number % self._batch_size:
            seed = f"{self._seed_of_epoch}/{number}"
            _seed(seed)
            assert self._inside is not None
            generators.reseed(self._inside.generators, seed)
            self._note_new(self._inside)

    def _note_new(self, inside: Inside) -> None:
        """Note generators that were made meanwhile, and were drawn from since the batch before."""
        before, self._new = self._new, {}
        if inside.new_generators(self._dataset, self._collate):
            known = {id(one) for one in inside.generators}
            found = [one for one in Inside(self._dataset, self._collate).generators if id(one) not in known]
            self._new = {id(one): (one, pickle.dumps(generators.states([one]))) for one in found}
        if any(key in before and before[key][1] != state for key, (_, state) in self._new.items()):
            self._has_new[0] = True


class _StatefulSeededBatches(SeededBatches):
    def state_dict(self) -> dict[str, Any]:
        return {"state": self._dataset.state_dict(), **({} if self._items is None else self._items.count())}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._dataset.load_state_dict(saved["state"])
        self._before = saved


class _Items(Iterator[Any]):
    """The items of one epoch of ``batches``."""

    def __init__(self, batches: SeededBatches, iterator: Any) -> None:
        self._batches = batches
        self._iterator = iterator
        self._given = 0
        self._is_over = self._is_unbegun = False

    def __next__(self) -> Any:
        if self._is_over:
            raise StopIteration
        self._batches.begin_item(self._given)
        item = next(self._iterator, _END)
        if item is _END and self._is_unbegun:
            # The data set had the state of the end of the last epoch when this one had begun, and nothing was given.
            self._iterator = self._batches.begin_epoch()
            self._batches.begin_item(0)
            item = next(self._iterator, _END)
        self._is_unbegun = False
        if item is _END:
            self._is_over = True
            raise StopIteration
        self._given += 1
        return item

    def count(self) -> dict[str, Any]:
        """How many items were given, and whether that is all."""
        return {"given": self._given, "over": self._is_over}

    def go_on(self, saved: Mapping[str, Any]) -> None:
        """Go on after what :meth:`count` has returned."""
        self._given, self._is_over = saved.get("given", 0), saved.get("over", False)
        self._is_unbegun = not self._given


class _StatefulItems(_Items):
    """Their iterator has a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {"state": self._iterator.state_dict(), **self.count()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._iterator.load_state_dict(saved["state"])
        self.go_on(saved)


def has_state(one: Any) -> bool:
    """Whether ``one`` has a state to save and load."""
    return callable(getattr(one, "state_dict", None)) and callable(getattr(one, "load_state_dict", None))


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


class _SeededIndices:
    """The queue of a worker that persists: with each iteration over the loader, its random numbers begin anew.

    The message for a next iteration brings the seed, which a new worker would have been started with.
    """

    def __init__(self, queue: Any, begin: Callable[[int], None], seed: int) -> None:
        self._queue = queue
        self._begin = begin
        self._seed: int | None = seed

    def get(self, **options: Any) -> Any:
        """The next message. The worker asks for the first one when it has called ``worker_init_fn``."""
        if self._seed is not None:
            self._begin(self._seed)
            self._seed = None
        found = self._queue.get(**options)
        if isinstance(found, _ResumeIteration) and found.seed is not None:
            self._begin(found.seed)
        return found


def with_seeded_indices(loop: Callable[..., None], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a worker's ``loop``, in a worker that persists, of a loader that the program iterates over."""
    given = inspect.signature(loop).bind_partial(*args).arguments
    dataset, collate, worker = given.get("dataset"), given.get("collate_fn"), given.get("worker_id")
    if not given.get("persistent_workers") or isinstance(dataset, _Prepared) or "base_seed" not in given:
        return args

    def begin(seed: int) -> None:
        text = f"{seed}/{worker}"
        _seed(text)
        generators.reseed(Inside(dataset, collate).generators, text)

    given["index_queue"] = _SeededIndices(given["index_queue"], begin, given["base_seed"])
    return tuple(given.values())


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
