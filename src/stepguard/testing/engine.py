"""The fake engine: a model of plain integers, with steps, snapshots and checkpoints, and no framework.

It proves that the core knows no framework, and it is the smallest complete example of an engine.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepguard.coordination.coordinator import Coordinator
from stepguard.disk.new_file import NewFile
from stepguard.engine import Beginning, Prepared, StepsDone, StepTrace, ValueWatch
from stepguard.errors import CheckpointMismatchError, StopRequested
from stepguard.options import Guarding, Mirror, Options, Restoring, Saving, Stopping, Watching, each_option_once, refuse
from stepguard.options.checks import check_local
from stepguard.saving.restoring import restore_newest
from stepguard.steps.boundary import Boundary
from stepguard.steps.interrupts import InterruptHold
from stepguard.store import Checkpoint, CheckpointStore
from stepguard.supervisor import Supervisor
from stepguard.testing.events import RecordedEvents
from stepguard.watching import trial

ENGINE = "fake"
_STATE_FILE = "state.json"


class FakeSession:
    """A model of integers. A step raises each integer by one, slowly enough that a torn snapshot shows.

    The session also has a ``weight``, which steps leave alone, and a ``loss``, which every step reports; a test may set
    either to NaN. A ``stepguard.steps.boundary.Boundary`` knows where steps begin and end.
    """

    def __init__(self, size: int) -> None:
        self.values = [0] * size
        self.weight = 0.0
        self.loss = 0.0
        self.step = 0
        self.returns = 0
        self.is_open = True
        self.boundary = Boundary()
        self.interrupts = InterruptHold(self.boundary)
        self.watch: ValueWatch | None = None
        self.trace: StepTrace | None = None
        self.before_close: Callable[[], None] | None = None
        self.end: tuple[int, Callable[[], None]] | None = None

    def run_step(self) -> None:
        """Run one training step."""
        with self.in_step():
            for index in range(len(self.values)):
                self.values[index] += 1
            if self.trace is not None:
                self.trace.numbers(self.step, 0, {"loss": self.loss})
        self._show(self.loss)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Make the block one training step. The step counts unless an error ends the block.

        Raises:
            StopRequested: the run is asked to stop at this boundary.
        """
        self.boundary.enter()
        try:
            self.check_end()
            self.boundary.check_stop()
        except StopRequested:
            self.boundary.leave(is_done=False)
            raise
        try:
            yield
        except BaseException:
            # Only some of the integers may have been raised: the state belongs to no step.
            self.boundary.leave_torn()
            raise
        self.step += 1
        self.boundary.leave()
        # Raise a Ctrl-C that came during the step.
        self.interrupts.raise_if_held()

    def check_end(self) -> None:
        """Ask for a stop, and raise StopRequested, if the run ends at this step."""
        if self.end is not None and self.step >= self.end[0]:
            self.end[1]()
            raise StopRequested(f"the run ends at step {self.step}")

    def report(self, loss: float) -> None:
        """Report a number that the program has computed, between two steps."""
        if self.trace is not None:
            self.trace.numbers(self.step, 0, {"loss": loss}, is_inside=False)
        self._show(loss)

    def _show(self, loss: float) -> None:
        if self.watch is not None and self.watch.look({"loss": loss}):
            self.watch.settle()

    def close(self) -> None:
        """End the session."""
        before_close, self.before_close = self.before_close, None
        if before_close is not None:
            before_close()
        self.is_open = False
        self.interrupts.finish()


@dataclass(frozen=True, slots=True)
class FakeSnapshot:
    """The integers of one step, and the weight."""

    step: int
    values: tuple[int, ...]
    written: str | None = None
    weight: float = 0.0

    @property
    def nbytes(self) -> int:
        """Eight bytes a value."""
        return 8 * len(self.values)


class FakeEngine:
    """The engine of :class:`FakeSession`. ``fail_writes`` holds errors that the next writes raise, one each."""

    name = ENGINE
    storage_error_types: tuple[type[BaseException], ...] = ()
    can_return = True

    def __init__(self, store: CheckpointStore | None = None, *, size: int = 64) -> None:
        self.store = store
        self.restoring = Restoring()
        self.size = size
        self.fail_writes: list[BaseException] = []
        self.fail_prepare: BaseException | None = None
        self.fail_summary: BaseException | None = None
        self.summaries = 0

    def prepare(self) -> Prepared[FakeSession]:
        """Return a session restored from the newest good checkpoint, or one at step 0."""
        if self.fail_prepare is not None:
            raise self.fail_prepare
        session = FakeSession(self.size)
        if self.store is None:
            return Prepared(session)
        return Prepared(session, restore_newest(self.store, functools.partial(self.restore, session), self.restoring))

    def restore(self, session: FakeSession, checkpoint: Checkpoint, *, in_run: bool = False) -> None:
        """Load the integers of a checkpoint. The fake has no random states and no position in data to restore."""
        path = checkpoint.path
        state = json.loads((path / _STATE_FILE).read_text())
        if len(state["values"]) != self.size:
            raise CheckpointMismatchError(
                f"{path}: expected {self.size} values, found {len(state['values'])}", path=path
            )
        session.step, session.values, session.weight = state["step"], state["values"], state.get("weight", 0.0)
        session.returns += in_run

    def step(self, session: FakeSession) -> int:
        """The number of steps done."""
        return session.step

    def step_name(self) -> str:
        """The name of the counter."""
        return "global_step"

    def total_steps(self, session: FakeSession) -> None:
        """Return ``None``: the session does not know."""

    def watch(self, session: FakeSession, before_close: Callable[[], None]) -> None:
        """Hold Ctrl-C back until the end of a step from now on. The session marks its steps in any case."""
        session.before_close = before_close
        session.interrupts.start()

    def watch_values(self, session: FakeSession, watch: ValueWatch) -> None:
        """Have the session report its loss to ``watch``."""
        session.watch = watch

    def trace_steps(self, session: FakeSession, trace: StepTrace) -> Beginning:
        """Have the session tell ``trace`` the loss of each step."""
        session.trace = trace
        return Beginning(session.step)

    def stop_at_boundary(self, session: FakeSession, main_thread_was_told: Callable[[], bool]) -> None:
        """Make the next step raise."""
        session.boundary.stop(main_thread_was_told)

    def end_at(self, session: FakeSession, step: int, ask_stop: Callable[[], None]) -> None:
        """Have the session raise there."""
        session.end = step, ask_stop

    def call_after_steps(self, session: FakeSession, steps: int, callback: Callable[[], int]) -> None:
        """Have the boundary count the steps and call back."""
        session.boundary.call_after_steps(steps, callback)

    def progress(self, session: FakeSession) -> object:
        """The numbers of steps and returns: both change the state."""
        return session.step, session.returns

    def steps_done(self, session: FakeSession) -> StepsDone:
        """The steps that the boundary has counted."""
        return StepsDone(*session.boundary.last_step)

    def at_boundary(
        self, session: FakeSession, what: str, patience_secs: float | None = None
    ) -> AbstractContextManager[None]:
        """Hold the boundary."""
        return session.boundary.hold(what, patience_secs)

    def snapshot(self, session: FakeSession) -> FakeSnapshot:
        """Copy the integers."""
        return FakeSnapshot(session.step, tuple(session.values), weight=session.weight)

    def non_finite(self, snapshot: Any) -> Sequence[str]:
        """``weight``, if it is not finite: integers always are."""
        return () if math.isfinite(snapshot.weight) else ("weight",)

    def checkpoint_name(self, step: int | None) -> str:
        """The basename of the store and the step."""
        return f"{'model.ckpt' if self.store is None else self.store.basename}-{step}"

    def write(self, snapshot: Any, stage: Path, name: str) -> dict[str, tuple[int, str]]:
        """Write one JSON file in a directory."""
        if self.fail_writes:
            raise self.fail_writes.pop(0)
        (stage / name).mkdir()
        state = {"step": snapshot.step, "values": list(snapshot.values), "weight": snapshot.weight}
        with NewFile(stage / name / _STATE_FILE) as file:
            file.write(json.dumps(state).encode())
        return {f"{name}/{_STATE_FILE}": (file.size, file.digest)}

    def summarise(self, session: FakeSession) -> None:
        """Count the call."""
        if self.fail_summary is not None:
            raise self.fail_summary
        self.summaries += 1

    def is_open(self, session: FakeSession) -> bool:
        """Whether the session is still open."""
        return session.is_open

    def close(self, session: FakeSession) -> None:
        """Close the session."""
        session.before_close = None
        session.close()


class FakeSupervisor(Supervisor[FakeSession]):
    """A Supervisor over the fake engine, with the verbs that every engine's Supervisor has."""

    @each_option_once
    def __init__(
        self,
        logdir: str | None = None,
        *,
        is_chief: bool = True,
        save_summaries_secs: float | None = 120,
        save_model_secs: float | None = 600,
        save_model_steps: int | None = None,
        size: int = 64,
        engine: FakeEngine | None = None,
        saving: Saving | None = None,
        stopping: Stopping | None = None,
        watching: Watching | None = None,
        guarding: Guarding | None = None,
        restoring: Restoring | None = None,
        mirror: str | os.PathLike[str] | Mirror | None = None,
    ) -> None:
        options = Options.of(
            save_summaries_secs=save_summaries_secs,
            save_model_secs=save_model_secs,
            save_model_steps=save_model_steps,
            saving=saving,
            stopping=stopping,
            watching=watching,
            guarding=guarding,
            restoring=restoring,
            mirror=mirror,
        )
        logdir, options = trial.applied(logdir, options)
        refuse(watching, "peer_timeout_secs", because="the fake engine has no servers")
        for_parts = ("hyperparameters", "only", "leave_out", "init_from", "init_fit")
        refuse(restoring, *for_parts, because="the fake engine's model has no parts")
        store = None
        if logdir:
            check_local("logdir", logdir)
            store = CheckpointStore(
                logdir,
                basename=options.saving.checkpoint_basename,
                engine=ENGINE,
                max_to_keep=options.saving.max_to_keep,
                keep_every_n_hours=options.saving.keep_checkpoint_every_n_hours,
                keep_best=options.saving.keep_best,
            )
        options.check_return(commits=store is not None and is_chief)
        self.engine = FakeEngine(size=size) if engine is None else engine
        self.engine.store, self.engine.restoring = store, options.restoring
        self.events = RecordedEvents()
        super().__init__(
            self.engine,
            coord=Coordinator(clean_stop_exception_types=(EOFError,)),
            is_chief=is_chief,
            logdir=logdir,
            store=store,
            events=self.events,
            has_summaries=True,
            saves_model=store is not None,
            options=options,
        )

    def prepare_or_wait_for_session(self, start_standard_services: bool = True) -> FakeSession:
        """Open a prepared session."""
        return self.open_session(self.engine.prepare, start_standard_services)

    def managed_session(
        self, start_standard_services: bool = True, close_summary_writer: bool = True
    ) -> AbstractContextManager[FakeSession]:
        """Return the context that a training loop lives in."""
        return self.managed(
            lambda: self.prepare_or_wait_for_session(start_standard_services),
            close_summary_writer=close_summary_writer,
        )

    def metrics(self, sess: FakeSession, values: Mapping[str, float]) -> None:
        """Note numbers that were measured of the last step."""
        self.keep_metrics(sess, values)

    def save(self, sess: FakeSession, name: str | None = None) -> None:
        """Save now, and keep that under ``name``."""
        self.keep_checkpoint(sess, name)
