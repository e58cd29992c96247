"""The base of the engines of loop frameworks whose programs may run in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from stepguard.engine import ValueWatch
from stepguard.steps.common_store import CommonStore
from stepguard.steps.engine import LoopEngine
from stepguard.steps.event_file import as_numbers
from stepguard.steps.peers import Peers
from stepguard.steps.session import Session

SessionT = TypeVar("SessionT", bound=Session)


class SummaryLog(Protocol):
    """An event log that takes several values at once."""

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """Write one value for each of several curves."""


class PeersEngine(LoopEngine[SessionT]):
    """Adds to `LoopEngine` what follows from the other processes of one training, and the values of summaries.

    A framework adds its ``name``, ``prepare``, ``restore``, ``snapshot``, ``non_finite``, ``write`` and ``summarise``.
    ``common`` is the processes' store; without it this process is alone.
    """

    def __init__(
        self,
        *,
        rank: int,
        processes: int,
        common: CommonStore | None,
        grace_secs: float,
        basename: str,
        events: SummaryLog | None,
    ) -> None:
        self.can_return = processes == 1
        self.peers = Peers(common, rank, processes, grace_secs=grace_secs)
        self.value_watch: ValueWatch | None = None
        self._basename = basename
        self._events = events

    def close(self, session: SessionT) -> None:
        """Close the session, here and with the other processes."""
        session.unwatch()
        self.peers.close()
        super().close(session)

    def watch_values(self, session: SessionT, watch: ValueWatch) -> None:
        """Show ``watch`` the values that are summarised; a step returns no numbers."""
        self.value_watch = watch
        session.watch_values(watch)

    def stop_at_boundary(self, session: SessionT, main_thread_was_told: Callable[[], bool]) -> None:
        """``steps`` ends at the next boundary, and ``step`` raises there."""
        if not self.peers.has_any:
            session.boundary.stop(main_thread_was_told)
        # With several processes the rendezvous passes the stop request on, and all stop after the same step.

    def call_after_steps(self, session: SessionT, steps: int, callback: Callable[[], int]) -> None:
        """Count the steps of the session."""
        session.boundary.call_after_steps(steps, self.peers.saving(session, callback))

    @contextmanager
    def at_boundary(self, session: SessionT, what: str, patience_secs: float | None = None) -> Iterator[None]:
        """Hold the steps back; with several processes, those of all processes after the same step."""
        session.finish_step()
        # Checked before the others are asked to come to this boundary.
        session.boundary.check_whole(what)
        with self.peers.meeting(what), session.boundary.hold(what, patience_secs):
            yield

    def checkpoint_name(self, step: int | None) -> str:
        """The name of a checkpoint, such as ``model.ckpt-1200``."""
        return f"{self._basename}-{step}"

    def committed(self, kept: Sequence[tuple[str, float]]) -> None:  # noqa: ARG002 - for frameworks with a list
        """Tell the other processes that they can free their parts."""
        self.peers.settled()

    def write_summary(
        self, values: Mapping[str, Any], step: int, *, where: str = "summary"
    ) -> Mapping[str, float] | None:
        """Write values that the program has computed itself and given to ``where``. Any thread.

        Returns them as numbers; ``None`` if no one uses them, so that they were not read.

        Raises:
            TypeError: a value is no number, or ``values`` is no dictionary.
        """
        if self.value_watch is None and self._events is None and isinstance(values, Mapping):
            return None  # No one uses the values, so do not wait for those that are still computed.
        numbers = as_numbers(values, where)
        if self._events is not None:
            self._events.summary(numbers, step)
        if self.value_watch is not None:
            self.value_watch.look(numbers, step)
        return numbers
