"""The position in loaders that know it themselves: Grain's, and those with ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from stepguard.steps.feeds import Feed
from stepguard.steps.random_streams import RandomStreams


class StateFeed(Feed):
    """A loader with a state of its own. Nothing is read again."""

    def __init__(self, loader: Any, streams: RandomStreams) -> None:
        super().__init__(loader)
        self.is_repeatable = not isinstance(loader, Iterator)
        self._streams = streams
        # The state of the earlier process, until an iterator has it.
        self._state_before: Any = None

    @abstractmethod
    def _state(self) -> Any:
        """The state of the loader in the running epoch."""

    @abstractmethod
    def _restore(self, iterator: Any, state: Any) -> Iterator[Any]:
        """The iterator over what is left of the epoch."""

    def position(self) -> dict[str, Any]:
        """The position, with the state of the loader."""
        state = self._state_before if self._iterator is None else self._state()
        return {**super().position(), **({} if state is None else {"state": state})}

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        super().resume(position, processes, is_checked=is_checked)
        self._state_before = position.get("state")

    def _begin_epoch(self, skip: int) -> Iterator[Any]:  # noqa: ARG002 - the state says where
        state, self._state_before = self._state_before, None
        iterator: Iterator[Any] = iter(self.loader)
        if state is None:
            return iterator
        try:
            return self._restore(iterator, state)
        except Exception as error:  # noqa: BLE001 - the loader's own code
            self._object(
                f"does not take the state that it had in the checkpoint ({error}). Use the same loader; or pass "
                f"resume_data=False to begin a new epoch with this one"
            )
            return iterator


# In the state of Grain's ElasticIterator, which is the same in all processes, and fits any number of them.
_ELASTIC_KEY = "global_next_index"


class GrainFeed(StateFeed):
    """A ``DataLoader`` or data set of Grain, or an iterator of one: their iterators know their state."""

    def end_epoch(self) -> None:
        """Note that the epoch is complete; the next iterator begins without a state."""
        super().end_epoch()
        self._state_before = None

    def _state(self) -> Any:
        iterator: Any = self._iterator
        return iterator.get_state()

    def _moved(self, position: Mapping[str, Any], before: int, processes: int) -> int:
        state = position.get("state")
        if isinstance(state, dict) and _ELASTIC_KEY in state:
            return int(position["batches"])
        return super()._moved(position, before, processes)

    def _restore(self, iterator: Any, state: Any) -> Iterator[Any]:
        iterator.set_state(state)
        given: Iterator[Any] = iterator
        return given


class StatefulFeed(StateFeed):
    """A loader with ``state_dict`` and ``load_state_dict``, such as a data set of Hugging Face.

    The state includes the number of the epoch, if the loader counts it; therefore the state at an epoch's end counts
    too.
    """

    _has_begun = False
    # Whether the state was loaded and nothing was read since then.
    _is_loaded = False

    def position(self) -> dict[str, Any]:
        """The position, with the state of the loader."""
        return {**super().position(), **({"state": self._state()} if self._has_begun else {})}

    def _state(self) -> Any:
        return self.loader.state_dict()

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        self._is_loaded = self._state_before is not None and not skip
        self._has_begun = True
        return super()._begin_epoch(skip)

    def _restore(self, iterator: Any, state: Any) -> Iterator[Any]:  # noqa: ARG002 - a new one is made from the state
        with self._streams.preserved():
            self.loader.load_state_dict(state)
        again: Iterator[Any] = iter(self.loader)
        return again

    def _may_be_empty(self) -> bool:
        # A state of an epoch's end may mean that end, or the beginning that follows.
        was, self._is_loaded = self._is_loaded, False
        return was

    def _note(self, batch: Any) -> None:  # noqa: ARG002 - as in the base
        self._is_loaded = False


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
