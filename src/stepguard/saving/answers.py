"""Does what is asked of a run from outside: to save now, or to stop. See `stepguard.watching.requests`."""

from __future__ import annotations

from typing import Generic

from stepguard.coordination.coordinator import Coordinator
from stepguard.coordination.outside_stop import OutsideStop
from stepguard.engine import Engine, RestsBetweenLoops, SessionT
from stepguard.saving.run_saver import RunSaver
from stepguard.stops import COMMAND
from stepguard.watching.requests import SAVE, STOP, Answer, Request


class Answers(Generic[SessionT]):
    """Answers the requests to the run of one session. Any thread may call it; a save keeps the thread waiting."""

    def __init__(
        self, engine: Engine[SessionT], session: SessionT, *, coord: Coordinator, saver: RunSaver[SessionT]
    ) -> None:
        self._engine = engine
        self._session = session
        self._saver = saver
        self._stop = OutsideStop(engine, coord, session, COMMAND)

    def __call__(self, request: Request) -> Answer:
        """Do what ``request`` asks for, and say what was done."""
        if request.verb == SAVE:
            return self._saver.save_for(request.name)
        if request.verb != STOP:
            return Answer(False, f"expected {SAVE} or {STOP}, found {request.verb!r:.80}")
        now = self._engine.step(self._session)
        if request.step is None:
            self._stop.at_boundary()
            return Answer(True, f"stops at the next step boundary, after step {now}")
        engine: object = self._engine
        if isinstance(engine, RestsBetweenLoops) and not engine.is_alone(self._session):
            return Answer(False, "a stop at a given step is for a run of one process; leave --at out")
        if now is None or request.step <= now:
            return Answer(False, f"expected a step after the present one, found {request.step}: it is at step {now}")
        self._stop.after(request.step)
        return Answer(True, f"stops after step {request.step}; it is at step {now}")
