"""The position in loaders that know it themselves: Grain's, and those with ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stepguard.steps.apart import PROBES, ApartIterator
from stepguard.steps.feeds import Feed, IterableFeed
from stepguard.steps.random_streams import RandomStreams

# In the state of Grain's ElasticIterator, which is the same in all processes, and fits any number of them.
_ELASTIC_KEY = "global_next_index"


class GrainFeed(Feed):
    """A ``DataLoader`` or data set of Grain, or an iterator of one: their iterators know their state."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self.is_repeatable = not isinstance(loader, Iterator)
        # The state of the earlier process, until an iterator has it.
        self._state_before: Any = None

    def end_epoch(self) -> None:
        """Note that the epoch is complete; the next iterator begins without a state."""
        super().end_epoch()
        self._state_before = None

    def position(self) -> dict[str, Any]:
        """The position, with the state of the iterator."""
        iterator: Any = self._iterator
        state = self._state_before if iterator is None else iterator.get_state()
        return {**super().position(), **({} if state is None else {"state": state})}

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        super().resume(position, processes, is_checked=is_checked)
        self._state_before = position.get("state")

    def _begin_epoch(self, skip: int) -> Iterator[Any]:  # noqa: ARG002 - the state says where
        state, self._state_before = self._state_before, None
        iterator: Any = iter(self.loader)
        if state is not None:
            try:
                iterator.set_state(state)
            except Exception as error:  # noqa: BLE001 - the loader's own code
                self._object(_not_taken(error))
        given: Iterator[Any] = iterator
        return given

    def _moved(self, position: Mapping[str, Any], before: int, processes: int) -> int:
        state = position.get("state")
        if isinstance(state, dict) and _ELASTIC_KEY in state:
            return int(position["batches"])
        return super()._moved(position, before, processes)


class StatefulFeed(IterableFeed):
    """A loader with ``state_dict`` and ``load_state_dict``, such as a data set of Hugging Face. Nothing is read again.

    The state includes the number of the epoch, if the loader counts it; therefore the state at an epoch's end counts
    too. What the loader draws comes from random streams of its own, which go on with its state.
    """

    def __init__(self, loader: Any, streams: RandomStreams) -> None:
        super().__init__(loader, streams)
        # Those of the earlier process, until an iterator has them.
        self._state_before: Any = None
        self._streams_before: Any = None
        self._probes_before = PROBES
        # Whether the state was loaded and nothing was read since then.
        self._is_loaded = False
        # Whether the epoch's order is drawn, and the states of the generators inside before it began.
        self._is_drawn = False
        self._inside_before: Any = None
        self._has_begun = False

    @property
    def _holder(self) -> Any:
        """What has the state."""
        return self.loader

    def position(self) -> dict[str, Any]:
        """The position, with the state of the loader and of its random streams."""
        position = super().position()
        position.pop("last", None)
        if self._has_begun:
            position["state"] = self._holder.state_dict()
            if isinstance(self._iterator, ApartIterator):
                position["streams"], position["probes"] = self._iterator.states, self._iterator.probes
        elif self._state_before is not None:
            position["state"], position["streams"] = self._state_before, self._streams_before
            position["probes"] = self._probes_before
        return position

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        super().resume(position, processes, is_checked=is_checked)
        self._mark_before = None
        self._state_before = position.get("state")
        self._streams_before = position.get("streams")
        self._probes_before = position.get("probes", PROBES)

    def catch_up(self, go_on: Callable[[], bool]) -> bool:  # noqa: ARG002 - as in the base
        """Nothing is read again."""
        return True

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        state, self._state_before = self._state_before, None
        self._is_loaded = state is not None and not skip
        self._has_begun = True
        self._inside_before = inside = self._states_inside()
        # First, because it may begin the epoch anew.
        self._announce_epoch()
        if self._order is None or not (skip or self._is_drawn):
            self._order = self._streams.fork("data")
        self._is_drawn = False
        if state is not None:
            self._load(state)
        resumed = (self._streams_before, self._probes_before) if skip else (None, PROBES)
        self._streams_before = None
        iterator = ApartIterator(self._open, self._streams, self._order, *resumed)
        if skip:
            self._put_inside(inside)
        return iterator

    def _load(self, state: Any) -> None:
        try:
            with self._streams.preserved():
                self._holder.load_state_dict(state)
        except Exception as error:  # noqa: BLE001 - the loader's own code
            self._object(_not_taken(error))

    def _states_inside(self) -> Any:
        """The states of generators inside the loader, which go on as they are."""

    def _put_inside(self, states: Any) -> None:
        """Set the generators inside the loader to what :meth:`_states_inside` has returned."""

    def _may_be_empty(self) -> bool:
        # A state of an epoch's end may mean that end, or the beginning that follows.
        was, self._is_loaded = self._is_loaded, False
        if was:
            # The end has drawn what the beginning draws again.
            self._put_inside(self._inside_before)
            self._is_drawn = True
        return was

    def _note(self, batch: Any) -> None:  # noqa: ARG002 - as in the base
        self._is_loaded = False


def _not_taken(error: Exception) -> str:
    return (
        f"does not take the state that it had in the checkpoint ({error}). Use the same loader; or pass "
        f"resume_data=False to begin a new epoch with this one"
    )


def is_grain(loader: Any) -> bool:
    """Whether ``loader`` is a loader of Grain, or an iterator with Grain's methods."""
    if isinstance(loader, type):
        return False
    if hasattr(loader, "get_state") and hasattr(loader, "set_state"):
        return isinstance(loader, Iterator)
    return hasattr(loader, "__iter__") and any(
        kind.__module__.partition(".")[0] == "grain" for kind in type(loader).__mro__
    )


def is_stateful(loader: Any) -> bool:
    """Whether ``loader`` has a state to save and load."""
    has_state = callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))
    return has_state and hasattr(loader, "__iter__") and not isinstance(loader, type)
