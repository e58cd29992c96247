"""A real process that trains with dropout, shuffling, Grain and donated arrays, really killed, again and again."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import jax_forked
import pytest

from stepguard.store import CheckpointStore

STEPS = 100


class Run:
    def __init__(self, logdir: Path, *arguments: str) -> None:
        self.output = Path(f"{logdir}.output")
        self._begins_at = self.output.stat().st_size if self.output.exists() else 0
        self.process = jax_forked.start("jax_training.py", str(self.output), [f"--logdir={logdir}", *arguments])
        deadline = time.monotonic() + 100
        while "in the first step" not in self.printed():
            assert self.process.is_alive(), self.printed()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def printed(self) -> str:
        return self.output.read_text()[self._begins_at :] if self.output.exists() else ""

    def kill(self, number: int) -> None:
        assert self.process.is_alive(), self.printed()
        os.kill(self.process.pid, number)
        self.process.join(100)
        assert self.process.exitcode == -number, self.printed()

    def outcome(self) -> str:
        self.process.join(100)
        assert self.process.exitcode == 0, self.printed()
        return re.search(r"outcome (.*)", self.printed())[1]


def history(logdir: Path) -> dict[int, str]:
    """The batch of each step, as the last process has seen it that did the step."""
    return dict(re.findall(r"^step (\d+) (\[.*\])$", Path(f"{logdir}.output").read_text(), re.MULTILINE))


@pytest.mark.parametrize("kills", [int(os.environ.get("STEPGUARD_JAX_KILLS", "3"))])
def test_kills_change_nothing(tmp_path, kills):
    chance = random.Random(20)
    expected = Run(tmp_path / "whole", f"--steps={STEPS}", "--save-secs=0").outcome()
    killed = tmp_path / "killed"
    for number in range(kills):
        # On a busy machine the kill may come late, and is to find a run that has not ended.
        hold_at = STEPS * (number + 1) // (kills + 1)
        run = Run(killed, f"--steps={STEPS}", "--save-secs=0.02", "--step-secs=0.02", f"--hold-at={hold_at}")
        time.sleep(chance.uniform(0.05, 0.35))
        run.kill(signal.SIGKILL)

    assert Run(killed, f"--steps={STEPS}", "--save-secs=0.02").outcome() == expected
    assert history(killed) == history(tmp_path / "whole")
    assert list(killed.glob("quarantine")) == []


def test_sigterm_stops_at_a_step_and_saves_it(tmp_path):
    run = Run(tmp_path / "run", "--steps=100000", "--save-secs=3600")
    run.kill(signal.SIGTERM)

    assert "stopping at the next step boundary" in run.printed()
    last = max(map(int, history(tmp_path / "run")))
    assert CheckpointStore(tmp_path / "run").candidates()[0].step == last + 1
