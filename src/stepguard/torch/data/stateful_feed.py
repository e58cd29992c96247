"""The position in loaders and data sets that know it themselves, by ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from stepguard.steps.apart import PROBES, ApartIterator
from stepguard.torch.checkpoint.state import check_saveable
from stepguard.torch.data import generators
from stepguard.torch.data.stream_feed import StreamFeed
from stepguard.torch.random_states import STREAMS


class StatefulFeed(StreamFeed):
    """A loader that has a state of its own, or whose data set has. Nothing is read again.

    The state includes the number of the epoch, if the loader counts it; therefore the state at an epoch's end counts
    too. ``of_dataset`` says whether the state is that of ``loader.dataset``.

    Raises:
        TypeError: the state cannot be saved.
    """

    def __init__(self, loader: Any, *, of_dataset: bool = False) -> None:
        super().__init__(loader)
        self._of_dataset = of_dataset
        self._state_before: Any = None
        self._streams_before: Any = None
        self._probes_before = PROBES
        # Whether the state was loaded and nothing was read since then.
        self._is_loaded = False
        # Whether the epoch's order is drawn, and the states of the generators inside before it began.
        self._is_drawn = False
        self._items_before: Any = None
        self._has_begun = False
        with STREAMS.preserved():
            check_saveable(f"the {'data set' if of_dataset else 'loader'}'s state_dict()", self._holder.state_dict())

    @property
    def _holder(self) -> Any:
        return self.loader.dataset if self._of_dataset else self.loader

    def position(self) -> dict[str, Any]:
        """The position, with the state of the loader and of its random streams."""
        position = super().position()
        position.pop("last", None)
        if self._has_begun:
            position["state"] = self._holder.state_dict()
            iterator = self._iterator
            if isinstance(iterator, ApartIterator):
                position["streams"], position["probes"] = iterator.states, iterator.probes
            position["items"] = generators.states(self._inside.generators)
        elif self._state_before is not None:
            position["state"], position["streams"] = self._state_before, self._streams_before
            position["probes"] = self._probes_before
            position["items"] = generators.states(self._inside.generators)
        return position

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        super().resume(position, processes, is_checked=is_checked)
        self._mark_before = None
        self._state_before = position.get("state")
        self._streams_before = position.get("streams")
        self._probes_before = position.get("probes", PROBES)
        generators.restore(self._inside.generators, position.get("items", ()))

    def _restarts_workers(self) -> bool:
        return False

    def catch_up(self, go_on: Callable[[], bool]) -> bool:  # noqa: ARG002 - as in the base
        """Nothing is read again."""
        return True

    def close(self) -> None:
        """Close the feed, and drop the iterator that torchdata's loader keeps."""
        super().close()
        if isinstance(self.loader, DataLoader):
            # If the garbage collector ended this iterator, which is in a cycle, it would wait five seconds in vain for
            # each of its workers.
            self.loader._iterator = None

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        state, self._state_before = self._state_before, None
        self._is_loaded = state is not None and not skip
        self._has_begun = True
        self._items_before = items = generators.states(self._inside.generators)
        # First, because it may begin the epoch anew.
        self._announce_epoch()
        if not skip and not self._is_drawn:
            self._order = STREAMS.fork("data")
        self._is_drawn = False
        order = self._order if self._order is not None else STREAMS.fork("data")
        if state is not None:
            with STREAMS.preserved():
                self._holder.load_state_dict(state)
        resumed = (self._streams_before, self._probes_before) if skip else (None, PROBES)
        iterator = ApartIterator(self._open, STREAMS, order, *resumed)
        if skip:
            generators.restore(self._inside.generators, items)
        self._streams_before = None
        return iterator

    def _may_be_empty(self) -> bool:
        # A state of an epoch's end may mean that end, or the beginning that follows.
        was, self._is_loaded = self._is_loaded, False
        if was:
            # The end has drawn what the beginning draws again.
            generators.restore(self._inside.generators, self._items_before)
            self._is_drawn = True
        return was

    def _note(self, batch: Any) -> None:  # noqa: ARG002 - as in the base
        self._is_loaded = False
