"""What the engines of loop frameworks share: all that their sessions can answer, in a run of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from stepguard.engine import ValueWatch
from stepguard.steps.session import Session

SessionT = TypeVar("SessionT", bound=Session)


class LoopEngine(Generic[SessionT]):
    """The base of an engine whose sessions are :class:`stepguard.steps.session.Session`.

    It has what :class:`stepguard.engine.Engine` asks about steps. A framework adds its ``name``, and what it alone
    knows: ``prepare``, ``restore``, ``snapshot``, ``non_finite``, ``write`` and ``summarise``.
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
        """The steps done, without one that was left by an error: once the error has come to the coordinator."""
        return session.global_step - session.is_cut_short

    def step_name(self) -> str:
        """The name of the step-rate curve's counter, the same as TensorFlow's."""
        return "global_step"

    def total_steps(self, session: SessionT) -> int | None:
        """What ``steps`` was given as ``max_steps``."""
        return session.total_steps

    def watch(self, session: SessionT, before_close: Callable[[], None]) -> None:
        """A session marks its steps from the beginning; this only tells it whom to call."""
        session.watch(before_close)

    def watch_values(self, session: SessionT, watch: ValueWatch) -> None:
        """A step returns no numbers; a subclass shows ``watch`` those that the program summarises."""
        session.watch_values(watch)

    def stop_at_boundary(self, session: SessionT, main_thread_was_told: Callable[[], bool]) -> None:
        """``steps`` ends at the next boundary, and ``step`` raises there."""
        session.boundary.stop(main_thread_was_told)

    def call_after_steps(self, session: SessionT, steps: int, callback: Callable[[], int]) -> None:
        """Count the steps of the session."""
        session.boundary.call_after_steps(steps, callback)

    def progress(self, session: SessionT) -> object:
        """The number of steps done in this session, as in :meth:`step`, and of epochs whose ends are done."""
        return session.boundary.steps - session.is_cut_short, session.process_state.epochs_done

    def is_resting(self, session: SessionT) -> bool:
        """Whether no loop over ``steps`` runs."""
        return session.boundary.is_resting

    def is_evaluating(self, session: SessionT) -> bool:
        """Inside ``sess.evaluating()``."""
        return session.is_evaluating

    def is_alone(self, session: SessionT) -> bool:
        """Whether the session has no gate, at which the steps of several processes wait for each other."""
        return session.is_alone

    def call_at_rest(self, session: SessionT, keep: Callable[[bool], None]) -> None:
        """At the boundary at which the session rests."""
        session.boundary.call_at_rest(keep)

    def defer(self, session: SessionT, callback: Callable[[], None]) -> bool:
        """To the end of a step with an evaluation in it."""
        return session.defer(callback)

    @contextmanager
    def at_boundary(self, session: SessionT, what: str, patience_secs: float | None = None) -> Iterator[None]:
        """Hold the steps back. The body of a loop may ask for this in the middle of its step: that ends there."""
        session.finish_step()
        with session.boundary.hold(what, patience_secs):
            yield
