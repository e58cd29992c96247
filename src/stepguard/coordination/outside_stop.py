"""A stop that is asked for from outside of the program: at the next step boundary, or after a given step."""

from __future__ import annotations

from typing import Generic

from stepguard.coordination.coordinator import Coordinator
from stepguard.engine import Engine, SessionT


class OutsideStop(Generic[SessionT]):
    """Stops the run of ``session`` on behalf of ``reason``. Any thread."""

    def __init__(self, engine: Engine[SessionT], coord: Coordinator, session: SessionT, reason: str) -> None:
        self._engine = engine
        self._coord = coord
        self._session = session
        self._reason = reason

    def at_boundary(self) -> None:
        """Set the stop flag, and let no further step begin. Repeated calls do nothing more."""
        self._coord.ask_stop(self._reason)
        self._engine.stop_at_boundary(self._session, self._coord.main_thread_was_told)

    def after(self, step: int) -> None:
        """Stop at the boundary after ``step``, which has not begun yet."""
        self._engine.end_at(self._session, step, self.at_boundary)
