"""Every engine tells what its steps are, so that those that are done again after a crash are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepguard.options import Saving, Watching
from stepguard.watching import ledger, trace

AT_FIVE = Saving(save_model_secs=0, save_model_steps=5, save_at_end=False)


class CrashError(Exception):
    """Ends a run without a last checkpoint, as a kill does."""


def train(engine: Any, logdir: Path, until: int, *, crashes: bool = False, shift: float = 0.0, **options: Any) -> None:
    program = engine.program(logdir, saving=AT_FIVE, **options)
    with program.sv.managed_session() as session:
        for step in range(program.step(session), until):
            program.run_step(session)
            program.report(session, step / 2 + shift * (step == 6))
        program.sv._saving.writer.drain(30)
        if crashes:
            raise CrashError


def replays(logdir: Path) -> list[dict[str, Any]]:
    return [one for one in ledger.read(logdir) if one["event"] == "replay"]


@pytest.mark.parametrize("what", ["numbers", "batches"])
def test_steps_that_are_done_again_are_the_same(engine: Any, tmp_path: Path, what: str) -> None:
    watching = Watching(trace=what)
    with pytest.raises(CrashError):
        train(engine, tmp_path, 9, crashes=True, watching=watching)
    train(engine, tmp_path, 12, watching=watching)
    (found,) = replays(tmp_path)
    assert (found["outcome"], found["step"]) == ("same", 5)
    assert found["to_step"] in (8, 9)


def test_a_number_that_differs_is_named_with_its_step(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(CrashError):
        train(engine, tmp_path, 9, crashes=True)
    train(engine, tmp_path, 12, shift=1.0)
    (found,) = replays(tmp_path)
    assert (found["outcome"], found["cause"]) == ("differs", None)
    assert found["differs_at"] in (6, 7)
    assert "3.00000 then, 4.00000 now" in found["message"]


def test_no_trace_is_none(engine: Any, tmp_path: Path) -> None:
    train(engine, tmp_path, 3, watching=Watching(trace=None))
    assert trace.roles(tmp_path) == []
