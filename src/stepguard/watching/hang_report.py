"""Feeds the hang watch with the steps that were done, and says what it has found."""

from __future__ import annotations

import logging
import os
import time

from stepguard.watching.hang_watch import HangWatch
from stepguard.watching.part import Part
from stepguard.watching.run_record import RunRecord
from stepguard.watching.step_meter import StepMeter

_log = logging.getLogger(__name__)

# A boundary as young as this has come after the hang.
_JUST_NOW_SECS = 1.0


class HangReport(Part):
    """Tells ``watch`` of each boundary that ``meter`` has seen, and the record and the log of each hang."""

    def __init__(self, watch: HangWatch, meter: StepMeter, record: RunRecord, hang_secs: float) -> None:
        self._watch = watch
        self._meter = meter
        self._record = record
        self._hang_secs = hang_secs
        self._moves_seen = meter.moves
        watch.start()

    def look(self) -> None:
        """Pass on what the meter has just seen."""
        now, moves = self._record.now, self._meter.moves
        if moves != self._moves_seen:
            self._moves_seen = moves
            self._watch.beat()
        if now.phase != "training" or self._has_come_to_the_end():
            # What comes after the last step is none; saving it, or waiting for threads, has limits of its own.
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
        """Watch no longer: also while the observer's thread waits for a disk, when no boundary is passed on."""
        self._watch.finish()
