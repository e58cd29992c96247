"""Batches from any iterable and the position in it, so that a resumed run continues with the next batch."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import count, islice
from typing import Any

from stepguard.errors import CheckpointMismatchError
from stepguard.steps.apart import ApartIterator
from stepguard.steps.batch_marks import mark, peek
from stepguard.steps.random_streams import RandomStreams
from stepguard.steps.reading_again import read_again
from stepguard.words import logger

_log = logger(__name__)

_END = object()

_numbers = count()

ANYWAY = 'or pass resume_data="unchecked" to go on all the same, or resume_data=False to begin a new epoch'
"""How a program goes on all the same, for the end of an error."""


def _nothing_around(loader: Any) -> AbstractContextManager[None]:  # noqa: ARG001 - some frameworks need it
    return contextlib.nullcontext()


class Feed(ABC):
    """The batches of one loader, epoch after epoch. For the training thread, or a thread that holds the boundary.

    ``epoch`` is the number of complete epochs, ``batches`` the number of batches in this epoch whose steps are done.
    """

    is_repeatable = True
    is_exhausted = False
    """Whether this is an iterator that has ended and does not begin again."""
    starting: Callable[[Any], AbstractContextManager[None]] = staticmethod(_nothing_around)
    """The context for a loader in which an epoch begins, and the loader starts its processes."""
    read_again = 0
    """The number of batches that were read again since the start of the process."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.number = next(_numbers)
        """A number that no other feed of this process has."""
        self.loops = 0
        """How often ``steps`` was given the loader."""
        self.epoch = 0
        self.batches = 0
        self._iterator: Iterator[Any] | None = None
        # The number of batches of the current epoch that were handed out, including those of the running step.
        self._given = 0
        # The number of batches of the epoch that an earlier process has seen; the next iterator begins after them.
        self._seen_before = 0
        # Whether a position that does not fit is refused; otherwise it is a warning.
        self._is_checked = True

    def is_for(self, loader: Any) -> bool:
        """Whether this is the feed of ``loader``."""
        return self.loader is loader

    @property
    def is_over(self) -> bool:
        """Whether the data of the last epoch has ended, and no other epoch has begun."""
        return self._iterator is None and not self.batches and (self.epoch > 0 or self.is_exhausted)

    @property
    def is_held(self) -> bool:
        """Whether anybody but this feed holds the loader. Otherwise it cannot be given to ``steps`` again."""
        return self.is_held_besides(0)

    def is_held_besides(self, others: int) -> bool:
        """Whether anybody holds the loader besides this feed and ``others`` references."""
        return references(self) > _REFERENCES + others

    def next(self, epochs: int | None) -> Any:
        """The next batch.

        Raises:
            StopIteration: ``epochs`` epochs are complete.
            ValueError: the loader has no batch at all.
            CheckpointMismatchError: the loader has other batches than before the restart.
        """
        while epochs is None or self.epoch < epochs:
            if self._iterator is None:
                self.catch_up(_always)
            if self._iterator is None:
                self._iterator = self._start_epoch(self._seen_before)
                self._given, self._seen_before = self._seen_before, 0
            batch = next(self._iterator, _END)
            if batch is not _END:
                self._given += 1
                self._note(batch)
                return batch
            self._iterator = None
            if not self._given and not self.is_repeatable:
                self.is_exhausted = True
                break
            if not self._given and not self._may_be_empty():
                raise ValueError(f"{shown(self.loader)}: expected at least one batch in an epoch, found none")
            if self._given:
                self.end_epoch()
        raise StopIteration

    def catch_up(self, go_on: Callable[[], bool]) -> bool:  # noqa: ARG002 - for those that read
        """Go to the position of the earlier process, if that takes time. Called between two steps.

        Returns whether the position was reached; ``go_on`` says whether to read on.
        """
        return True

    def end_epoch(self) -> None:
        """Note that the epoch is complete."""
        self._iterator = None
        self.epoch += 1
        self.batches = self._given = self._seen_before = 0

    def begin_at(self, epoch: int) -> None:
        """Begin with the number of an epoch, at its first batch."""
        self.epoch = epoch

    def begin_body(self) -> None:  # noqa: B027 - most feeds keep nothing that a program sets
        """Called when the body of an epoch begins, before the program gives the loader to ``steps``."""

    def consumed(self) -> None:
        """The step with the batches handed out so far is done."""
        self.batches = self._given

    @property
    def length(self) -> int | None:
        """The number of batches in an epoch; ``None`` if unknown."""
        return length(self.loader)

    @property
    def is_last_batch(self) -> bool | None:
        """Whether the batch handed out last is the last of its epoch; ``None`` if the loader has no length."""
        number = self.length
        return None if number is None else self._given >= number

    def position(self) -> dict[str, Any]:
        """The current position, as plain values and tensors."""
        return {"epoch": self.epoch, "batches": self.batches, "loader": self.description()}

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``, which an earlier process has saved; ``processes`` is the number of processes now.

        Without ``is_checked`` a position that may not fit is a warning instead of an error.

        Raises:
            CheckpointMismatchError: the position belongs to another loader, or to another number of processes.
        """
        self._is_checked = is_checked
        before = position.get("processes", 1)
        differences = self._differences(position, processes)
        if differences:
            self._object(
                f"this is not the loader with which the checkpoint was saved, so its position in the data (epoch "
                f"{position['epoch']}, batch {position['batches']}) means nothing here ({differences}). Use the same "
                f"loader; or pass resume_data=False to begin a new epoch with this one"
            )
        self.epoch = position["epoch"]
        self.batches = position["batches"]
        if before != processes:
            self.batches = self._moved(position, before, processes)
        self._seen_before = self.batches

    def close(self) -> None:
        """End the workers of the loader."""
        self._iterator = None

    def rest(self) -> None:
        """End workers that persist from epoch to epoch; a next epoch starts new ones."""
        if self._iterator is None:
            self.close()

    def _start_epoch(self, skip: int) -> Iterator[Any]:
        with self.starting(self.loader):
            return self._begin_epoch(skip)

    @abstractmethod
    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        """An iterator over the current epoch without its first ``skip`` batches."""

    def _note(self, batch: Any) -> None:  # noqa: B027 - not all feeds look at their batches
        """Called with each batch that is handed out."""

    def _may_be_empty(self) -> bool:
        """Whether an epoch without a batch is no error, and another is to be begun."""
        return False

    def _moved(self, position: Mapping[str, Any], before: int, processes: int) -> int:
        """The number of batches that this process has seen, of a run that had ``before`` processes.

        Raises:
            CheckpointMismatchError: nobody can know.
        """
        batches = int(position["batches"])
        if batches:
            self._object(
                f"the checkpoint is of {before} processes in the middle of an epoch (batch {batches}), there are "
                f"{processes} now, and which of them is to read what is left cannot be known. Go on with {before}; "
                f"use a loader that is divided anew, which is one with a DistributedSampler for PyTorch, and "
                f"stepguard.jax.batches or Grain's ElasticIterator for JAX; {ANYWAY}"
            )
        # Rounded down, so that a batch is seen twice, not never.
        return batches * before // processes

    def _object(self, problem: str) -> None:
        """Raise CheckpointMismatchError, or warn if the program does not want the check."""
        text = f"{shown(self.loader)}: {problem}"
        if self._is_checked:
            raise CheckpointMismatchError(text)
        _log.warning("going on unchecked: %s", text)

    def _differences(self, position: Mapping[str, Any], processes: int) -> str:
        """The differences between the loader and the one at the save, as text."""
        saved, found = position["loader"], self.description()
        # Each of another number of processes has another share of the epoch.
        ignored = {"batches in an epoch"} if position.get("processes", 1) != processes else set()
        return ", ".join(
            f"{key}: expected {saved.get(key)}, found {found.get(key)}"
            for key in sorted({*saved, *found} - ignored)
            if saved.get(key) != found.get(key)
        )

    def description(self) -> dict[str, Any]:
        """The properties of the loader that must be the same when a run resumes."""
        return {
            "kind": type(self).__name__,
            "batches in an epoch": self.length,
            "batch size": getattr(self.loader, "batch_size", None),
        }


class IterableFeed(Feed):
    """Any other iterable. A resumed run reads the seen batches again, and drops them.

    The iterable draws from random streams of its own. It must have the same batches whenever its iteration begins with
    the same random states; a few values of the last batch are compared, and other values are refused.
    """

    def __init__(self, loader: Any, streams: RandomStreams) -> None:
        super().__init__(loader)
        self.is_repeatable = not isinstance(loader, Iterator)
        self._streams = streams
        self._is_list = isinstance(loader, (list, tuple, range))
        # The states with which the epoch began, and what the last batch was.
        self._order: dict[str, Any] | None = None
        self._peeked: Any = None
        self._mark_before: str | None = None

    def end_epoch(self) -> None:
        """Note that the epoch is complete."""
        super().end_epoch()
        self._order = self._peeked = self._mark_before = None

    def position(self) -> dict[str, Any]:
        """The position, with the random states at the beginning of the epoch and the digest of the last batch."""
        position = super().position()
        if self.batches:
            position["order"] = self._order
            position["last"] = self._last_mark()
        return position

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        super().resume(position, processes, is_checked=is_checked)
        self._order = position.get("order")
        self._mark_before = position.get("last") if position.get("processes", 1) == processes else None
        if self.batches and self._order is None and not self._is_list:
            self._object(f"the checkpoint lacks the random states with which the epoch began; {ANYWAY}")
        if self._is_list and self.batches:
            self._check(min(self.batches, len(self.loader)), peek(self.loader[self.batches - 1 : self.batches]))

    def catch_up(self, go_on: Callable[[], bool]) -> bool:
        """Read the seen batches again, under the random states with which the epoch began."""
        skip = self._seen_before
        if not skip or self._is_list or self._iterator is not None:
            return True
        iterator = self._start_epoch(skip)
        with self._streams.preserved():
            read, batch = read_again(iterator, skip, shown(self.loader), go_on, self._count)
        if read < skip and not go_on():
            return False
        self._check(read, peek([batch]))
        self._peeked = peek([batch])
        self._iterator, self._given, self._seen_before = iterator, skip, 0
        return True

    def _count(self) -> None:
        self.read_again += 1

    def _check(self, read: int, peeked: Any) -> None:
        expected, self._mark_before = self._mark_before, None
        if read < self.batches:
            self._object(
                f"expected the {self.batches} batches that were seen before the restart, and then more, found {read}. "
                f"{self._way()}"
            )
        elif expected is not None and mark(peeked) != expected:
            self._mark_before = expected
            self._object(
                f"read again, batch {self.batches} of epoch {self.epoch} is not what it was before the restart: "
                f"expected {expected}, found {mark(peeked)}, which are digests of a few of its values. {self._way()}"
            )

    def _way(self) -> str:
        if not self.is_repeatable:
            return (
                f"An iterator that the program makes is not made again as it was: give steps() the loader itself, "
                f'several loaders as {{"a": a, "b": b}}, or a function that makes the iterable, such as '
                f"lambda: zip(a, b); {ANYWAY}"
            )
        if self._is_list:
            return (
                f"If its order depends on the epochs before, as by random.shuffle(items) in each of them, draw each "
                f"anew, as by random.sample(items, len(items)); {ANYWAY}"
            )
        return (
            f"Its order must depend on nothing but the random states, the generators that it holds, and the epoch "
            f"given to set_epoch; {ANYWAY}"
        )

    def _last_mark(self) -> str | None:
        if self._is_list:
            return mark(peek(self.loader[self.batches - 1 : self.batches]))
        if self._given != self.batches or self._peeked is None:
            return self._mark_before
        return mark(self._peeked)

    def _note(self, batch: Any) -> None:
        if not self._is_list:
            self._peeked = peek([batch])

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        if self._is_list:
            return islice(iter(self.loader), skip, None)
        self._announce_epoch()
        if not skip or self._order is None:
            self._order = self._streams.fork("data")
        return ApartIterator(self._open, self._streams, self._order)

    def _announce_epoch(self) -> None:
        """Tell the number of the epoch to those inside who want to know it."""
        dataset: Any = getattr(self.loader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self.epoch)

    def _open(self) -> Iterator[Any]:
        return iter(self.loader)


class FunctionFeed(IterableFeed):
    """A function that makes an iterable, called anew for each epoch."""

    def is_for(self, loader: Any) -> bool:
        """Whether ``loader`` is this function, or the same one made again, as a lambda or method in a loop is."""
        mine = self.loader
        if isinstance(mine, types.MethodType) and isinstance(loader, types.MethodType):
            return mine.__self__ is loader.__self__ and mine.__func__ is loader.__func__
        if mine is loader or not (isinstance(mine, types.FunctionType) and isinstance(loader, types.FunctionType)):
            return mine is loader
        return mine.__code__ is loader.__code__ and _held(mine) == _held(loader)

    def is_held_besides(self, others: int) -> bool:  # noqa: ARG002 - as in the base
        """Always: the same function may be defined again."""
        return True

    @property
    def length(self) -> int | None:
        """Unknown."""
        return None

    def _announce_epoch(self) -> None:
        pass

    def _open(self) -> Iterator[Any]:
        return iter(self.loader())


def is_function(loader: Any) -> bool:
    """Whether ``loader`` is a function that makes an iterable."""
    return isinstance(loader, (types.FunctionType, types.MethodType, functools.partial))


def _held(function: types.FunctionType) -> list[int]:
    cells = [id(cell) for cell in function.__closure__ or ()]
    return cells + [id(value) for value in function.__defaults__ or ()]


def references(feed: Any) -> int:
    """The number of references to the loader of ``feed``, as Python counts them."""
    return sys.getrefcount(feed.loader)


_REFERENCES = references(types.SimpleNamespace(loader=object()))


def _always() -> bool:
    return True


def length(sized: Any) -> int | None:
    """The number of items in ``sized``; ``None`` if unknown."""
    try:
        return len(sized)
    except (TypeError, NotImplementedError, AttributeError):
        return None


def shown(loader: Any) -> str:
    """The argument of ``steps``, for messages."""
    return f"steps({type(loader).__name__})"
