"""How far a session is, and how fast."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

from stepguard.engine import Engine, RestsBetweenLoops
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.part import Part

_log = logging.getLogger(__name__)

# Over so many seconds the step rate is measured.
_RATE_SECS = 30.0


class StepMeter(Part):
    """Reads the step counter of a session into ``now``. ``moves`` counts the looks that found steps done, or an
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
        """A session is going to run from ``step`` on, if that is known."""
        now = self._now
        now.first_step = now.step = step
        now.boundary_time = time.time()
        if step is not None:
            self._measure(step)

    def follow(self, session: Any) -> None:
        """Look at ``session`` from now on."""
        self._session = session

    def look(self) -> None:
        """How far the session is now."""
        now, session = self._now, self._session
        if session is None:
            return
        try:
            progress = self._engine.progress(session)
            # An evaluation that the program has told of is no hang, however long it takes.
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
        except Exception as error:  # noqa: BLE001 - the session may be closed, or its peer gone: whoever trains is told
            _log.debug("the step could not be read: %s", error)
            return
        self.moves += has_moved
        if now.step is not None:
            self._measure(now.step)

    def leave(self) -> None:
        """A last look, after which the session may be collected."""
        self.look()
        self._session = None

    def _measure(self, step: int) -> None:
        moment = time.monotonic()
        if self._rates and step < self._rates[-1][1]:
            # The run went back: what was before tells nothing of its speed.
            self._rates.clear()
        self._rates.append((moment, step))
        while len(self._rates) > 2 and self._rates[0][0] < moment - _RATE_SECS:
            self._rates.popleft()
        began, first = self._rates[0]
        if moment > began:
            self._now.steps_per_sec = max(0.0, (step - first) / (moment - began))
