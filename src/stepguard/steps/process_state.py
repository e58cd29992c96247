"""The state that belongs to one process rather than to the model: its random streams and its positions in the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from stepguard.steps.feeds import Feed
from stepguard.steps.random_streams import RandomStreams


class ProcessState(ABC):
    """The streams and the feeds of a session. For the training thread, or a thread that holds the boundary.

    Loaders have no names. They are matched by order: a run's second loader is the second loader of the earlier run.
    """

    def __init__(self, streams: RandomStreams, processes: int) -> None:
        self._streams = streams
        self._processes = processes
        self._feeds: list[Feed] = []
        # The earlier run's positions, for loaders that this run has not used yet, and its random states until the
        # first step.
        self._positions: list[Mapping[str, Any]] = []
        self._random: dict[str, Any] | None = None

    @abstractmethod
    def new_feed(self, loader: Any) -> Feed:
        """A feed for ``loader``.

        Raises:
            TypeError: ``loader`` cannot be iterated over.
        """

    def feed(self, loader: Any, *, is_resumed: bool = True) -> Feed:
        """The one feed of ``loader``. With ``is_resumed`` a new feed begins at the position of the earlier run.

        Raises:
            CheckpointMismatchError: the earlier run had another loader here.
        """
        for feed in self._feeds:
            if feed.loader is loader:
                return feed
        feed = self.new_feed(loader)
        number = len(self._feeds)
        if number < len(self._positions) and is_resumed:
            feed.resume(self._positions[number], self._processes)
        self._feeds.append(feed)
        return feed

    @property
    def epoch(self) -> int:
        """The number of complete epochs over the loader used last; before its first use, that of the restored run."""
        if self._feeds:
            return self._feeds[-1].epoch
        return int(self._positions[-1]["epoch"]) if self._positions else 0

    def capture(self) -> dict[str, Any]:
        """The random states and positions, as plain values and arrays of the framework. Called at a boundary."""
        positions: list[Any] = [{**feed.position(), "processes": self._processes} for feed in self._feeds]
        positions += self._positions[len(positions) :]
        return {"random": self._streams.capture() if self._random is None else self._random, "loaders": positions}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, which :meth:`capture` has returned in an earlier process."""
        self._positions = list(state["loaders"])
        # The streams are restored now, for draws before the first step, and again just before that step: draws in
        # between, for example to build objects that are then restored, must not move the streams.
        self._random = state["random"]
        self._streams.restore(state["random"])

    def begin_step(self) -> None:
        """Begin a step. The first step after a restore draws the same numbers as it would have drawn without one."""
        if self._random is not None:
            self._streams.restore(self._random)
            self._random = None

    def close(self) -> None:
        """End the workers of the loaders."""
        for feed in self._feeds:
            feed.close()


def describe_positions(state: Mapping[str, Any]) -> str:
    """The positions from which a run continues in its data, for the log."""
    return "; ".join(f"epoch {one['epoch']}, batch {one['batches']}" for one in state["loaders"]) or "no loader yet"
