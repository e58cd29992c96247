"""What belongs to one process rather than to the model: its random streams, and its position in the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from stepguard.steps.feeds import Feed
from stepguard.steps.random_streams import RandomStreams


class ProcessState(ABC):
    """The streams and the feeds of a session. For the thread that trains, or one that holds the boundary.

    Loaders have no names: the second one that a run comes to is the second one of the run before.
    """

    def __init__(self, streams: RandomStreams, processes: int = 1) -> None:
        self.streams = streams
        self._processes = processes
        self._feeds: list[Feed] = []
        # Of the run before, for loaders that this one has not come to yet; and its random states, for the first step.
        self._positions: list[Mapping[str, Any]] = []
        self._random: dict[str, Any] | None = None

    @abstractmethod
    def new_feed(self, loader: Any) -> Feed:
        """A feed for ``loader``.

        Raises:
            TypeError: it cannot be iterated over.
        """

    def feed(self, loader: Any, *, is_resumed: bool = True) -> Feed:
        """The one feed of ``loader``; with ``is_resumed`` a new one begins where the run before was in it.

        Raises:
            CheckpointMismatchError: the run before had another loader here.
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
        """The complete epochs over the loader that was used last; before that, those of the run that was restored."""
        if self._feeds:
            return self._feeds[-1].epoch
        return int(self._positions[-1]["epoch"]) if self._positions else 0

    def capture(self) -> dict[str, Any]:
        """Random states and positions, as plain values and the framework's arrays. At a boundary."""
        positions: list[Any] = [{**feed.position(), "processes": self._processes} for feed in self._feeds]
        positions += self._positions[len(positions) :]
        return {"random": self.streams.capture() if self._random is None else self._random, "loaders": positions}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the process was that has captured ``state``."""
        self._positions = list(state["loaders"])
        # Once now, for whoever draws before the first step, and again in front of that: what is drawn before it, to
        # build things that the restored run need not build again, must not move the streams.
        self._random = state["random"]
        self.streams.restore(state["random"])

    def begin_step(self) -> None:
        """A step begins: the first after a restore draws what it would have drawn without one."""
        if self._random is not None:
            self.streams.restore(self._random)
            self._random = None

    def close(self) -> None:
        """End the workers of the loaders."""
        for feed in self._feeds:
            feed.close()


def describe_positions(state: Mapping[str, Any]) -> str:
    """Where a run goes on in its data, for the log."""
    return "; ".join(f"epoch {one['epoch']}, batch {one['batches']}" for one in state["loaders"]) or "no loader yet"
