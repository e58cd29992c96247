"""What the engines of loop frameworks share: all that their sessions can answer, in a run of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from stepguard.steps.session import Session

SessionT = TypeVar("SessionT", bound=Session)


class LoopEngine(Generic[SessionT]):
    """The base of an engine whose sessions are :class:`stepguard.steps.session.Session`.

    It has what :class:`stepguard.engine.Engine` asks about steps. A framework adds its ``name``, and what it alone
    knows: ``prepare``, ``restore``, ``watch_values``, ``snapshot``, ``non_finite``, ``checkpoint_name``, ``write`` and
    ``summarise``.
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

    def stop_at_boundary(self, session: SessionT, main_thread_was_told: Callable[[], bool]) -> None:
        """``steps`` ends at the next boundary, and ``step`` raises there."""
        session.boundary.stop(main_thread_was_told)

    def call_after_steps(self, session: SessionT, steps: int, callback: Callable[[], int]) -> None:
        """Count the steps of the session."""
        session.boundary.call_after_steps(steps, callback)

    def progress(self, session: SessionT) -> object:
        """The number of steps done in this session, as in :meth:`step`."""
        return session.boundary.steps - session.is_cut_short

    @contextmanager
    def at_boundary(self, session: SessionT, what: str, patience_secs: float | None = None) -> Iterator[None]:
        """Hold the steps back. The body of a loop may ask for this in the middle of its step: that ends there."""
        session.finish_step()
        with session.boundary.hold(what, patience_secs):
            yield
