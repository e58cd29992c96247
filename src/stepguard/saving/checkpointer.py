"""When snapshots are taken: on a timer, every N steps, and at the end.

Between two loops the state belongs to the program, which may have lent the model to something else. A save then uses
the copy that the thread of the last loop took at its end. The copy is kept until the next one replaces it and reuses
its memory. A loop that ends soon after the last copy may take none, so that many short loops cost little; a timer or
a stop then saves the older copy. A program that saves what it has evaluated (:meth:`Checkpointer.save_here`) has a copy
taken at the end of each loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stepguard.engine import Engine, RestsBetweenLoops, SharedModel, Snapshot
from stepguard.errors import NoBoundaryError, SaveFailedError
from stepguard.saving.cadence import Cadence
from stepguard.saving.writer import CheckpointWriter
from stepguard.steps.copying_budget import COPYING_SHARE, CopyingBudget

# How long a save that the program asks for waits for a trigger that waits for a boundary.
_PATIENCE_SECS = 10.0


@dataclass(frozen=True, slots=True)
class _Copy:
    """A snapshot, the progress of the session there, and the seconds that training waited for it."""

    snapshot: Snapshot
    progress: object
    stall_secs: float


class Checkpointer:
    """Takes snapshots of one session at step boundaries and hands them to the writer. Any thread."""

    def __init__(
        self,
        engine: Engine[Any],
        session: Any,
        writer: CheckpointWriter,
        *,
        is_saved: bool,
        copies_all: bool = False,
        cadence: Cadence | None = None,
        copying_share: float = COPYING_SHARE,
    ) -> None:
        self._engine = engine
        self._shared = engine if isinstance(engine, SharedModel) else None
        self._loops = engine if isinstance(engine, RestsBetweenLoops) else None
        self._session = session
        self._writer = writer
        self._saving = threading.Lock()
        self._is_closed = False
        # Whether the state at `_saved_progress` has a checkpoint. A model that was just initialised has none.
        self._is_saved = is_saved
        self._saved_progress = engine.progress(session)
        # The newest copy. It is read only while no loop runs.
        self._copy: _Copy | None = None
        self._budget = CopyingBudget(copying_share)
        self._cadence = cadence
        self._copies_all = copies_all
        # The step of the last snapshot that was handed to the writer; of a restored checkpoint at the beginning.
        self._handed_over = 0
        self.saved_step = engine.step(session) if is_saved else None
        self._reads_live_at_end = False
        # The number of checkpoints that fell due while the writer was busy with another.
        self.skipped = 0
        if self._loops is not None:
            self._loops.call_at_rest(session, self._keep)

    def __call__(self) -> None:
        """Save now, unless nothing has changed, the last snapshot is still being written, or no boundary comes."""
        # Two triggers at the same moment cause one checkpoint.
        if not self._saving.acquire(blocking=False):
            return
        try:
            self._save_if_due()
        finally:
            self._saving.release()

    def _save_if_due(self) -> None:
        if self._is_closed or not self._has_changed():
            return
        if self._loops is not None and self._loops.defer(self._session, self):
            return
        try:
            if not self._writer.busy and self._save("a checkpoint", None):
                return
        except NoBoundaryError as error:
            if self._loops is None or not self._loops.defer(self._session, self):
                self._writer.warn(f"checkpoint skipped: {error}")
            return
        if self._cadence is not None:
            return  # It saves often, so that this is usual for another trigger.
        self.skipped += 1
        # A writer that retries logs the reason itself. Otherwise warn at 1, 2, 4, 8 ... skips, not at each.
        if not self._writer.retrying and self.skipped & (self.skipped - 1) == 0:
            self._writer.warn(
                f"a checkpoint was due while the last one was still being written: skipped ({self.skipped} so far); "
                f"save less often, or to a faster disk"
            )

    def _has_changed(self) -> bool:
        """Whether the state may differ from the last saved checkpoint."""
        return not self._is_saved or self._may_have_changed()

    def _may_have_changed(self) -> bool:
        """Whether the state may differ from the last snapshot."""
        if self._shared is not None and self._shared.is_shared(self._session):
            return True
        copy = self._copy_at_rest()
        progress = self._engine.progress(self._session) if copy is None else copy.progress
        return progress != self._saved_progress

    def has_saved(self, step: int | None) -> bool:
        """Whether a checkpoint of ``step`` was committed, or is being written."""
        return self._is_saved and self.saved_step == step

    @property
    def has_copy(self) -> bool:
        """Whether there is a copy that a save between two loops can use."""
        return self._copy_at_rest() is not None

    def save_on_request(self) -> bool:
        """Save now, as on a timer; return whether the present state is saved or being written.

        Called by a thread that does not train. ``False`` if no boundary came, or if an evaluation inside a step puts
        the save off until the step's end.
        """
        before = self._handed_over
        self()
        return self._handed_over > before or not self._has_changed()

    def save_here(self, what: str) -> bool:
        """Save the state of the last boundary now, although no checkpoint is due; return whether it will be written.

        Called by the thread that trains, outside of a step. It waits for a checkpoint that is being written. What
        prevents the save is a warning: no boundary, a disk that fails, a loop that was too short to be copied.
        """
        # Another trigger that waits for a boundary has its own patience.
        if not self._saving.acquire(timeout=_PATIENCE_SECS):
            self._writer.warn(f"{what} skipped: another checkpoint has waited {_PATIENCE_SECS:g} s for a boundary")
            return False
        try:
            if self._is_closed or not self._has_changed():
                return not self._is_closed
            if not self._writer.wait_until_idle():
                self._writer.warn(f"{what} skipped: the disk fails, and the checkpoint before it is not written yet")
                return False
            if self._loops is not None and self._loops.is_resting(self._session):
                return self._save_rest(self._loops, what)
            return self._save(what, None)
        except NoBoundaryError as error:
            self._writer.warn(f"{what} skipped: {error}")
            return False
        finally:
            self._copies_all = True
            self._saving.release()

    def _save_rest(self, loops: RestsBetweenLoops[Any], what: str) -> bool:
        """Save the copy of the end of the last loop. The caller is the thread of that loop, so nothing changes it."""
        copy = self._copy
        if copy is None or copy.progress != self._engine.progress(self._session):
            raise NoBoundaryError(
                f"no step boundary for {what}: no loop runs, and the last one was too short to be copied at its end. "
                f"From now on each loop is copied"
            )
        # No boundary is asked for: other processes may be in the next loop already, and wait there for this one.
        loops.saves_rest(self._session)
        if not self._writer.submit(copy.snapshot, copy.stall_secs, lambda: self._take(what, None)):
            return False
        self._saved_progress, self._is_saved, self.saved_step = copy.progress, True, copy.snapshot.step
        if self._cadence is not None:
            self._cadence.took(self._engine.steps_done(self._session), copy.stall_secs)
        self._handed_over += 1
        return True

    def save_last(self, timeout_secs: float, *, is_finished: bool = False, was_told: bool = False) -> None:
        """Save the last step, if steps were done since the last snapshot, and wait until the checkpoint is durable.

        ``is_finished`` says that the program ended without a stop request. A step without a copy is then read from the
        program, because no later start would do the step again. ``was_told`` says that a signal or the like
        ended this process, so that the others may go on.

        Raises:
            SaveFailedError: writing took longer than ``timeout_secs``.
        """
        deadline = time.monotonic() + timeout_secs
        self._reads_live_at_end = is_finished
        if self._writer.drain(timeout_secs) and self._engine.is_open(self._session):
            if self._shared is not None:
                self._shared.wait_for_others(self._session, deadline - time.monotonic(), may_go_on=was_told)
            if not self._may_have_changed():
                return
            try:
                self._save("the last checkpoint", max(0.0, deadline - time.monotonic()))
            except NoBoundaryError as error:
                # A thread that does not stop keeps its step open. The run itself has ended without an error.
                self._writer.warn(f"the last steps are not saved: {error}")
        if not self._writer.drain(max(0.0, deadline - time.monotonic())):
            failure = self._writer.last_error
            if failure is not None:
                raise SaveFailedError(
                    f"{self._writer.where}the last checkpoint could not be written in the {round(timeout_secs, 1):g} s "
                    f"after the stop: {failure}; the checkpoints before it are as they were. Make room or repair the "
                    f"disk, and start again",
                    path=self._writer.root,
                ) from failure
            raise SaveFailedError(
                f"{self._writer.where}the last checkpoint was still being written {round(timeout_secs, 1):g} s after "
                f"the stop; the checkpoints before it are as they were. Give it more time with a larger "
                f"stop_grace_secs",
                path=self._writer.root,
            )

    def is_outside_steps(self, error: BaseException) -> bool:
        """Whether ``error`` came from the data, before a step began with it."""
        return self._loops is not None and self._loops.is_outside_steps(self._session, error)

    def close(self) -> None:
        """Take no more snapshots, even if a trigger still asks for one."""
        self._is_closed = True
        self._copy = None

    def went_back(self) -> None:
        """Drop the copy after the session was put back to a checkpoint. At a boundary."""
        self._copy = None
        self._saved_progress, self._is_saved = self._engine.progress(self._session), True
        self.saved_step = self._engine.step(self._session)
        if self._cadence is not None:
            self._cadence.went_back()

    def _keep(self, is_last: bool) -> None:
        """Keep a copy of the last step of a loop that has ended, unless there is one already."""
        progress = self._engine.progress(self._session)
        if self._is_closed or (self._is_saved and progress == self._saved_progress):
            return
        if self._copy is not None and self._copy.progress == progress:
            return
        if is_last or self._copies_all or self._budget.allows_one():
            stall_secs = self._take_copy().stall_secs
            self._budget.spend(stall_secs)
            if self._cadence is not None and not self._copies_all:
                self._cadence.copied(stall_secs)

    def _copy_at_rest(self) -> _Copy | None:
        """The copy to save instead of the live state while that belongs to the program; ``None`` if there is none."""
        loops, copy = self._loops, self._copy
        if loops is None or copy is None or not loops.is_resting(self._session):
            return None
        if copy.progress == self._engine.progress(self._session):
            return copy
        # With other processes, an older copy would not be of the step at which the others are.
        return None if self._reads_live_at_end or not loops.is_alone(self._session) else copy

    def _save(self, what: str, patience_secs: float | None) -> bool:
        """Take a snapshot and hand it to the writer; ``False`` if the writer is busy with another."""
        saved = self._saved_progress, self._is_saved, self.saved_step
        try:
            snapshot, stall_secs = self._take(what, patience_secs)
        except self._writer.storage_errors as error:
            # Here the framework itself writes the snapshot, and the write has failed.
            return self._writer.retake(lambda: self._take(what, None), error)
        if self._writer.submit(snapshot, stall_secs, lambda: self._take(what, None)):
            self._handed_over += 1
            return True
        self._saved_progress, self._is_saved, self.saved_step = saved
        return False

    def _take(self, what: str, patience_secs: float | None) -> tuple[Snapshot, float]:
        """Take a snapshot; return it with the seconds that training waited. Also runs in the writer's thread."""
        with self._engine.at_boundary(self._session, what, patience_secs):
            copy = self._copy_at_rest()
            if copy is None:
                self._check_is_not_lent(what)
                copy = self._take_copy()
            self._saved_progress, self._is_saved, self.saved_step = copy.progress, True, copy.snapshot.step
            if self._cadence is not None:
                self._cadence.took(self._engine.steps_done(self._session), copy.stall_secs)
        return copy.snapshot, copy.stall_secs

    def _check_is_not_lent(self, what: str) -> None:
        """Raise NoBoundaryError if the state may belong to the program, because no loop runs."""
        loops = self._loops
        if loops is None or self._reads_live_at_end or not loops.is_resting(self._session):
            return
        raise NoBoundaryError(
            f"no step boundary for {what}: no loop runs, and the last one was too short to be copied at its end (such "
            f"copies take at most a twentieth of the time)"
        )

    def _take_copy(self) -> _Copy:
        """Copy the live state. At a boundary."""
        # Drop the old copy first, so that the new one reuses its memory.
        self._copy = None
        progress = self._engine.progress(self._session)
        began = time.monotonic()
        snapshot = self._engine.snapshot(self._session)
        copy = _Copy(snapshot, progress, time.monotonic() - began)
        if self._loops is not None:
            self._copy = copy
        return copy


class StepTrigger:
    """Saves every ``every_steps`` steps. If the program has no step counter, the trigger counts the steps.

    :meth:`stepguard.engine.Engine.call_after_steps` calls it at boundaries. An error of the save goes to ``on_error``.
    """

    def __init__(
        self,
        engine: Engine[Any],
        session: Any,
        checkpointer: Checkpointer,
        every_steps: int,
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._session = session
        self._checkpointer = checkpointer
        self._every_steps = every_steps
        self._on_error = on_error
        self._next_step = self._after(engine.step(session))

    def __call__(self) -> int:
        """Save if a checkpoint is due; return the number of steps until the next call."""
        try:
            step = self._engine.step(self._session)
            if step is not None and self._next_step is not None and step < self._next_step:
                # Not due yet: some runs did not raise the step, or the session began between two due steps.
                return self._next_step - step
            self._next_step = self._after(step)
            self._checkpointer()
        except Exception as error:  # noqa: BLE001 - the step itself has succeeded; the coordinator raises this error
            self._on_error(error)
        return self._every_steps

    def went_back(self) -> None:
        """Recompute the next due step after the run was put back to an earlier one. At a boundary."""
        self._next_step = self._after(self._engine.step(self._session))

    def _after(self, step: int | None) -> int | None:
        # Due steps are multiples of every_steps, so that a restarted run saves at the same steps.
        return None if step is None else (step // self._every_steps + 1) * self._every_steps
