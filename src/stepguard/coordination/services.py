"""The services of a supervised run, which timers call while the program trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from stepguard.coordination.looper import LooperThread
from stepguard.engine import Engine, EventLog
from stepguard.errors import NoBoundaryError
from stepguard.words import logger

_log = logger(__name__)

_LOGGED_RATES = 10


class WhileOpen:
    """Calls a service while its session is open: a program may close the session before it stops the supervisor."""

    def __init__(self, engine: Engine[Any], session: Any, service: Callable[[], object]) -> None:
        self._engine = engine
        self._session = session
        self._service = service

    def __call__(self) -> None:
        """Call the service. An error from a session that was closed during the call is not an error of the run.

        Nor is a step that is longer than the service waits for its end, such as one in which a framework compiles.
        """
        if not self._engine.is_open(self._session):
            return
        try:
            self._service()
        except NoBoundaryError as error:
            _log.warning("skipped until the next time: %s", error)
        except Exception as error:
            if self._engine.is_open(self._session):
                raise
            _log.debug("the session was closed while a service used it: %s", error)


class StepCounter:
    """Measures steps per second from one call to the next, and writes them as the curve ``<step name>/sec``."""

    def __init__(self, engine: Engine[Any], session: Any, events: EventLog) -> None:
        self._engine = engine
        self._session = session
        self._events = events
        self._tag = f"{engine.step_name()}/sec"
        self._reports = 0
        self._last_step = engine.step(session) or 0
        self._last_time = time.monotonic()

    def __call__(self) -> None:
        """Write the rate since the last call."""
        step = self._engine.step(self._session) or 0
        now = time.monotonic()
        steps, seconds = step - self._last_step, now - self._last_time
        self._last_step, self._last_time = step, now
        if steps < 0:
            return  # The run returned to an earlier step, so the steps done in between are unknown.
        rate = steps / seconds if seconds > 0 else float("inf")
        self._events.scalar(self._tag, rate, step)
        self._reports += 1
        if self._reports <= _LOGGED_RATES:
            _log.info("%s: %g", self._tag, rate)

    def finish(self) -> None:
        """Write the rate of a run too short for a measurement, if it did any steps. Call this between two steps.

        If the step can no longer be read, the curve stays empty; the run still ends normally.
        """
        if self._reports or not self._engine.is_open(self._session):
            return
        try:
            if (self._engine.step(self._session) or 0) > self._last_step:
                self()
        except Exception as error:  # noqa: BLE001 - see above
            _log.debug("%s of the whole run is not known: %s", self._tag, error)


class StepCounterThread(LooperThread):
    """Calls a step counter on a timer. The first call comes after one interval, since there is no rate before."""

    def start_loop(self) -> None:
        """Wait for the first interval, or for a stop."""
        self._wait_until(self._clock() + (self._interval_secs or 0.0))
