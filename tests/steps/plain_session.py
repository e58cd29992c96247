"""A session of plain Python: batches of any iterable, and no framework."""

from __future__ import annotations

from stepguard.coordination.coordinator import Coordinator
from stepguard.steps.feeds import IterableFeed
from stepguard.steps.gate import Gate
from stepguard.steps.process_state import ProcessState
from stepguard.steps.random_streams import RandomStreams
from stepguard.steps.session import Session


class PlainState(ProcessState):
    def new_feed(self, loader):
        return IterableFeed(loader, self.streams)


def plain_session(coord: Coordinator, gate: Gate | None) -> Session:
    return Session(coord, lambda values, step: None, PlainState(RandomStreams()), gate=gate)
