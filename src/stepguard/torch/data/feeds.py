"""Batches from a loader, and the position in it: how a resumed run goes on with the very next batch.

What "the same order" rests on: the order of an epoch is drawn by the sampler when the epoch begins. The random states
of that moment are kept, so that a new process draws the same order, and leaves out what was seen without loading it.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from stepguard.errors import CheckpointMismatchError
from stepguard.torch import random_states
from stepguard.torch.checkpoint.state import check_saveable
from stepguard.torch.data.workers import InitWorker, SeededDataset, SeededIndex

_log = logging.getLogger(__name__)

_END = object()


class Feed(ABC):
    """The batches of one loader, epoch after epoch. For the thread that trains, or one that holds the boundary.

    ``epoch`` counts the epochs that are complete, ``batches`` the batches of the current one whose steps are done.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.epoch = 0
        self.batches = 0
        self._iterator: Iterator[Any] | None = None
        # How many batches of the epoch another process has seen: the next iterator begins behind them.
        self._seen_before = 0

    def next(self, epochs: int | None) -> Any:
        """The next batch.

        Raises:
            StopIteration: ``epochs`` epochs are complete.
            ValueError: the loader has no batch at all.
        """
        while epochs is None or self.epoch < epochs:
            if self._iterator is None:
                self._iterator = self._begin_epoch(self._seen_before)
                self._seen_before = 0
            batch = next(self._iterator, _END)
            if batch is not _END:
                return batch
            if self.batches == 0:
                raise ValueError(f"{_shown(self.loader)}: expected at least one batch in an epoch, found none")
            self._iterator = None
            self.epoch += 1
            self.batches = 0
            if not self.is_repeatable:
                break
        raise StopIteration

    is_repeatable = True

    def consumed(self) -> None:
        """The step with the last batch is done."""
        self.batches += 1

    def position(self) -> dict[str, Any]:
        """Where this is now, as plain values and tensors."""
        return {"epoch": self.epoch, "batches": self.batches, "loader": self._description()}

    def resume(self, position: Mapping[str, Any], processes: int = 1) -> None:
        """Begin at ``position``, which another process has saved; now there are ``processes`` of them.

        Raises:
            CheckpointMismatchError: it belongs to another loader.
        """
        saved, found = dict(position["loader"]), self._description()
        batches, before = position["batches"], position.get("processes", 1)
        if before != processes:
            # Each process then has another share of the same epoch. Rounded down: rather seen twice than not at all.
            batches = batches * before // processes
            saved.pop("batches in an epoch", None)
            found.pop("batches in an epoch", None)
        if saved != found:
            differences = ", ".join(
                f"{key}: expected {saved.get(key)}, found {found.get(key)}"
                for key in sorted({*saved, *found})
                if saved.get(key) != found.get(key)
            )
            raise CheckpointMismatchError(
                f"{_shown(self.loader)}: this is not the loader with which the checkpoint was saved, so its position "
                f"in the data (epoch {position['epoch']}, batch {position['batches']}) means nothing here "
                f"({differences}). Use the same loader; or pass resume_data=False to begin a new epoch with this one"
            )
        self.epoch = position["epoch"]
        self.batches = self._seen_before = batches

    def close(self) -> None:
        """End the workers of the loader."""
        self._iterator = None

    @abstractmethod
    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        """An iterator over the current epoch without its first ``skip`` batches."""

    def _description(self) -> dict[str, Any]:
        """What must be the same in a run that goes on here."""
        return {
            "kind": type(self).__name__,
            "batches in an epoch": _length(self.loader),
            "batch size": getattr(self.loader, "batch_size", None),
        }


class MapFeed(Feed):
    """A standard DataLoader over a map-style dataset: what was seen is left out at the sampler, and never loaded."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self._order: dict[str, Any] | None = None
        self._generators = _generators(loader)
        self._worker_seed = torch.initial_seed()
        # The program's own loader stays as it is, for its other uses.
        self._ordered: Any = copy.copy(loader)
        self._ordered._iterator = None
        sampler = "sampler" if loader.batch_sampler is None else "batch_sampler"
        replaced: dict[str, Any] = {sampler: _Order(self, getattr(loader, sampler))}
        if loader.num_workers > 0:
            replaced["dataset"] = SeededDataset(loader.dataset)
            self._ordered.worker_init_fn = InitWorker(loader.worker_init_fn)
        for name, value in replaced.items():
            # A DataLoader refuses to have these assigned once it is made; the copy is not in use yet.
            object.__setattr__(self._ordered, name, value)
        self._skip = 0
        self._streams_before: dict[str, Any] | None = None

    def position(self) -> dict[str, Any]:
        """With the random states from which the order of this epoch was drawn."""
        position = {**super().position(), "worker_seed": self._worker_seed}
        if self.batches:
            position["order"] = self._order
        else:
            position["generators"] = self._generator_states()
        return position

    def resume(self, position: Mapping[str, Any], processes: int = 1) -> None:
        """Begin at ``position``."""
        super().resume(position, processes)
        self._worker_seed = position["worker_seed"]
        self._order = position.get("order")
        self._set_generators(position.get("generators", ()))

    def close(self) -> None:
        """Also end workers that persist from epoch to epoch."""
        super().close()
        self._ordered._iterator = None

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        for sampler in _samplers(self.loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        self._skip = skip
        streams = self._streams()
        # Workers that persist draw their seed once, in the first epoch: new ones must not draw it again in a later.
        is_new = self._ordered.persistent_workers and self._ordered._iterator is None and self.epoch > 0
        self._streams_before = streams if is_new else None
        iterator = iter(self._ordered)
        if skip:
            random_states.restore(streams["random"])
        return iterator

    def indices(self, sampler: Any) -> Iterator[Any]:
        """What ``sampler`` draws for the current epoch, without what was seen."""
        epoch, skip = self.epoch, self._skip
        live = random_states.capture() if skip else None
        if skip and self._order is not None:
            self._restore_streams(self._order)
        elif self._streams_before is not None:
            self._restore_streams(self._streams_before)
        self._order = self._streams()
        drawn = iter(sampler)
        for _ in range(skip):
            next(drawn, None)
        index = next(drawn, _END)
        if live is not None:
            # From here on the streams are those of the training again.
            random_states.restore(live)
        number = skip
        while index is not _END:
            if self._ordered.num_workers > 0:
                yield SeededIndex(index, f"{self._worker_seed}/{epoch}/{number}")
            else:
                yield index
            number += 1
            index = next(drawn, _END)

    def _streams(self) -> dict[str, Any]:
        return {"random": random_states.capture(), "generators": self._generator_states()}

    def _restore_streams(self, streams: Mapping[str, Any]) -> None:
        random_states.restore(streams["random"])
        self._set_generators(streams["generators"])

    def _generator_states(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._generators]

    def _set_generators(self, states: Any) -> None:
        for generator, state in zip(self._generators, states, strict=False):
            generator.set_state(state)

    def _description(self) -> dict[str, Any]:
        loader = self.loader
        return {
            **super()._description(),
            "batch size": getattr(loader.batch_sampler, "batch_size", loader.batch_size),
            "items in the dataset": _length(loader.dataset),
        }


class _Order:
    """Stands in the place of a loader's sampler."""

    def __init__(self, feed: MapFeed, sampler: Any) -> None:
        self._feed = feed
        self._sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        return self._feed.indices(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


class StatefulFeed(Feed):
    """A loader with ``state_dict`` and ``load_state_dict``, such as torchdata's StatefulDataLoader."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        check_saveable("the loader's state_dict()", loader.state_dict())

    def position(self) -> dict[str, Any]:
        """With the loader's own state."""
        position = super().position()
        if self.batches:
            position["state"] = self.loader.state_dict()
        return position

    def resume(self, position: Mapping[str, Any], processes: int = 1) -> None:
        """Begin at ``position``."""
        super().resume(position, processes)
        if "state" in position:
            self.loader.load_state_dict(position["state"])

    def close(self) -> None:
        """Also let go of the iterator that torchdata's loader keeps."""
        super().close()
        if isinstance(self.loader, DataLoader):
            # Left to the garbage collector, in a cycle, it waits for each of its workers in vain, five seconds.
            self.loader._iterator = None

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        if not skip:
            return iter(self.loader)
        with random_states.preserved():
            return iter(self.loader)


class IterableFeed(Feed):
    """Anything else that can be iterated over: a resumed run reads again, and drops, what was seen.

    The order must then be the same in each process that begins with the same random states.
    """

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._order: dict[str, Any] | None = None
        self.is_repeatable = not isinstance(loader, Iterator)

    def position(self) -> dict[str, Any]:
        """With the random states at the beginning of the epoch."""
        position = super().position()
        if self.batches:
            position["order"] = self._order
        return position

    def resume(self, position: Mapping[str, Any], processes: int = 1) -> None:
        """Begin at ``position``."""
        super().resume(position, processes)
        self._order = position.get("order")

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        dataset: Any = getattr(self.loader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self.epoch)
        if not skip or self._order is None:
            self._order = random_states.capture()
            return iter(self.loader)
        with random_states.preserved():
            random_states.restore(self._order)
            iterator = iter(self.loader)
            _log.info("reading %d batches that were seen before the restart, and dropping them", skip)
            for _ in range(skip):
                next(iterator, None)
        return iterator


def feed_of(loader: Any) -> Feed:
    """The feed for a loader of this kind.

    Raises:
        TypeError: it cannot be iterated over.
    """
    if callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None)):
        return StatefulFeed(loader)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return MapFeed(loader)
    if not hasattr(loader, "__iter__"):
        raise TypeError(f"steps: expected a loader or None, found {type(loader).__name__}: {loader!r:.80}")
    return IterableFeed(loader)


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    found: dict[int, Any] = {}
    for one in (loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None), loader.sampler):
        if one is not None:
            found[id(one)] = one
    return list(found.values())


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The generators of the loader's own, from which its order is drawn."""
    held = [loader.generator, *(getattr(sampler, "generator", None) for sampler in _samplers(loader))]
    return list({id(one): one for one in held if isinstance(one, torch.Generator)}.values())


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def _shown(loader: Any) -> str:
    return f"steps({type(loader).__name__})"
