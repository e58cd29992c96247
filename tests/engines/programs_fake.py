"""The suite's programs on the fake engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from programs import EngineUnderTest, Program, Values

from stepguard.testing import FakeSupervisor


class FakeProgram(Program):
    def __init__(self, logdir: str | None, **options: Any) -> None:
        self.sv = FakeSupervisor(logdir, **options)

    def run_step(self, session: Any) -> None:
        session.run_step()

    def run_step_with(self, session: Any, halfway: Callable[[], object]) -> None:
        with session.in_step():
            session.values[0] += 1
            halfway()
            for index in range(1, len(session.values)):
                session.values[index] += 1

    def values(self, session: Any) -> Values:
        return list(session.values)

    def step(self, session: Any) -> int:
        return int(session.step)

    def report(self, session: Any, number: float) -> None:
        session.report(number)

    def spoil(self, session: Any) -> None:
        session.weight = float("nan")

    def fail_prepare(self, error: BaseException) -> None:
        self.sv.engine.fail_prepare = error


class FakeUnderTest(EngineUnderTest):
    name = "fake"

    def program(self, logdir: Path | str | None, *, size: int = 6, **options: Any) -> FakeProgram:
        return FakeProgram(None if logdir is None else str(logdir), size=size, **options)

    def end_of_input(self) -> Exception:
        return EOFError("no more input")

    def read(self, checkpoint: Path) -> Values:
        return list(json.loads((checkpoint / "state.json").read_text())["values"])
