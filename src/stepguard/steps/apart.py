"""Iteration under random streams of its own, so that what it draws does not depend on what the training draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stepguard.steps.random_streams import RandomStreams

PROBES = 16
"""An iterator whose first so many batches draw nothing is left alone for the rest of the epoch: exchanging the streams
takes some 100 us for a batch. A reading of the epoch from its beginning comes to the same decision."""
ALWAYS = -1
"""In place of a number of probes: the iterator draws, so it is never left alone. It may draw rarely, as one that
shuffles each shard of the data when it comes to it."""


class ApartIterator(Iterator[Any]):
    """An iterator that draws from streams of its own. One thread.

    A buffer that shuffles, for example, draws an item for each item that it gives. With the streams of the training its
    order would depend on the dropout masks in between, and a resumed run could not read it again.

    Args:
        make: makes the iterator; called under the new streams.
        streams: the streams of the process.
        states: the states with which the new streams begin.
        resumed: the states that follow the making, if ``make`` resumes an epoch at its middle.
        probes: how many batches may still come before the iterator is left alone, if they draw nothing.
    """

    def __init__(
        self,
        make: Callable[[], Iterator[Any]],
        streams: RandomStreams,
        states: Mapping[str, Any],
        resumed: Mapping[str, Any] | None = None,
        probes: int = PROBES,
    ) -> None:
        self._streams = streams
        self.probes = probes
        """How many batches may still come before the iterator is left alone; `ALWAYS` if one has drawn."""
        with streams.preserved():
            streams.restore(states)
            self._iterator = make()
            self.states: Mapping[str, Any] = streams.capture() if resumed is None else resumed
            """The states of the streams after the last batch."""

    def __next__(self) -> Any:
        """The next item."""
        if not self.probes:
            return next(self._iterator)
        with self._streams.preserved():
            self._streams.restore(self.states)
            try:
                return next(self._iterator)
            finally:
                states = self._streams.capture()
                if self.probes > 0:
                    self.probes = self.probes - 1 if self._streams.are_equal(states, self.states) else ALWAYS
                self.states = states
