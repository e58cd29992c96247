"""PyTorch programs, as the core sees them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepguard import files
from stepguard.torch import random_states
from stepguard.torch.events import TorchEvents
from stepguard.torch.format import PROCESS, SUFFIX, write_file
from stepguard.torch.restore import Restorer
from stepguard.torch.session import Session
from stepguard.torch.state import Component, CopyStreams, HostMemory, nbytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TorchSnapshot:
    """The state of one step in the memory of the host: that of the program by name, and that of this process."""

    step: int
    states: Mapping[str, Any]
    process: Mapping[str, Any]
    nbytes: int
    copies: CopyStreams
    written: str | None = None


class TorchEngine:
    """The engine over the objects that a program saves. Threads: see :class:`stepguard.engine.Engine`."""

    storage_error_types: tuple[type[BaseException], ...] = ()

    def __init__(
        self,
        components: Sequence[Component],
        *,
        restorer: Restorer | None,
        events: TorchEvents | None,
        basename: str,
        summaries: Callable[[], Mapping[str, Any]] | None,
        init_fn: Callable[[], object] | None,
        should_stop: Callable[[], bool],
    ) -> None:
        self.name = "torch"
        self._components = components
        self._restorer = restorer
        self._events = events
        self._basename = basename
        self._summaries = summaries
        self._init_fn = init_fn
        self._should_stop = should_stop
        self._memory = HostMemory()

    # --- the session ---

    def prepare(self) -> Session:
        """A session that goes on from the newest good checkpoint; without one, from the model as it is."""
        session = Session(self._should_stop, self.write_summary)
        is_restored = self._restorer is not None and self._restorer.restore_newest(session)
        if not is_restored and self._init_fn is not None:
            self._init_fn()
        session.hold_interrupts()
        return session

    def is_open(self, session: Session) -> bool:
        """Whether the session can still run."""
        return session.is_open

    def close(self, session: Session) -> None:
        """Close the session."""
        session.unwatch()
        session.close()

    # --- steps ---

    def step(self, session: Session) -> int:
        """The steps done."""
        return session.global_step

    def step_name(self) -> str:
        """The name of the step-rate curve's counter, the same as TensorFlow's."""
        return "global_step"

    def watch(self, session: Session, before_close: Callable[[], None]) -> None:
        """A session marks its steps from the beginning; this only tells it whom to call."""
        session.watch(before_close)

    def stop_at_boundary(self, session: Session) -> None:
        """``steps`` ends at the next boundary, and ``step`` raises there."""
        session.boundary.must_stop = True

    def call_after_steps(self, session: Session, steps: int, callback: Callable[[], int]) -> None:
        """Count the steps of the session."""
        session.boundary.call_after_steps(steps, callback)

    def progress(self, session: Session) -> object:
        """The number of steps done in this session."""
        return session.boundary.steps

    @contextmanager
    def at_boundary(self, session: Session, what: str) -> Iterator[None]:
        """Hold the steps back."""
        session.finish_step()
        with session.boundary.hold(what):
            yield

    # --- checkpoints ---

    def snapshot(self, session: Session) -> TorchSnapshot:
        """Copy the state into host memory. One snapshot is in flight at a time, so the memory is used again."""
        copies = CopyStreams(session.training_streams)
        with torch.no_grad():
            states = {one.name: self._memory.copy(one.name, one.state(), copies) for one in self._components}
            process = self._memory.copy("process", session.process_state(), copies)
            copies.close()
        return TorchSnapshot(session.global_step, states, process, nbytes(states), copies)

    def checkpoint_name(self, step: int | None) -> str:
        """``model.ckpt-1200``."""
        return f"{self._basename}-{step}"

    def write(self, snapshot: Any, stage: Path, name: str) -> Mapping[str, tuple[int, str]]:
        """A directory with one file for each object, which ``torch.load(weights_only=True)`` reads."""
        snapshot.copies.finish()
        files.make_dir(stage / name)
        written = {f"{name}/{part}{SUFFIX}": state for part, state in snapshot.states.items()}
        written[f"{name}/{PROCESS}{SUFFIX}"] = {"global_step": snapshot.step, **snapshot.process}
        return {path: write_file(stage / path, state) for path, state in written.items()}

    def kept_checkpoints(self) -> Sequence[str]:
        """PyTorch keeps no list of its own."""
        return ()

    def committed(self, kept: Sequence[tuple[str, float]]) -> None:
        """PyTorch keeps no list of its own."""

    # --- summaries ---

    def summarise(self, session: Session) -> None:
        """Evaluate the program's summary function between two steps, without moving the random states."""
        if self._summaries is None or self._events is None:
            return
        with self.at_boundary(session, "a summary"), random_states.preserved(), torch.no_grad():
            values, step = self._summaries(), session.global_step
        _log.info("recording summary at step %d", step)
        self._events.summary(values, step)

    def write_summary(self, values: Mapping[str, Any], step: int) -> None:
        """Values that the program has computed itself. Any thread."""
        if self._events is not None:
            self._events.summary(values, step)
