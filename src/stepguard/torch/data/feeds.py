"""Batches from a loader and the position in it, so that a resumed run continues with the very next batch.

The sampler draws the order of an epoch when the epoch begins. The random states of that moment are saved. From them a
new process draws the same order, and skips the batches that were already seen without loading them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from stepguard.steps.feeds import Feed, IterableFeed, length
from stepguard.torch.checkpoint.state import check_saveable
from stepguard.torch.data.workers import InitWorker, SeededDataset, SeededIndex
from stepguard.torch.random_states import STREAMS

_END = object()


class MapFeed(Feed):
    """A standard DataLoader over a map-style dataset. Seen batches are skipped at the sampler and never loaded."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self._order: dict[str, Any] | None = None
        self._generators = _generators(loader)
        self._worker_seed = torch.initial_seed()
        # A copy, so that the program's own loader does not change for its other uses.
        self._ordered: Any = copy.copy(loader)
        self._ordered._iterator = None
        sampler = "sampler" if loader.batch_sampler is None else "batch_sampler"
        replaced: dict[str, Any] = {sampler: _Order(self, getattr(loader, sampler))}
        if loader.num_workers > 0:
            replaced["dataset"] = SeededDataset(loader.dataset)
            self._ordered.worker_init_fn = InitWorker(loader.worker_init_fn)
        for name, value in replaced.items():
            # A DataLoader refuses these assignments after its construction; this copy is not in use yet.
            object.__setattr__(self._ordered, name, value)
        self._skip = 0
        self._streams_before: dict[str, Any] | None = None

    def position(self) -> dict[str, Any]:
        """The position, with the random states from which the order of this epoch was drawn."""
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
        """Close the feed, and end workers that persist from epoch to epoch."""
        super().close()
        self._ordered._iterator = None

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        for sampler in _samplers(self.loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        self._skip = skip
        streams = self._streams()
        # Persistent workers draw their seed once, in the first epoch. If they are new in a later epoch (after a
        # resume), the draw of their seed must not change the order: `indices` puts these streams back first.
        is_new = self._ordered.persistent_workers and self._ordered._iterator is None and self.epoch > 0
        self._streams_before = streams if is_new else None
        iterator = iter(self._ordered)
        if skip:
            STREAMS.restore(streams["random"])
        return iterator

    def indices(self, sampler: Any) -> Iterator[Any]:
        """The indices that ``sampler`` draws for the current epoch, without those that were already seen."""
        epoch, skip = self.epoch, self._skip
        live = STREAMS.capture() if skip else None
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
            # From here on, draws come from the streams of the training again.
            STREAMS.restore(live)
        number = skip
        while index is not _END:
            if self._ordered.num_workers > 0:
                yield SeededIndex(index, f"{self._worker_seed}/{epoch}/{number}")
            else:
                yield index
            number += 1
            index = next(drawn, _END)

    def _streams(self) -> dict[str, Any]:
        return {"random": STREAMS.capture(), "generators": self._generator_states()}

    def _restore_streams(self, streams: Mapping[str, Any]) -> None:
        STREAMS.restore(streams["random"])
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
            "items in the dataset": length(loader.dataset),
        }


class _Order:
    """Takes the place of a loader's sampler."""

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
        """The position, with the loader's own state."""
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
        """Close the feed, and drop the iterator that torchdata's loader keeps."""
        super().close()
        if isinstance(self.loader, DataLoader):
            # If the garbage collector ended this iterator, which is in a cycle, it would wait five seconds in vain for
            # each of its workers.
            self.loader._iterator = None

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        if not skip:
            return iter(self.loader)
        with STREAMS.preserved():
            return iter(self.loader)


def feed_of(loader: Any) -> Feed:
    """The feed for a loader of any kind.

    Raises:
        TypeError: ``loader`` cannot be iterated over.
    """
    if callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None)):
        return StatefulFeed(loader)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return MapFeed(loader)
    if not hasattr(loader, "__iter__"):
        raise TypeError(f"steps: expected a loader or None, found {type(loader).__name__}: {loader!r:.80}")
    return IterableFeed(loader, STREAMS)


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    found: dict[int, Any] = {}
    for one in (loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None), loader.sampler):
        if one is not None:
            found[id(one)] = one
    return list(found.values())


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The loader's own generators, from which its order is drawn."""
    held = [loader.generator, *(getattr(sampler, "generator", None) for sampler in _samplers(loader))]
    return list({id(one): one for one in held if isinstance(one, torch.Generator)}.values())
