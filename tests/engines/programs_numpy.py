"""The suite's programs on the NumPy engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy_engine import ENGINE, STATE_FILE, Model, NumPySupervisor
from programs import EngineUnderTest, Program, Values

from stepguard.steps.session import Session


class NumPyProgram(Program):
    def __init__(self, logdir: str | None, size: int, **options: Any) -> None:
        self.arrays = {"integers": np.zeros(size, np.int64), "weight": np.zeros(())}
        self.sv = NumPySupervisor(Model(self.arrays, np.random.default_rng(1)), logdir, **options)

    def run_step(self, session: Session) -> None:
        self.run_step_with(session, lambda: None)

    def run_step_with(self, session: Session, halfway: Callable[[], object]) -> None:
        with session.step():
            self.arrays["integers"][0] += 1
            halfway()
            for index in range(1, len(self.arrays["integers"])):
                self.arrays["integers"][index] += 1
        # The suite waits for its services between two steps, and does nothing there: the next step is as good as begun.
        session.boundary.come_back()
        session.boundary.call_due()

    def values(self, session: Session) -> Values:
        return self.arrays["integers"].tolist()

    def step(self, session: Session) -> int:
        return session.global_step

    def report(self, session: Session, number: float) -> None:
        session.summary({"loss": number})

    def spoil(self, session: Session) -> None:
        self.arrays["weight"][...] = np.nan

    def fail_prepare(self, error: BaseException | None) -> None:
        self.sv.engine.fail_prepare = error


class NumPyUnderTest(EngineUnderTest):
    name = ENGINE

    def program(self, logdir: Path | str | None, *, size: int = 6, **options: Any) -> NumPyProgram:
        return NumPyProgram(None if logdir is None else str(logdir), size, **options)

    def end_of_input(self) -> Exception:
        return EOFError("no more input")

    def read(self, checkpoint: Path) -> Values:
        with np.load(checkpoint / STATE_FILE) as state:
            return state["integers"].tolist()
