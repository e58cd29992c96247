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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from stepguard.steps.apart import ALWAYS, PROBES, ApartIterator
from stepguard.steps.batch_marks import mark, peek
from stepguard.steps.feeds import ANYWAY, Feed, length, shown
from stepguard.steps.process_file import taking
from stepguard.torch.data import generators
from stepguard.torch.data.contents import Contents, Lists, warn_of_other_data
from stepguard.torch.data.counts import Counts, warn_of_counts_in_workers
from stepguard.torch.data.inside import Inside, warn_of_new_generators
from stepguard.torch.data.set_before import SetBefore
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
        self._inside = Inside(loader)
        samplers = Inside(loader.batch_sampler, loader.sampler)
        items = Inside(loader.dataset, loader.collate_fn).objects
        # The lists and arrays of samplers and data set, and what the checkpoint has of them.
        self._contents = Contents([*samplers.objects, *items, _lists_of(loader)])
        self._of_items = {id(one) for one in items}
        self._marks = self._contents.marks()
        self._contents_before: Mapping[str, Any] = {}
        found = [loader.generator] if isinstance(loader.generator, torch.Generator) else []
        found += [one for one in samplers.generators if one is not loader.generator]
        # The generators from which the order is drawn, and those from which items are made in this process. A sampler
        # may refer to the data set, so that a generator may be both.
        found_in_items = {id(one) for one in Inside(loader.dataset).objects}
        found += [Counts((one for one in samplers.objects if id(one) not in found_in_items), may_keep_more=False)]
        self._generators: list[Any] = found
        self._item_counts = Counts(items, may_keep_more=True)
        # Also with workers, which have copies: the training may draw from these, and a sampler that refers to the data
        # set puts them back to the epoch's beginning. Not from that of the order, which is drawn ahead for workers.
        of_data = [one for one in Inside(loader.dataset, loader.collate_fn).generators if one is not loader.generator]
        known = {id(one) for one in of_data}
        others = [one for one in self._inside.generators if id(one) not in known]
        self._item_generators: list[Any] = [self._item_counts, *of_data, *(() if loader.num_workers else others)]
        self._set_before = SetBefore([*self._item_generators, *self._generators, self._contents])
        self._items_before: Sequence[Any] = ()
        # What feeds of this restart have put back, and where the generators were before the order is drawn again.
        self._put_back = generators.known_as_put_back()
        self._now: Mapping[int, Any] = {}
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
            self.samples += 1 if _batches(self.loader) is None else _size(self._last)
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
        return super().is_held_besides(others + self._inside.holds(self.loader))

    def position(self) -> dict[str, Any]:
        """The position, with the random states from which the order of this epoch was drawn."""
        position = {**super().position(), "worker_seed": self._worker_seed, "samples": self.samples}
        if self._item_generators:
            items = self._items_before if self._iterator is None and self.batches else None
            position["items"] = generators.states(self._item_generators) if items is None else items
        is_ahead = self._iterator is None and self.batches
        position["contents"] = self._contents_before if is_ahead else self._contents.state()
        position["made"] = self._marks
        position["set before"] = self._set_before.saved()
        if self._at_workers_start is not None:
            position["workers"] = self._at_workers_start
        if self.loader.num_workers:
            position["counted"] = self._ordered.dataset.counts_in_workers or self._has_counted
        else:
            position["new generators"] = self._inside.new_generators(self.loader)
        if self.batches:
            position["order"] = self._order
            position["last"] = self._last_before if self._last is None else _mark(self._last)
            position["ahead"] = self._ahead_before if is_ahead else self._ahead()
        else:
            position["generators"] = generators.states(self._generators)
        return position

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        # Before anything is compared: the length of a data set may depend on the epoch, and on its contents.
        self._inside.set_epoch(position["epoch"])
        self._contents_before = position.get("contents", {})
        self._set_before.restore(position.get("set before", ()))
        if position["batches"]:
            with taking(f"the contents of {shown(self.loader)}"):
                self._contents.put(self._contents_before)
        else:
            held = self._pairs(self._items_in(position), position.get("generators"))
            # Among them the contents, each time: what the checkpoint has of them is of this loader alone.
            for _, contents in self._set_before.without([(self._contents, self._contents_before)]):
                generators.restore([self._contents], [contents])
            generators.put_back(self._set_before.without(held), self._put_back)
        super().resume(position, processes, is_checked=is_checked)
        warn_of_other_data(shown(self.loader), position.get("made", {}), self._marks, but=self._contents_before)
        warn_of_new_generators(shown(self.loader), position)
        warn_of_counts_in_workers(shown(self.loader), position)
        if "worker_seed" not in position or (position["batches"] and position.get("order") is None):
            self._object(f"the checkpoint lacks the random states with which the epoch began; {ANYWAY}")
        self._has_counted = position.get("counted", False)
        self._worker_seed = position.get("worker_seed", self._worker_seed)
        self._at_workers_start = position.get("workers") if self.loader.num_workers else None
        self._order = position.get("order")
        self._ahead_before = position.get("ahead", {})
        self.samples = position.get("samples", self.batches * _batch_size(self.loader))
        self._last_before = position.get("last")
        self._items_before = self._items_in(position)
        if position["batches"] and (self._is_cut_anew(position, processes) or self._is_between_batches()):
            self._go_to_sample(position, processes)

    def _go_to_sample(self, position: Mapping[str, Any], processes: int) -> None:
        """Convert the position into one of this batch size and this number of processes."""
        before = position.get("processes", 1)
        # Rounded down, so that a sample is seen twice, not never.
        self.samples = self.samples * before // processes
        size = _batch_size(self.loader)
        self.batches = self._seen_before = max(1, self.samples // size) if self.samples else 0
        left = length(_samples(self.loader))
        if left is not None:
            left = max(0, left - self.samples)
            left = left // size if getattr(_batches(self.loader), "drop_last", False) else -(-left // size)
        self._rest = self.samples, left
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
        is_divided = before == processes or _shares(self.loader) == processes
        return is_known and (is_resized or before != processes) and is_divided and _has_plain_batches(self.loader)

    def _is_between_batches(self) -> bool:
        """Whether this epoch was begun with another batch size, so that its batches do not count its samples."""
        samples = length(_samples(self.loader))
        is_over = samples is not None and self.samples >= samples
        return (
            not is_over and _has_plain_batches(self.loader) and self.samples != self.batches * _batch_size(self.loader)
        )

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
        self._set_before.begin_body()

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        self._set_before.begin_epoch()
        self._inside.set_epoch(self.epoch)
        self._skip = skip
        self._drawn.clear()
        streams = self._streams()
        held = [*self._item_generators, *self._generators] if skip else []
        self._now = dict(zip(map(id, held), generators.states(held), strict=True))
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
        then, now = self._at_workers_start, self._items()
        self._at_workers_start = now if then is None else then
        if then is not None:
            self._put_items(then)
        yield
        if then is not None and not skip:  # Otherwise `indices` has put back what the checkpoint has.
            self._put_items(now)

    def _items_in(self, position: Mapping[str, Any]) -> Sequence[Any]:
        """The states for the generators of items."""
        items: Sequence[Any] = position.get("items", ())
        if not items or "counted" in position or "new generators" in position:
            return items
        # A checkpoint of an earlier version has them in the order in which they are found, and the counts last.
        found = dict(zip(map(id, self._inside.generators), items, strict=False))
        return [items[-1], *(found.get(id(one)) for one in self._item_generators[1:])]

    def _pairs(self, items: Sequence[Any], of_order: Sequence[Any] | None) -> Iterator[tuple[Any, Any]]:
        """The generators with their states."""
        yield from zip(self._item_generators, items, strict=False)
        yield from zip(self._generators, of_order or (), strict=False)

    def _items(self) -> dict[str, Any]:
        return {"counts": self._item_counts.state(), "contents": self._contents.state()}

    def _put_items(self, state: Mapping[str, Any]) -> None:
        self._item_counts.go_back(state["counts"])
        self._contents.go_back(state["contents"], of=self._of_items)

    def _ahead(self) -> dict[str, Any]:
        """How far the sampler is drawn, and the states of the generators that it draws from, and maybe others do."""
        drawn = self.batches + len(self._drawn) + self._is_drawn_out
        return {"drawn": drawn, "generators": generators.states(self._generators)}

    def indices(self, sampler: Any) -> Iterator[Any]:
        """The indices that ``sampler`` draws for the current epoch, without those that were already seen."""
        epoch, skip = self.epoch, self._skip
        live = STREAMS.capture() if skip else None
        if skip and self._order is not None:
            self._restore_streams(self._order)
        elif self._streams_before is not None:
            self._restore_streams(self._streams_before)
        self._order = self._streams()
        undrawn = self._contents.digests() if skip else {}
        drawn = self._behind_seen(sampler, skip)
        if live is not None:
            # Others may draw from the generators of the sampler: these go on from where they were when it was as far.
            count = 0 if self._rest is not None else max(0, self._ahead_before.get("drawn", 0) - skip)
            drawn = chain(list(islice(drawn, count)), drawn)
            # From here on, draws come from the streams of the training again.
            STREAMS.restore(live)
            held = self._pairs(self._items_before, self._ahead_before.get("generators"))
            generators.put_back(held, self._put_back, self._now)
            # What the sampler has just drawn itself is as far as it must be; the rest the training has changed.
            now = self._contents.digests()
            self._contents.put(self._contents_before, but={key for key in now if now[key] != undrawn.get(key)})
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
            if _batches(self.loader) is not None:
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
        changed = self._contents.state()
        held = {"contents": changed} if changed else {}
        return {"random": STREAMS.capture(), "generators": generators.states(self._generators), **held}

    def _restore_streams(self, streams: Mapping[str, Any]) -> None:
        with taking(f"the order of {shown(self.loader)}"):
            STREAMS.restore(streams["random"])
            generators.restore(self._generators, streams["generators"])
            self._contents.go_back(streams.get("contents", {}))

    def description(self) -> dict[str, Any]:
        """The properties of the loader that must be the same when a run resumes."""
        loader = self.loader
        return {
            **super().description(),
            "batch size": getattr(_batches(loader), "batch_size", loader.batch_size),
            "items in the dataset": length(loader.dataset),
        }


def _lists_of(loader: Any) -> Lists:
    """An object with the lists or arrays that the program has given to ``loader`` in the place of samplers."""
    return Lists(sampler=loader.sampler, batch_sampler=loader.batch_sampler)


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


def _batches(loader: Any) -> Any:
    """What makes batches of samples: the sampler itself if the data set is given whole batches to read at once."""
    reads_in_bulk = loader.batch_sampler is None and isinstance(loader.sampler, BatchSampler)
    return loader.sampler if reads_in_bulk else loader.batch_sampler


def _samples(loader: Any) -> Any:
    """What draws the samples."""
    return getattr(_batches(loader), "sampler", loader.sampler)


def _batch_size(loader: Any) -> int:
    return getattr(_batches(loader), "batch_size", loader.batch_size) or 1


def _shares(loader: Any) -> int | None:
    """The number of processes among which the sampler divides the data; ``None`` if it does not."""
    return getattr(_samples(loader), "num_replicas", None)


def _has_plain_batches(loader: Any) -> bool:
    """Whether batches are just so many samples of the sampler in a row."""
    batches = _batches(loader)
    if batches is None:
        return loader.batch_size is None
    is_plain = type(batches) is BatchSampler or type(batches).__module__.startswith("torchdata.")
    return is_plain and (loader.batch_size is not None or batches is loader.sampler)
