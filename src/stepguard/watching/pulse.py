"""Writes the heartbeat of one process while its run lasts."""

from __future__ import annotations

import contextlib
import time

from stepguard.watching import heartbeat, history
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.part import Part
from stepguard.watching.run_record import Room
from stepguard.words import logger

_log = logger(__name__)


class Pulse(Part):
    """Writes ``now`` into ``room`` every two seconds, and once at the end.

    ``is_passing`` marks a visitor of a chief's logdir, such as an evaluator: its heartbeat is removed at its end.
    """

    def __init__(self, now: Heartbeat, room: Room, *, is_passing: bool) -> None:
        self._now = now
        self._room = room
        self._is_passing = is_passing
        self._has_failed = False
        self._next_beat = time.monotonic()

    def look(self) -> None:
        """Write the heartbeat if it is due."""
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + heartbeat.INTERVAL_SECS
            self.beat()

    def leave(self) -> None:
        """Write the last heartbeat; a visitor then removes its own."""
        self.beat()
        logdir = self._room.logdir
        if self._is_passing and logdir is not None:
            # The chief's heartbeat describes the run. Without a chief, keep this one until the next process starts.
            with contextlib.suppress(OSError):
                if heartbeat.read_one(logdir, history.CHIEF) is not None:
                    heartbeat.forget(logdir, self._now.role)

    def beat(self) -> None:
        """Write the heartbeat now. A failing disk causes one warning."""
        if self._room.logdir is None or not self._room.is_open():
            return
        try:
            heartbeat.write(self._room.logdir, self._now)
            self._has_failed = False
        except OSError as error:
            if not self._has_failed:
                _log.warning("%s: no heartbeat could be written: %s", self._room.logdir, error)
            self._has_failed = True
