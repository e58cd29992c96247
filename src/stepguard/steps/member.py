"""The facts that a process tells the other processes: the number of steps done, and the error for which it stops."""

from __future__ import annotations

from stepguard.coordination.coordinator import Coordinator
from stepguard.errors import NonFiniteError
from stepguard.steps.gate import Moment
from stepguard.steps.session import Session
from stepguard.words import logger

_log = logger(__name__)


class SessionMember:
    """The half of a :class:`stepguard.steps.rendezvous.Member` that is the same for every framework."""

    def __init__(self, coord: Coordinator, session: Session) -> None:
        self._coord = coord
        self._session = session

    def steps_done(self) -> int:
        """The number of steps done in this session."""
        return self._session.boundary.steps

    def moment(self) -> Moment:
        """How far this process is."""
        moment = self._session.moment
        assert moment is not None, "a session with other processes has a gate"
        return moment

    def should_stop(self) -> bool:
        """Whether this process was asked to stop."""
        return self._coord.should_stop()

    def wait_for_stop(self, timeout_secs: float) -> object:
        """Wait until this process is asked to stop, at most ``timeout_secs``."""
        return self._coord.wait_for_stop(timeout_secs)

    def has_ended(self) -> bool:
        """Whether the run is over in this process although nobody asked it to stop, and without an error."""
        return self._coord.should_stop() and self._coord.stop_reason is None and self._coord.first_error is None

    def stop_reason(self) -> str | None:
        """Who asked this process to stop; ``None`` if nobody did."""
        return self._coord.stop_reason

    def request_stop(self, error: BaseException | None, reason: str | None = None) -> None:
        """Ask this process to stop: because of ``error``, or because another process stops for ``reason``."""
        if error is None and reason is None:
            self._coord.end()
            return
        if error is None:
            self._coord.ask_stop(str(reason))
            return
        try:
            self._coord.request_stop(error)
        except NonFiniteError:
            # After a join the coordinator raises the error here; the session's thread had ended before it was known.
            _log.debug("the run had ended when another process told of its sight", exc_info=True)

    def error(self) -> BaseException | None:
        """The error for which this process stops, if there is one."""
        try:
            self._coord.raise_requested_exception()
        except BaseException as error:  # noqa: BLE001 - the coordinator raises the error that is asked for here
            return error
        return None

    def is_impatient(self) -> bool:
        """Whether a second Ctrl-C has ended this process."""
        return self._session.is_impatient
