"""The base of the engines of loop frameworks: the methods that their sessions can answer, in a run of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from stepguard.engine import Beginning, Keeper, StepsDone, StepTrace
from stepguard.steps.session import Session
from stepguard.steps.step_digests import StepDigests

SessionT = TypeVar("SessionT", bound=Session)


class LoopEngine(Generic[SessionT]):
    """The base of an engine whose sessions are :class:`stepguard.steps.session.Session`.

    It has the methods of :class:`stepguard.engine.Engine` that concern steps. A framework adds its ``name`` and the
    methods that depend on it: ``prepare``, ``restore``, ``watch_values``, ``snapshot``, ``non_finite``,
    ``checkpoint_name``, ``write`` and ``summarise``.
    """

    storage_error_types: tuple[type[BaseException], ...] = ()
    can_return = True

    def is_open(self, session: SessionT) -> bool:
        """Whether the session can still run."""
        return session.is_open

    def close(self, session: SessionT) -> None:
        """Close the session."""
        session.unwatch()
        session.close()

    def step(self, session: SessionT) -> int:
        """The number of steps done, without a step that an error has left, once the coordinator has that error."""
        return session.global_step - session.is_cut_short

    def step_name(self) -> str:
        """The name of the step-rate curve's counter, the same as TensorFlow's."""
        return "global_step"

    def total_steps(self, session: SessionT) -> int | None:
        """The ``max_steps`` that ``steps`` was given."""
        return session.total_steps

    def watch(self, session: SessionT, before_close: Callable[[], None]) -> None:
        """Set the function that the session calls before it closes. It marks its steps from the beginning anyway."""
        session.watch(before_close)

    def stop_at_boundary(self, session: SessionT, main_thread_was_told: Callable[[], bool]) -> None:
        """``steps`` ends at the next boundary, and ``step`` raises there."""
        session.boundary.stop(main_thread_was_told)

    def end_at(self, session: SessionT, step: int, ask_stop: Callable[[], None]) -> None:
        """The session begins no step after ``step``."""
        session.end_at(step, ask_stop)

    def call_after_steps(self, session: SessionT, steps: int, callback: Callable[[], int]) -> None:
        """Count the steps of the session."""
        session.boundary.call_after_steps(steps, callback)

    def progress(self, session: SessionT) -> object:
        """The number of steps done in this session, as in :meth:`step`, and the number of complete epochs.

        Batches that are read again after a restart are progress too: it may take longer than any step.
        """
        state = session.process_state
        return session.boundary.steps - session.is_cut_short, state.progress.epochs_done, state.batches_read_again

    def steps_done(self, session: SessionT) -> StepsDone:
        """The steps of the session; loops and evaluations that begin and end are pauses."""
        return session.steps_done

    def is_resting(self, session: SessionT) -> bool:
        """Whether no loop over ``steps`` runs."""
        return session.boundary.is_resting

    def is_evaluating(self, session: SessionT) -> bool:
        """Whether the program is inside ``sess.evaluating()``."""
        return session.is_evaluating

    def is_alone(self, session: SessionT) -> bool:
        """Whether the session has no gate, at which the steps of several processes wait for each other."""
        return session.is_alone

    def call_at_rest(self, session: SessionT, keep: Callable[[bool], None]) -> None:
        """Call ``keep(is_last)`` at the boundary where a loop ends."""
        session.boundary.call_at_rest(keep)

    def saves_rest(self, session: SessionT) -> None:
        """Do nothing: no other process takes part."""

    def come_back(self, session: SessionT) -> None:
        """A save that waits for the end of the program's code between two steps waits no longer."""
        if session.boundary.is_away_here:
            session.boundary.come_back()

    def is_outside_steps(self, session: SessionT, error: BaseException) -> bool:
        """Whether the loader has raised ``error`` before a step."""
        return session.failed_fetch is error

    def defer(self, session: SessionT, callback: Callable[[], None]) -> bool:
        """Defer ``callback``, if an evaluation runs in a step or the program is between two of its own loop."""
        return session.defer(callback)

    def keep_with(self, session: SessionT, keeper: Keeper) -> None:
        """The session has ``metrics`` and ``save``."""
        session.keep_with(keeper)

    def hand_over(self, session: SessionT) -> None:
        """Call what the last step has put off: one that was left by ``break``, or one of the program's own loop."""
        session.boundary.call_due()

    def trace_steps(self, session: SessionT, trace: StepTrace) -> Beginning:
        """The session tells ``trace`` the numbers that it summarises, and the digests that ``trace`` wants."""
        streams = session.process_state.streams
        return session.trace_with(trace, StepDigests(trace, streams) if trace.wants_digests else None)

    @contextmanager
    def at_boundary(self, session: SessionT, what: str, patience_secs: float | None = None) -> Iterator[None]:
        """Hold the steps back. If the body of a loop asks for this in the middle of its step, the step ends there."""
        session.finish_step()
        with session.boundary.hold(what, patience_secs):
            yield
