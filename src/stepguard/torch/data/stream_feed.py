"""The position in loaders that are read from their beginning: iterable data sets, and wrappers around any loader."""

from __future__ import annotations

import copy
import functools
import gc
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from stepguard.steps.attributes import attributes
from stepguard.steps.feeds import FunctionFeed, IterableFeed, length, shown
from stepguard.torch.data import generators
from stepguard.torch.data.contents import Contents, Lists, is_saved, packed, put, warn_of_other_data
from stepguard.torch.data.counts import Counts, warn_of_counts_in_workers
from stepguard.torch.data.inside import Inside
from stepguard.torch.data.map_feed import keep_order
from stepguard.torch.data.set_before import SetBefore
from stepguard.torch.data.workers import InitWorker, SeededStream
from stepguard.torch.random_states import STREAMS
from stepguard.words import logger

_log = logger(__name__)


class StreamFeed(IterableFeed):
    """Any iterable, perhaps with loaders, samplers and data sets inside that want to know the number of the epoch."""

    def __init__(self, loader: Any, *roots: Any) -> None:
        super().__init__(loader, STREAMS)
        self._inside = Inside(*(roots or (loader,)))
        # Those of wrappers around them, such as the progress of a bar, are no part of the data.
        data: list[Any] = [one for one in self._inside.objects if isinstance(one, (Dataset, Sampler))]
        data += [Lists(batches=loader)] if type(loader) is list else []
        self._contents = Contents(data)
        self._marks = self._contents.marks()
        kept = [Counts(data, may_keep_more=True), self._contents] if data else []
        self._held = [*self._inside.generators, *kept]
        self._set_before = SetBefore(self._held)
        # The states of the generators inside at the beginning of the epoch.
        self._generators_before: Any = None
        self._put_back = generators.known_as_put_back()
        self._has_warned = False
        self.is_reordered: Callable[[], bool] = bool
        """Whether the program shuffles lists of its own in place, so that a restart cannot make this one again."""
        self.is_of_body = False
        """Whether this is a list that the body of the running epoch has made, so that it is that of no other epoch."""
        if not self.is_repeatable:
            _warn_of_workers(loader)

    def is_held_besides(self, others: int) -> bool:
        """Whether anybody holds the loader besides this feed and ``others`` references."""
        of_lists = type(self.loader) is list
        return super().is_held_besides(others + self._inside.holds(self.loader) + of_lists)

    def position(self) -> dict[str, Any]:
        """The position, with the states of the generators inside the loader at the beginning of the epoch."""
        position = super().position()
        if self._held:
            live = not self.batches
            position["generators"] = generators.states(self._held) if live else self._generators_before
        position["made"] = self._marks
        position["set before"] = self._set_before.saved()
        if self.batches and type(self.loader) is list and self.is_reordered() and is_saved(self.loader):
            position["list"] = packed(self.loader)
        return position

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        # First, because a list of batches gets the order that it had.
        if position["batches"] and type(self.loader) is list and "list" in position:
            put(self.loader, position["list"])
        self._generators_before = position.get("generators")
        self._set_before.restore(position.get("set before", ()))
        held = zip(self._held, self._generators_before or (), strict=False)
        if position["batches"]:
            generators.put_back(held, {})
        else:
            generators.put_back(self._set_before.without(held), self._put_back)
        super().resume(position, processes, is_checked=is_checked)
        if position["batches"] or type(self.loader) is not list or not self.is_of_body:
            warn_of_other_data(shown(self.loader), position.get("made", {}), self._marks)

    def begin_body(self) -> None:
        """Look at the data before the program sets up an epoch."""
        self._set_before.begin_body()

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        self._set_before.begin_epoch()
        if skip and self._generators_before is not None:
            generators.restore(self._held, self._generators_before)
        elif self._held:
            self._generators_before = generators.states(self._held)
        return super()._begin_epoch(skip)

    def _open(self) -> Iterator[Any]:
        for one, name in self._held_iterators():
            setattr(one, name, None)  # First, so that its workers end before others start.
            setattr(one, name, DataLoader.__iter__(one))
        return super()._open()

    def _held_iterators(self) -> list[tuple[DataLoader[Any], str]]:
        """The loaders inside that hold an iterator of their own over a sampler without an end, and its attributes.

        They have begun it when they were made, and give a part of it in each epoch. What it gives depends on all that
        it gave before, and on what it has fetched ahead, so it is begun anew with each epoch.
        """
        return [
            (one, name)
            for one in self._inside.loaders
            if _repeats(one)
            for name, held in vars(one).items()
            if isinstance(held, _BaseDataLoaderIter) and name != "_iterator"
        ]

    def _announce_epoch(self) -> None:
        self._inside.set_epoch(self.epoch)
        if self.epoch and self._restarts_workers():
            _log.warning(
                "%s: the persistent workers of the DataLoader inside are started anew in each epoch, because their "
                "random numbers would depend on the epochs before. To keep them, give steps() a DataLoader itself, "
                "made with persistent_workers=True",
                shown(self.loader),
            )

    def _restarts_workers(self) -> bool:
        """Have the loaders inside make new iterators. Returns whether a warning is due."""
        had_workers = any(one.num_workers for one, _ in self._held_iterators())
        for one in self._inside.loaders:
            had_workers = had_workers or (one.persistent_workers and one._iterator is not None)
            one._iterator = None
            if hasattr(one, "_initial_iter_for_state_dict"):
                # torchdata's loader has made an iterator to read its state.
                one._initial_iter_for_state_dict = False
        is_due = had_workers and not self._has_warned
        self._has_warned = self._has_warned or had_workers
        return is_due


class WorkerStreamFeed(StreamFeed):
    """A DataLoader with workers over an iterable data set. Its workers are told the epoch, and get a seed for it."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self._stream = SeededStream(loader.dataset, loader.collate_fn)
        # A copy, so that the program's own loader does not change for its other uses.
        self._seeded: Any = copy.copy(loader)
        self._seeded._iterator = None
        self._seeded.worker_init_fn = InitWorker(loader.worker_init_fn)
        keep_order(self._seeded)
        object.__setattr__(self._seeded, "dataset", self._stream)

    def position(self) -> dict[str, Any]:
        """The position, and whether the data set counts in its workers from epoch to epoch."""
        return {**super().position(), "counted": self._stream.counts_in_workers}

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        super().resume(position, processes, is_checked=is_checked)
        warn_of_counts_in_workers(shown(self.loader), position)

    def close(self) -> None:
        """Close the feed, and end workers that persist from epoch to epoch."""
        super().close()
        self._seeded._iterator = None

    def _restarts_workers(self) -> bool:
        return False

    def _open(self) -> Iterator[Any]:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        self._stream.begin(self.epoch, seed)
        return iter(self._seeded)


class TorchFunctionFeed(StreamFeed, FunctionFeed):
    """A function that makes an iterable. What it holds and what it names is searched for loaders and generators."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader, *_held_by(loader))

    def is_held_besides(self, others: int) -> bool:
        """Always: the same function may be defined again."""
        return FunctionFeed.is_held_besides(self, others)


def _held_by(function: Any) -> list[Any]:
    """The objects that a function refers to: its object, its arguments, its closure, and the globals that it names."""
    if isinstance(function, functools.partial):
        return [*function.args, *function.keywords.values(), *_held_by(function.func)]
    held = [function.__self__] if isinstance(function, types.MethodType) else []
    code = getattr(function, "__code__", None)
    if code is None:
        return held
    names = [function.__globals__[name] for name in code.co_names if name in function.__globals__]
    return [*held, function, *names]


def _repeats(loader: DataLoader[Any]) -> bool:
    """Whether the sampler of ``loader`` gives a sampler inside of it again and again, and an epoch is one of these."""
    sampler, batches = loader._index_sampler, length(loader)
    is_endless = batches is not None and length(sampler) is None and not isinstance(loader.dataset, IterableDataset)
    return is_endless and any(length(one) == batches for one in attributes(sampler).values())


def _warn_of_workers(loader: Any) -> None:
    """Warn of an iterator of the program's own over a DataLoader with workers: these have drawn their seeds already."""
    queue = [loader]
    for _ in range(4):
        queue = [one for held in queue for one in gc.get_referents(held) if not isinstance(one, type)][:100]
        if any(isinstance(one, _MultiProcessingDataLoaderIter) for one in queue):
            _log.warning(
                "%s: an iterator over a DataLoader with workers, whose order and random numbers were drawn when the "
                "program made it. After a restart it is refused unless it has the same batches again. Give steps() the "
                'loader itself, several loaders as {"a": a, "b": b}, or a function that makes the iterable, such as '
                "lambda: zip(a, b)",
                shown(loader),
            )
            return
