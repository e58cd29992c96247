"""The base of the engines of loop frameworks whose programs may run in several processes."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from stepguard.disk import files
from stepguard.engine import Prepared, ValueWatch
from stepguard.steps.common_store import CommonStore
from stepguard.steps.engine import LoopEngine
from stepguard.steps.gate import Gate, Moment
from stepguard.steps.numbers import as_numbers
from stepguard.steps.part_messages import PartMessages
from stepguard.steps.peers import Peers
from stepguard.steps.rendezvous import Member
from stepguard.steps.session import Session
from stepguard.store import Recovery

SessionT = TypeVar("SessionT", bound=Session)


class SummaryLog(Protocol):
    """An event log that takes several values at once."""

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """Write one value for each of several curves."""


class PeersEngine(LoopEngine[SessionT], ABC):
    """Adds to `LoopEngine` what follows from the other processes of one training, and the values of summaries.

    A framework adds its ``name``, ``prepare``, ``restore``, ``snapshot``, ``non_finite``, ``write`` and ``summarise``,
    and the methods that are abstract here. ``common`` is the processes' store; without it this process is alone.
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

    def prepare_session(
        self, new_session: Callable[[Gate | None], SessionT], meets_every: int | None
    ) -> Prepared[SessionT]:
        """Prepare a session from the newest good checkpoint; without one, as the framework initialises it.

        Several processes take their states after each ``meets_every`` steps, so that the chief can save exactly there.
        """
        gate = self.peers.gate()
        session = new_session(gate)
        self.peers.open(gate, functools.partial(self.new_member, session))
        try:
            recovered, is_restored = self.go_on(session)
            if not is_restored:
                self.initialise(session)
            session.process_state.note_beginning()
        except BaseException:
            self.close(session)
            raise
        if meets_every is not None:
            self.peers.meet_every(meets_every, gate, session.global_step)
        session.hold_interrupts()
        return Prepared(session, recovered)

    @abstractmethod
    def new_member(self, session: SessionT) -> Member:
        """This process, as the rendezvous of the processes sees it."""

    @abstractmethod
    def go_on(self, session: SessionT) -> tuple[Recovery | None, bool]:
        """Restore what is to be continued.

        Returns the result of this process's own search, and whether the session was restored (perhaps as the chief
        said).
        """

    @abstractmethod
    def initialise(self, session: SessionT) -> None:
        """Begin without a checkpoint."""

    def write_jointly(
        self,
        directory: Path,
        root: Path | None,
        moment: Moment | None,
        write_own: Callable[[PartMessages | None], dict[str, tuple[int, str]]],
        collect: Callable[[PartMessages | None], dict[str, tuple[int, str]]],
    ) -> dict[str, tuple[int, str]]:
        """Make ``directory``, below the logdir ``root``, and have every process write its part of ``moment`` into it.

        ``collect`` waits until the others have stopped writing. Returns sizes and digests by file name.
        """
        files.make_dir(directory)
        place = directory if root is None else directory.relative_to(root)
        messages = self.peers.ask_for_parts(place.as_posix(), moment)
        try:
            own = write_own(messages)
        except BaseException:
            # Not before the others have stopped writing may the next try use the directory. This error came first, so
            # theirs are ignored.
            with contextlib.suppress(Exception):
                collect(messages)
            raise
        return {**own, **collect(messages)}

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
        is_end = patience_secs is not None  # The program ends the run, and knows of the error.
        session.boundary.check_whole(what, is_left_by_error=session.is_left_by_error and not is_end)
        with self.peers.meeting(what), session.boundary.hold(what, patience_secs):
            yield

    def saves_rest(self, session: SessionT) -> None:
        """Have the chief ask the others for their parts of that moment, which they know by the snapshot."""
        session.boundary.check_whole("a save", is_left_by_error=session.is_left_by_error)
        self.peers.saves_rest()

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
