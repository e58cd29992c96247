"""What every loop framework's process says of itself to the others: how far it is, and what it stops for."""

from __future__ import annotations

import logging

from stepguard.coordination.coordinator import Coordinator
from stepguard.errors import NonFiniteError
from stepguard.steps.session import Session

_log = logging.getLogger(__name__)


class SessionMember:
    """The half of a :class:`stepguard.steps.rendezvous.Member` that no framework differs in."""

    def __init__(self, coord: Coordinator, session: Session) -> None:
        self._coord = coord
        self._session = session

    def steps_done(self) -> int:
        """The steps that are done in this session."""
        return self._session.boundary.steps

    def should_stop(self) -> bool:
        """Whether this process was asked to stop."""
        return self._coord.should_stop()

    def wait_for_stop(self, timeout_secs: float) -> object:
        """Wait until it is, and at most so long."""
        return self._coord.wait_for_stop(timeout_secs)

    def request_stop(self, error: BaseException | None) -> None:
        """Ask it, for ``error`` if there is one; else because another process is at its end, or was asked."""
        if error is None:
            self._coord.end()
            return
        try:
            self._coord.request_stop(error)
        except NonFiniteError:
            # After a join the coordinator raises it here too: the thread of the session has ended before it was known.
            _log.debug("the run had ended when another process told of its sight", exc_info=True)

    def error(self) -> BaseException | None:
        """What it stops for, if that is an error."""
        try:
            self._coord.raise_requested_exception()
        except BaseException as error:  # noqa: BLE001 - the coordinator raises it to whoever has to know
            return error
        return None

    def is_impatient(self) -> bool:
        """Whether a second Ctrl-C has ended it."""
        return self._session.is_impatient
