"""Batches from any iterable and the position in it, so that a resumed run continues with the next batch."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from stepguard.errors import CheckpointMismatchError
from stepguard.steps.random_streams import RandomStreams
from stepguard.words import logger

_log = logger(__name__)

_END = object()


class Feed(ABC):
    """The batches of one loader, epoch after epoch. For the training thread, or a thread that holds the boundary.

    ``epoch`` is the number of complete epochs, ``batches`` the number of batches in this epoch whose steps are done.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.epoch = 0
        self.batches = 0
        self._iterator: Iterator[Any] | None = None
        # The number of batches of the current epoch that were handed out, including those of the running step.
        self._given = 0
        # The number of batches of the epoch that an earlier process has seen; the next iterator begins after them.
        self._seen_before = 0

    def next(self, epochs: int | None) -> Any:
        """The next batch.

        Raises:
            StopIteration: ``epochs`` epochs are complete.
            ValueError: the loader has no batch at all.
        """
        while epochs is None or self.epoch < epochs:
            if self._iterator is None:
                with self.starting():
                    self._iterator = self._begin_epoch(self._seen_before)
                self._given, self._seen_before = self._seen_before, 0
            batch = next(self._iterator, _END)
            if batch is not _END:
                self._given += 1
                return batch
            self._iterator = None
            if not self._given and not self.is_repeatable:
                self.is_exhausted = True
                break
            if not self._given:
                raise ValueError(f"{shown(self.loader)}: expected at least one batch in an epoch, found none")
            self.epoch += 1
            self.batches = self._given = 0
        raise StopIteration

    starting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """The context in which an epoch begins, and the loader starts its processes."""
    is_repeatable = True
    is_exhausted = False
    """Whether this is an iterator that has ended and does not begin again."""

    def consumed(self) -> None:
        """The step with the batches handed out so far is done."""
        self.batches = self._given

    @property
    def is_last_batch(self) -> bool | None:
        """Whether the batch handed out last is the last of its epoch; ``None`` if the loader has no length."""
        number = length(self.loader)
        return None if number is None else self._given >= number

    def position(self) -> dict[str, Any]:
        """The current position, as plain values and tensors."""
        return {"epoch": self.epoch, "batches": self.batches, "loader": self._description()}

    def resume(self, position: Mapping[str, Any], processes: int = 1) -> None:
        """Begin at ``position``, which an earlier process has saved; ``processes`` is the number of processes now.

        Raises:
            CheckpointMismatchError: the position belongs to another loader.
        """
        saved, found = dict(position["loader"]), self._description()
        batches, before = position["batches"], position.get("processes", 1)
        if before != processes:
            # Each process now has another share of the epoch. Rounded down, so that a batch is seen twice, not never.
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
                f"{shown(self.loader)}: this is not the loader with which the checkpoint was saved, so its position "
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
        """The properties of the loader that must be the same when a run resumes."""
        return {
            "kind": type(self).__name__,
            "batches in an epoch": length(self.loader),
            "batch size": getattr(self.loader, "batch_size", None),
        }


class IterableFeed(Feed):
    """Any other iterable. A resumed run reads the seen batches again, and drops them.

    The order must therefore be the same whenever iteration begins with the same random states.
    """

    def __init__(self, loader: Any, streams: RandomStreams) -> None:
        super().__init__(loader)
        self._streams = streams
        self._order: dict[str, Any] | None = None
        self.is_repeatable = not isinstance(loader, Iterator)

    def position(self) -> dict[str, Any]:
        """The position, with the random states at the beginning of the epoch."""
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
            self._order = self._streams.capture()
            return iter(self.loader)
        with self._streams.preserved():
            self._streams.restore(self._order)
            iterator: Iterator[Any] = iter(self.loader)
            _log.info("reading %d batches that were seen before the restart, and dropping them", skip)
            for _ in range(skip):
                next(iterator, None)
        return iterator


def length(sized: Any) -> int | None:
    """The number of items in ``sized``; ``None`` if unknown."""
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def shown(loader: Any) -> str:
    """The argument of ``steps``, for messages."""
    return f"steps({type(loader).__name__})"
