"""The step meter: reads the step and the step rate of a session."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from stepguard.engine import Engine, RestsBetweenLoops
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.part import Part
from stepguard.words import logger

_log = logger(__name__)

# The step rate is measured over this many seconds.
_RATE_SECS = 30.0


class StepMeter(Part):
    """Reads the step counter of a session into ``now``. ``moves`` counts the looks that found new steps, or an
    evaluation.
    """

    def __init__(self, engine: Engine[Any], now: Heartbeat) -> None:
        self._engine = engine
        self._loops = engine if isinstance(engine, RestsBetweenLoops) else None
        self._now = now
        self._session: Any = None
        self._finds_total = now.total_steps is None
        self._progress_seen: object = None
        self._rates: deque[tuple[float, int]] = deque()
        self.moves = 0

    def begin_at(self, step: int | None) -> None:
        """Note that a session will run from ``step`` on, if that is known."""
        now = self._now
        now.first_step = now.step = step
        now.boundary_time = time.time()
        if step is not None:
            self._measure(step)

    def follow(self, session: Any) -> None:
        """Read ``session`` from now on."""
        self._session = session

    def look(self) -> None:
        """Read the current step of the session."""
        now, session = self._now, self._session
        if session is None:
            return
        try:
            progress = self._engine.progress(session)
            # An evaluation that the program has announced is not a hang, however long it takes.
            is_evaluating = self._loops is not None and self._loops.is_evaluating(session)
            has_moved = progress != self._progress_seen or is_evaluating
            if has_moved or now.step is None:
                now.step = self._engine.step(session)
                if now.first_step is None:
                    now.first_step = now.step
                now.boundary_time = time.time()
                self._progress_seen = progress
            if self._finds_total:
                now.total_steps = self._engine.total_steps(session)
        except Exception as error:  # noqa: BLE001 - a closed session or a lost peer raises in the training thread
            _log.debug("the step could not be read: %s", error)
            return
        self.moves += has_moved
        if now.step is not None:
            self._measure(now.step)

    def leave(self) -> None:
        """Read the step for the last time, and release the session."""
        self.look()
        self._session = None

    def _measure(self, step: int) -> None:
        moment = time.monotonic()
        if self._rates and step < self._rates[-1][1]:
            # The run returned to an earlier step: older measurements say nothing about its speed.
            self._rates.clear()
        self._rates.append((moment, step))
        while len(self._rates) > 2 and self._rates[0][0] < moment - _RATE_SECS:
            self._rates.popleft()
        began, first = self._rates[0]
        if moment > began:
            self._now.steps_per_sec = max(0.0, (step - first) / (moment - began))
