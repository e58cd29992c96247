"""Records what each step of a session is, and says whether the steps that it does again are what they were.

The protocol: the session tells of its steps, from the thread of the step. The recorder appends what it is told to the
trace, and while steps are done again also compares it with the trace of the sessions before, under a lock, because a
program may run steps in several threads. The observer's thread looks once a second: it tries a failed disk again, and
publishes an outcome, so that no training thread logs or waits for the ledger, or for a disk that fails. After a kill
the trace has everything up to the last record, and the next start compares again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from stepguard.engine import Beginning
from stepguard.watching.outcome import Outcome
from stepguard.watching.part import Part
from stepguard.watching.replay import DIFFERS, Replay
from stepguard.watching.replay_report import outcome_of
from stepguard.watching.run_record import RunRecord
from stepguard.watching.trace import DIGESTS, NUMBERS, SETTINGS, VALUES, Fork, Mark, Record, Start
from stepguard.watching.trace_writer import TraceWriter
from stepguard.words import logger

_log = logger(__name__)


class StepRecorder(Part):
    """The :class:`stepguard.engine.StepTrace` of one session. Any thread.

    Args:
        logdir: where the trace is written, in ``traces/``.
        record: the record of the process, which gets the outcome.
        wants_digests: whether batches, random states and hyperparameters are recorded too.
    """

    def __init__(self, logdir: Path, record: RunRecord, *, wants_digests: bool) -> None:
        self.wants_digests = wants_digests
        self._record = record
        self._writer = TraceWriter(logdir, record.now.role)
        self._lock = threading.Lock()
        self._replay: Replay | None = None
        # By the step of a checkpoint, the step of the trace at which it was taken, and what is added to the steps that
        # the session tells; for an engine that counts something else than the step of its checkpoints.
        self._marks: dict[int, int] = {}
        self._offset = 0
        self._outcome: Outcome | None = None

    def begin(self, beginning: Beginning, *, is_resumed: bool) -> None:
        """Open the trace. Before the first step."""
        now = Start(beginning.step, beginning.epochs, is_resumed, beginning.processes, os.getpid(), time.time())
        past = self._writer.open(now)
        self._marks = {one.checkpoint_step: one.step for one in past.items if isinstance(one, Mark)}
        self._count_from(beginning.step)
        replay = Replay(past.items, replace(now, step=now.step + self._offset), is_whole=past.is_whole)
        self._replay = None if replay.is_over else replay

    def _count_from(self, checkpoint_step: int) -> None:
        """Continue the count of the trace where that checkpoint was taken."""
        self._offset = self._marks.get(checkpoint_step, checkpoint_step) - checkpoint_step

    # --- what the session tells ---

    def numbers(self, step: int, epochs: int, values: Mapping[str, float], is_inside: bool = True) -> None:
        """Record numbers that the program has reported."""
        step += self._offset
        self._writer.add(NUMBERS, step, epochs, values, 0 if is_inside else 1)
        if self._replay is not None:
            self._compare(NUMBERS, step, epochs, values, is_inside=is_inside)

    def digests(self, step: int, epochs: int, values: Mapping[str, int], *, source: str = "") -> None:
        """Record digests of what the step is made of."""
        step += self._offset
        self._writer.add(DIGESTS, step, epochs, values)
        if self._replay is not None:
            self._compare(DIGESTS, step, epochs, values, source=source)

    def settings(self, step: int, epochs: int, values: Mapping[str, float]) -> None:
        """Record the hyperparameters in force."""
        step += self._offset
        self._writer.add(SETTINGS, step, epochs, values)
        if self._replay is not None:
            self._compare(SETTINGS, step, epochs, values)

    def saved(self, step: int, checkpoint_step: int) -> None:
        """Note at which step of the trace a checkpoint was taken."""
        mark = Mark(step + self._offset, checkpoint_step)
        self._marks[checkpoint_step] = mark.step
        self._writer.note(mark)

    def went_back(self, step: int) -> None:
        """The session was put back to the checkpoint of ``step``, and goes on in another way. Inside the boundary."""
        with self._lock:
            self._finish()
        self._count_from(step)
        self._writer.note(Fork(step + self._offset, 0))

    def _compare(
        self,
        kind: int,
        step: int,
        epochs: int,
        values: Mapping[str, float],
        *,
        is_inside: bool = True,
        source: str = "",
    ) -> None:
        # The trace has floats, also where the framework has given numbers of its own.
        plain = values if kind == DIGESTS else {name: float(value) for name, value in values.items()}
        with self._lock:
            replay = self._replay
            if replay is None:
                return
            replay.see(Record(VALUES[kind], step, epochs, plain, is_inside))
            replay.source = source or replay.source
            if replay.is_over:
                self._finish()

    def _finish(self) -> None:
        """Keep the outcome for the observer's thread, with the lock taken."""
        replay, self._replay = self._replay, None
        if replay is None:
            return
        replay.end()
        self._outcome = outcome_of(replay)
        if replay.found is not None:
            # What the sessions before did after this step is not what this one goes on to do.
            step, epochs, _ = replay.found.moment
            self._writer.note(Fork(step, epochs + 1))

    # --- the observer's thread ---

    def look(self) -> None:
        """Publish the outcome once it is known, and try a failed disk again."""
        self._writer.retry()
        with self._lock:
            outcome, self._outcome = self._outcome, None
        if outcome is None:
            return
        (_log.warning if outcome.outcome == DIFFERS else _log.info)("%s", outcome.message)
        self._record.replayed(outcome)

    def leave(self) -> None:
        """Publish the outcome of a session that ends before it is known."""
        with self._lock:
            self._finish()
        self.look()

    def close(self) -> None:
        """Write nothing more."""
        self._writer.close()
