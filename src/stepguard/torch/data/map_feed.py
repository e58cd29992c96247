"""The position in a DataLoader over a map-style data set, so that a resumed run continues with the very next batch.

The sampler draws the order of an epoch when the epoch begins. The random states of that moment are saved. From them a
new process draws the same order, and skips the batches that were already seen without loading them. The position is
also kept in samples, so that another batch size, or another number of processes that divide the data, goes on at the
same sample.
"""

from __future__ import annotations

import copy
import logging
import operator
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from stepguard.steps.apart import ALWAYS, PROBES, ApartIterator
from stepguard.steps.batch_marks import mark, peek
from stepguard.steps.feeds import ANYWAY, Feed, length, shown
from stepguard.steps.process_file import taking
from stepguard.torch.data.cutting import batch_size, batches_after, batches_of, has_plain_batches, samples_of, shares
from stepguard.torch.data.sources import Sources
from stepguard.torch.data.workers import InitWorker, SeededDataset, SeededIndex
from stepguard.torch.random_states import STREAMS
from stepguard.words import logger

_log = logger(__name__)

_END = object()


class MapFeed(Feed):
    """A standard DataLoader over a map-style dataset. Seen batches are skipped at the sampler and never loaded."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self._order: dict[str, Any] | None = None
        self._sources = Sources(loader)
        # What the data set had changed when the running workers were started: they have it as it was then, whatever the
        # program has changed in it meanwhile.
        self._at_workers_start: dict[str, Any] | None = None
        self._has_counted = False
        self._worker_seed = torch.initial_seed() % 2**63
        self._ordered = self._ordered_copy()
        self._skip = 0
        self._streams_before: dict[str, Any] | None = None
        # The indices of the batches that were drawn and are not consumed yet, and of the last that was.
        self._drawn: deque[Any] = deque()
        self._last: Any = None
        self._last_before: str | None = None
        # Whether the sampler is at its end, and how far it was in the earlier process: for workers it is drawn ahead.
        self._is_drawn_out = False
        self._ahead_before: Mapping[str, Any] = {}
        # The number of samples whose steps are done. `_rest` is the position in samples of an epoch that was begun with
        # another batch size or number of processes, and the number of batches that are left of it.
        self.samples = 0
        self._rest: tuple[int, int | None] | None = None

    def _ordered_copy(self) -> Any:
        """A copy of the loader that draws from :meth:`indices`, so that the program's own does not change."""
        loader: Any = self.loader
        ordered: Any = copy.copy(loader)
        ordered._iterator = None
        sampler = "sampler" if loader.batch_sampler is None else "batch_sampler"
        replaced: dict[str, Any] = {sampler: _Order(self, getattr(loader, sampler))}
        if loader.num_workers > 0:
            replaced["dataset"] = SeededDataset(loader.dataset, loader.collate_fn)
            ordered.worker_init_fn = InitWorker(loader.worker_init_fn)
            keep_order(ordered)
        for name, value in replaced.items():
            # A DataLoader refuses these assignments after its construction; this copy is not in use yet.
            object.__setattr__(ordered, name, value)
        return ordered

    def consumed(self) -> None:
        """The step with the batches handed out so far is done."""
        for _ in range(self._given - self.batches):
            self._last = self._drawn.popleft()
            self.samples += 1 if batches_of(self.loader) is None else _size(self._last)
        super().consumed()

    def end_epoch(self) -> None:
        """Note that the epoch is complete."""
        super().end_epoch()
        self._order = self._rest = self._last = self._last_before = None
        self._is_drawn_out = False
        self._drawn.clear()
        self.samples = 0
        if self._ordered._iterator is None:
            self._at_workers_start = None

    @property
    def is_last_batch(self) -> bool | None:
        """Whether the batch handed out last is the last of its epoch."""
        if self._rest is None:
            return super().is_last_batch
        left = self._rest[1]
        return None if left is None else self._given >= self._skip + left

    def is_held_besides(self, others: int) -> bool:
        """Whether anybody holds the loader besides this feed and ``others`` references."""
        return super().is_held_besides(others + self._sources.references())

    def position(self) -> dict[str, Any]:
        """The position, with the random states from which the order of this epoch was drawn."""
        is_untouched = self._iterator is None and self.batches > 0
        position = {**super().position(), "worker_seed": self._worker_seed, "samples": self.samples}
        position.update(self._sources.position(is_in_epoch=self.batches > 0, is_untouched=is_untouched))
        if self._at_workers_start is not None:
            position["workers"] = self._at_workers_start
        if self.loader.num_workers:
            position["counted"] = self._ordered.dataset.counts_in_workers or self._has_counted
        if self.batches:
            position["order"] = self._order
            position["last"] = self._last_before if self._last is None else _mark(self._last)
            position["ahead"] = self._ahead_before if is_untouched else self._ahead()
        return position

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        self._sources.resume(position)
        super().resume(position, processes, is_checked=is_checked)
        self._sources.warn(position)
        if "worker_seed" not in position or (position["batches"] and position.get("order") is None):
            self._object(f"the checkpoint lacks the random states with which the epoch began; {ANYWAY}")
        self._has_counted = position.get("counted", False)
        self._worker_seed = position.get("worker_seed", self._worker_seed)
        self._at_workers_start = position.get("workers") if self.loader.num_workers else None
        self._order = position.get("order")
        self._ahead_before = position.get("ahead", {})
        self.samples = position.get("samples", self.batches * batch_size(self.loader))
        self._last_before = position.get("last")
        if position["batches"] and (self._is_cut_anew(position, processes) or self._is_between_batches()):
            self._go_to_sample(position, processes)

    def _go_to_sample(self, position: Mapping[str, Any], processes: int) -> None:
        """Convert the position into one of this batch size and this number of processes."""
        before = position.get("processes", 1)
        # Rounded down, so that a sample is seen twice, not never.
        self.samples = self.samples * before // processes
        size = batch_size(self.loader)
        self.batches = self._seen_before = max(1, self.samples // size) if self.samples else 0
        self._rest = self.samples, batches_after(self.loader, self.samples)
        self._last_before = None
        was = position["loader"].get("batch size") or 1
        if was * before != size * processes:
            level = logging.INFO if was == size else logging.WARNING
            _log.log(
                level,
                "%s: the checkpoint is of batches of %d in %s, the loader has batches of %d in %s: going on at sample "
                "%d of epoch %d, with other batches than before",
                shown(self.loader),
                was,
                "1 process" if before == 1 else f"{before} processes",
                size,
                "1 process" if processes == 1 else f"{processes} processes",
                self.samples * processes,
                self.epoch,
            )

    def _is_cut_anew(self, position: Mapping[str, Any], processes: int) -> bool:
        """Whether batch size or number of processes have changed, and the position in samples is known for them."""
        before = position.get("processes", 1)
        was = position["loader"].get("batch size")
        is_resized = was != self.description()["batch size"]
        is_known = was is None or (type(was) is int and was > 0)
        is_divided = before == processes or shares(self.loader) == processes
        return is_known and (is_resized or before != processes) and is_divided and has_plain_batches(self.loader)

    def _is_between_batches(self) -> bool:
        """Whether this epoch was begun with another batch size, so that its batches do not count its samples."""
        samples = length(samples_of(self.loader))
        is_over = samples is not None and self.samples >= samples
        return not is_over and has_plain_batches(self.loader) and self.samples != self.batches * batch_size(self.loader)

    def _moved(self, position: Mapping[str, Any], before: int, processes: int) -> int:
        if self._is_cut_anew(position, processes):
            return int(position["batches"])
        return super()._moved(position, before, processes)

    def _differences(self, position: Mapping[str, Any], processes: int) -> str:
        if not self._is_cut_anew(position, processes):
            return super()._differences(position, processes)
        ignored = {name: self.description()[name] for name in ("batch size", "batches in an epoch")}
        return super()._differences({**position, "loader": {**position["loader"], **ignored}}, processes)

    def close(self) -> None:
        """Close the feed, and end workers that persist from epoch to epoch."""
        if self._iterator is None and self._ordered._iterator is not None:
            self._at_workers_start = None
        super().close()
        self._ordered._iterator = None

    def begin_body(self) -> None:
        """Look at the data before the program sets up an epoch."""
        self._sources.begin_body()

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        self._sources.begin_epoch(self.epoch, skip)
        self._skip = skip
        self._drawn.clear()
        streams = self._streams()
        # Persistent workers draw their seed once, in the first epoch. If they are new in a later epoch (after a
        # resume), the draw of their seed must not change the order: `indices` puts these streams back first.
        is_new = self._ordered.persistent_workers and self._ordered._iterator is None and self.epoch > 0
        self._streams_before = streams if is_new else None
        with self._starting_workers(skip):
            iterator = iter(self._ordered)
        if skip:
            STREAMS.restore(streams["random"])
        return iterator

    @contextmanager
    def _starting_workers(self, skip: int) -> Iterator[None]:
        """A block that starts workers, if there are none, with the data set as the earlier process's workers had it."""
        if not self.loader.num_workers or self._ordered._iterator is not None:
            yield
            return
        then, now = self._at_workers_start, self._sources.of_workers()
        self._at_workers_start = now if then is None else then
        if then is not None:
            self._sources.put_back_of_workers(then)
        yield
        if then is not None and not skip:  # Otherwise `indices` has put back what the checkpoint has.
            self._sources.put_back_of_workers(now)

    def _ahead(self) -> dict[str, Any]:
        """How far the sampler is drawn, and the states of the generators that it draws from, and maybe others do."""
        drawn = self.batches + len(self._drawn) + self._is_drawn_out
        return {"drawn": drawn, "generators": self._sources.order_generators()}

    def indices(self, sampler: Any) -> Iterator[Any]:
        """The indices that ``sampler`` draws for the current epoch, without those that were already seen."""
        epoch, skip = self.epoch, self._skip
        live = STREAMS.capture() if skip else None
        if skip and self._order is not None:
            self._restore_streams(self._order)
        elif self._streams_before is not None:
            self._restore_streams(self._streams_before)
        self._order = self._streams()
        undrawn = self._sources.digests() if skip else {}
        drawn = self._behind_seen(sampler, skip)
        if live is not None:
            # Others may draw from the generators of the sampler: these go on from where they were when it was as far.
            count = 0 if self._rest is not None else max(0, self._ahead_before.get("drawn", 0) - skip)
            drawn = chain(list(islice(drawn, count)), drawn)
            # From here on, draws come from the streams of the training again.
            STREAMS.restore(live)
            self._sources.go_on(self._ahead_before.get("generators"), undrawn)
        index = next(drawn, _END)
        number = skip
        while index is not _END:
            self._drawn.append(index)
            if self._ordered.num_workers > 0:
                yield SeededIndex(index, epoch, f"{self._worker_seed}/{epoch}/{number}")
            else:
                yield index
            number += 1
            index = next(drawn, _END)
        self._is_drawn_out = True

    def _behind_seen(self, sampler: Any, skip: int) -> Iterator[Any]:
        """An iterator over the indices that ``sampler`` draws after those of the seen batches."""
        if self._rest is not None and skip:
            rest = _Rest(sampler, self._rest[0])
            if batches_of(self.loader) is not None:
                rest = copy.copy(sampler)
                rest.sampler = _Rest(sampler.sampler, self._rest[0])
            return _begun(iter(rest))
        # A sampler without an end draws on the way, however rarely.
        probes = ALWAYS if length(sampler) is None else PROBES
        drawn = _apart(iter(sampler), f"order of epoch {self.epoch}", probes)
        last = None
        for _ in range(skip):
            last = next(drawn, None)
            if last is None:
                break
        found = _mark(last) if skip else None
        if self._last_before is not None and found != self._last_before:
            self._object(
                f"drawn again, the samples of batch {skip} of epoch {self.epoch} are not those of before the restart: "
                f"expected {self._last_before}, found {found}, which are digests of their numbers. The order of "
                f"{type(self.loader.sampler).__name__} must be drawn when the epoch begins, and depend on nothing but "
                f'the random states, the generators that it holds, and set_epoch; or pass resume_data="unchecked" to '
                f"go on all the same, or resume_data=False to begin a new epoch"
            )
        return drawn

    def _streams(self) -> dict[str, Any]:
        return {"random": STREAMS.capture(), **self._sources.of_order()}

    def _restore_streams(self, streams: Mapping[str, Any]) -> None:
        with taking(f"the order of {shown(self.loader)}"):
            STREAMS.restore(streams["random"])
            self._sources.put_back_order(streams)

    def description(self) -> dict[str, Any]:
        """The properties of the loader that must be the same when a run resumes."""
        loader = self.loader
        return {
            **super().description(),
            "batch size": getattr(batches_of(loader), "batch_size", loader.batch_size),
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


class _Rest:
    """A sampler without its first ``seen`` samples."""

    def __init__(self, sampler: Any, seen: int) -> None:
        self._sampler = sampler
        self._seen = seen

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._sampler), self._seen, None)


def _apart(drawn: Iterator[Any], name: str, probes: int) -> Iterator[Any]:
    """``drawn``, which draws all but its first item from streams of its own.

    Most samplers draw the whole order with its first item. One that draws each item when it is asked for it would draw
    between the steps of the training, and a resumed run could not draw the order again.
    """
    first = next(drawn, _END)
    if first is _END:
        return
    states = STREAMS.side(name)
    yield first
    yield from ApartIterator(lambda: drawn, STREAMS, states, probes=probes)


def _begun(drawn: Iterator[Any]) -> Iterator[Any]:
    """``drawn`` with its first item drawn now: with it, a sampler draws the order of the epoch."""
    first = next(drawn, _END)
    return iter(()) if first is _END else chain([first], drawn)


def keep_order(loader: Any) -> None:
    """Have ``loader`` give its batches in order, without which there is no position."""
    if not getattr(loader, "in_order", True):
        _log.warning("%s: in_order=False is left out, because a run could not be resumed in it", shown(loader))
        loader.in_order = True


def _size(index: Any) -> int:
    return len(index) if isinstance(index, (list, tuple)) else 1


def _mark(index: Any) -> str:
    """A digest of the numbers of one batch's samples, or of their names or whatever else the sampler draws."""
    try:
        numbers = [operator.index(one) for one in (index if isinstance(index, (list, tuple)) else [index])]
    except TypeError:
        return mark(peek(index))
    return f"{zlib.crc32(repr(numbers).encode()):08x}"
