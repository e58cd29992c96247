"""An engine that is written from ``stepguard/engine.py`` alone, for a framework of NumPy arrays.

It has what the fake engine lacks: loops over batches, random streams, and a position in the data. It uses no name that
the page does not give.
"""

from __future__ import annotations

import functools
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepguard.coordination.coordinator import Coordinator
from stepguard.disk.new_file import NewFile
from stepguard.engine import Prepared, ValueWatch
from stepguard.errors import CheckpointCorruptError, CheckpointMismatchError
from stepguard.options import Options, Restoring, each_option_once, refuse
from stepguard.saving.restoring import restore_newest
from stepguard.steps.engine import LoopEngine
from stepguard.steps.feeds import Feed, IterableFeed
from stepguard.steps.process_state import ProcessState
from stepguard.steps.random_streams import RandomStreams
from stepguard.steps.session import Session
from stepguard.store import Checkpoint, CheckpointStore
from stepguard.supervisor import Supervisor
from stepguard.testing import RecordedEvents
from stepguard.watching import trial

ENGINE = "numpy"
STATE_FILE = "state.npz"
Summaries = Callable[[], Mapping[str, float]] | None


@dataclass
class Model:
    """Arrays, which are trained in place, and the generator of the program's own noise."""

    arrays: dict[str, np.ndarray]
    noise: np.random.Generator

    def put(self, values: Mapping[str, np.ndarray]) -> None:
        for name, array in self.arrays.items():
            array[...] = values[name]


class NumPyStreams(RandomStreams):
    """Python's, NumPy's global one, and the model's."""

    def __init__(self, noise: np.random.Generator) -> None:
        self._noise = noise

    def capture(self) -> dict[str, Any]:
        return {**super().capture(), "noise": self._noise.bit_generator.state}

    def restore(self, states: Mapping[str, Any]) -> None:
        super().restore(states)
        self._noise.bit_generator.state = states["noise"]


class NumPyProcessState(ProcessState):
    def new_feed(self, loader: Any) -> Feed:
        return IterableFeed(loader, self.streams)


@dataclass(frozen=True, slots=True)
class NumPySnapshot:
    step: int
    arrays: Mapping[str, np.ndarray]
    process: str
    written: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


class NumPyEngine(LoopEngine[Session]):
    name = ENGINE

    def __init__(
        self,
        model: Model,
        coord: Coordinator,
        store: CheckpointStore | None,
        restoring: Restoring,
        summaries: Summaries,
    ) -> None:
        self.model, self.coord, self.store, self.restoring, self.summaries = model, coord, store, restoring, summaries
        self.events = RecordedEvents()
        self.streams = NumPyStreams(model.noise)
        self.value_watch: ValueWatch | None = None
        self.initial = {name: array.copy() for name, array in model.arrays.items()}
        self.fail_prepare: BaseException | None = None

    def prepare(self) -> Prepared[Session]:
        session = Session(self.coord, self.write_summary, NumPyProcessState(self.streams))
        recovered = None
        try:
            if self.store is not None:
                recovered = restore_newest(self.store, functools.partial(self.restore, session), self.restoring)
            if recovered is None or recovered.checkpoint is None:
                self.model.put(self.initial)
            if self.fail_prepare is not None:
                raise self.fail_prepare
        except BaseException:
            self.close(session)
            raise
        session.hold_interrupts()
        return Prepared(session, recovered)

    def restore(self, session: Session, checkpoint: Checkpoint, *, in_run: bool = False) -> None:
        path = checkpoint.path
        try:
            with np.load(path / STATE_FILE) as state:
                found = {name: state[name] for name in state.files}
            process = json.loads(str(found.pop("process")))
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointCorruptError(f"{path}: cannot be read: {error}", path=path) from error
        expected_shapes = {name: array.shape for name, array in self.model.arrays.items()}
        found_shapes = {name: array.shape for name, array in found.items()}
        if found_shapes != expected_shapes:
            raise CheckpointMismatchError(f"{path}: expected {expected_shapes}, found {found_shapes}", path=path)
        self.model.put(found)
        if in_run:
            session.global_step = process["step"]
        else:
            session.restore_process_state(process["state"], process["step"])

    def watch_values(self, session: Session, watch: ValueWatch) -> None:
        self.value_watch = watch
        session.watch_values(watch)

    def snapshot(self, session: Session) -> NumPySnapshot:
        process = {"step": session.global_step, "state": session.process_state.capture()}
        arrays = {name: array.copy() for name, array in self.model.arrays.items()}
        return NumPySnapshot(session.global_step, arrays, json.dumps(process))

    def non_finite(self, snapshot: Any) -> Sequence[str]:
        return [name for name, array in snapshot.arrays.items() if not np.isfinite(array).all()]

    def checkpoint_name(self, step: int | None) -> str:
        return f"{'model.ckpt' if self.store is None else self.store.basename}-{step}"

    def write(self, snapshot: Any, stage: Path, name: str) -> Mapping[str, tuple[int, str]]:
        (stage / name).mkdir()
        content = io.BytesIO()
        np.savez(content, process=np.array(snapshot.process), **snapshot.arrays)
        with NewFile(stage / name / STATE_FILE) as file:
            file.write(content.getbuffer())
        return {f"{name}/{STATE_FILE}": (file.size, file.digest)}

    def summarise(self, session: Session) -> None:
        if self.summaries is not None:
            with self.at_boundary(session, "a summary"), self.streams.preserved():
                values, step = self.summaries(), session.global_step
            self.write_summary(values, step)

    def write_summary(self, values: Mapping[str, Any], step: int) -> None:
        for tag, value in values.items():
            self.events.scalar(tag, value, step)
        if self.value_watch is not None:
            self.value_watch.look(values, step)


class NumPySupervisor(Supervisor[Session]):
    @each_option_once
    def __init__(
        self,
        model: Model,
        logdir: str | None = None,
        *,
        is_chief: bool = True,
        summaries: Summaries = None,
        **given: Any,
    ) -> None:
        logdir, options = trial.applied(logdir, Options.of(**given))
        refuse(options.watching, "peer_timeout_secs", because="the NumPy engine has no servers")
        for_parts = ("hyperparameters", "only", "leave_out", "init_from", "init_fit")
        refuse(options.restoring, *for_parts, because="the NumPy engine restores a model whole")
        saving = options.saving
        hours = saving.keep_checkpoint_every_n_hours
        keep = {"max_to_keep": saving.max_to_keep, "keep_every_n_hours": hours, "keep_best": saving.keep_best}
        store = CheckpointStore(logdir, basename=saving.checkpoint_basename, engine=ENGINE, **keep) if logdir else None
        options.check_return(commits=store is not None and is_chief)
        coord = Coordinator(clean_stop_exception_types=(EOFError,))
        self.engine = NumPyEngine(model, coord, store, options.restoring, summaries)
        super().__init__(
            self.engine,
            coord=coord,
            is_chief=is_chief,
            logdir=logdir,
            store=store,
            events=self.engine.events,
            has_summaries=True,
            saves_model=store is not None,
            options=options,
        )

    def prepare_or_wait_for_session(self, start_standard_services: bool = True) -> Session:
        return self.open_session(self.engine.prepare, start_standard_services)

    def managed_session(
        self, start_standard_services: bool = True, close_summary_writer: bool = True
    ) -> AbstractContextManager[Session]:
        open_session = functools.partial(self.prepare_or_wait_for_session, start_standard_services)
        return self.managed(open_session, close_summary_writer=close_summary_writer)
