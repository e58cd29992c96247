"""The position in loaders and data sets that know it themselves, by ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from stepguard.steps.stateful_feeds import StatefulFeed
from stepguard.torch.checkpoint.state import check_saveable
from stepguard.torch.data import generators
from stepguard.torch.data.stream_feed import StreamFeed
from stepguard.torch.random_states import STREAMS


class TorchStatefulFeed(StreamFeed, StatefulFeed):
    """A loader that has a state of its own, or whose data set has; ``of_dataset`` says whether that has it.

    Raises:
        TypeError: the state cannot be saved.
    """

    def __init__(self, loader: Any, *, of_dataset: bool = False) -> None:
        super().__init__(loader)
        self._of_dataset = of_dataset
        with STREAMS.preserved():
            check_saveable(f"the {'data set' if of_dataset else 'loader'}'s state_dict()", self._holder.state_dict())

    @property
    def _holder(self) -> Any:
        return self.loader.dataset if self._of_dataset else self.loader

    def position(self) -> dict[str, Any]:
        """The position, with the state of the loader, of its random streams, and of the generators inside."""
        position = super().position()
        if "state" in position:
            position["items"] = self._states_inside()
        return position

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        super().resume(position, processes, is_checked=is_checked)
        self._put_inside(position.get("items", ()))

    def close(self) -> None:
        """Close the feed, and drop the iterator that torchdata's loader keeps."""
        super().close()
        if isinstance(self.loader, DataLoader):
            # If the garbage collector ended this iterator, which is in a cycle, it would wait five seconds in vain for
            # each of its workers.
            self.loader._iterator = None

    def _restarts_workers(self) -> bool:
        return False

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        # Not as for a stream, which is read again from the states at the beginning of the epoch.
        return StatefulFeed._begin_epoch(self, skip)

    def _states_inside(self) -> list[Any]:
        return generators.states(self._inside.generators)

    def _put_inside(self, states: Any) -> None:
        generators.restore(self._inside.generators, states)
