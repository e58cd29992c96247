"""Passes finished steps on to the hang watch, and reports the hangs that it finds."""

from __future__ import annotations

import os
import time

from stepguard.watching.hang_watch import HangWatch
from stepguard.watching.part import Part
from stepguard.watching.run_record import RunRecord
from stepguard.watching.step_meter import StepMeter
from stepguard.words import logger

_log = logger(__name__)

# A boundary no older than this must have come after the hang.
_JUST_NOW_SECS = 1.0


class HangReport(Part):
    """Tells ``watch`` of each boundary that ``meter`` saw, and writes each hang to the record and the log."""

    def __init__(self, watch: HangWatch, meter: StepMeter, record: RunRecord, hang_secs: float) -> None:
        self._watch = watch
        self._meter = meter
        self._record = record
        self._hang_secs = hang_secs
        self._moves_seen = meter.moves
        watch.start()

    def look(self) -> None:
        """Tell the watch of new boundaries, and report a hang that has begun or ended."""
        now, moves = self._record.now, self._meter.moves
        if moves != self._moves_seen:
            self._moves_seen = moves
            self._watch.beat()
        if now.phase != "training" or self._has_come_to_the_end():
            # Not a hang: the last save, and the wait for threads, come after the last step and have their own limits.
            self._watch.beat()
        elif self._watch.reported() and now.stacks is None:
            now.stacks = os.fspath(self._watch.stacks)
            _log.warning(
                "no step boundary for %g s: the stacks of all threads are in %s", self._hang_secs, self._watch.stacks
            )
            self._record.note_warning(f"no step boundary for {self._hang_secs:g} s")
        elif now.stacks is not None and time.time() - (now.boundary_time or 0.0) < _JUST_NOW_SECS:
            _log.warning("steps are done again, after a hang")
            now.stacks = None

    def _has_come_to_the_end(self) -> bool:
        step, total = self._record.now.step, self._record.now.total_steps
        return step is not None and total is not None and step >= total

    def close(self) -> None:
        """End the watch, even while the observer's thread waits for a disk and passes no boundary on."""
        self._watch.finish()
