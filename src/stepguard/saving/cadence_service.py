"""The service that looks at the cadence, and saves when it says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepguard.engine import Engine, RestsBetweenLoops
from stepguard.options import Saving
from stepguard.saving.cadence import Cadence, CadenceReport
from stepguard.saving.checkpointer import Checkpointer
from stepguard.saving.writer import CheckpointWriter


class CadenceService:
    """Called on a timer, by a thread of its own, while a session is open.

    Args:
        is_uploading: whether a checkpoint is on its way to the mirror.
        tell: is told what the cadence has come to, whenever that has changed.
    """

    def __init__(
        self,
        engine: Engine[Any],
        session: Any,
        cadence: Cadence,
        options: Saving,
        *,
        checkpointer: Checkpointer,
        writer: CheckpointWriter,
        is_uploading: Callable[[], bool],
        tell: Callable[[CadenceReport], None],
    ) -> None:
        self._engine = engine
        self._loops = engine if isinstance(engine, RestsBetweenLoops) else None
        self._session = session
        self._cadence = cadence
        self._options = options
        self._checkpointer = checkpointer
        self._writer = writer
        self._is_uploading = is_uploading
        self._tell = tell
        self._told: CadenceReport | None = None
        self._has_warned = False

    def __call__(self) -> None:
        """Look; save if a checkpoint is due."""
        is_writing, is_uploading = self._writer.busy, self._is_uploading()
        steps = self._engine.steps_done(self._session)
        is_due = self._cadence.look(steps, is_writing=is_writing, is_uploading=is_uploading)
        report = self._cadence.report
        if report is not None and report != self._told:
            self._told = report
            self._tell(report)
            self._warn_of_bytes()
        if is_due and not self._must_wait() and not self._checkpointer.save_on_request():
            self._cadence.failed()

    def _must_wait(self) -> bool:
        """Whether a save could not be made at this moment, for a reason that will pass."""
        loops, session = self._loops, self._session
        if loops is None:
            return False
        if not loops.is_resting(session):
            # In an evaluation inside a step no boundary comes.
            return loops.is_evaluating(session)
        # The next loop has boundaries. Who waits for it too long is told, by the save that fails.
        return not (self._checkpointer.has_copy or self._cadence.is_overdue)

    def _warn_of_bytes(self) -> None:
        """Say once that a bound which the program has set is not kept."""
        written = self._cadence.exceeded_bytes_per_day
        if written is None or self._has_warned or "max_bytes_per_day" not in self._options.given:
            return
        self._has_warned = True
        self._writer.warn(
            f"max_bytes_per_day={self._options.max_bytes_per_day:g} is not kept: a checkpoint at least every "
            f"max_interval_secs={self._options.max_interval_secs:g} writes {written:.3g} bytes a day; raise one of them"
        )
