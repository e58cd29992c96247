"""A program on an engine that is written from ``engine.py`` alone resumes exactly, wherever it is killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from programs import wait_until

from stepguard.store import CheckpointStore

STEPS = 400
KILLS = 3
PROGRAM = Path(__file__).parent / "toy_training.py"


@pytest.fixture
def engine():
    """None of the suite's: the engine is in the processes."""


def arguments(logdir: Path | str, weights: Path) -> list[str]:
    return [sys.executable, str(PROGRAM), str(logdir), str(weights), str(STEPS)]


def run(logdir: Path | str, weights: Path) -> int:
    """Run to the end; the step that it began at."""
    done = subprocess.run(
        arguments(logdir, weights), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=100
    )
    return int(done.stdout.split()[0])


def newest(logdir: Path) -> int:
    steps = [one.step for one in CheckpointStore(logdir).candidates() if one.is_committed and one.step is not None]
    return max(steps, default=0)


def run_and_kill(logdir: Path, weights: Path, *, after: int) -> None:
    """Run until there is a new checkpoint, and kill the run ``after`` steps later, whatever it does then."""
    before = newest(logdir)
    with subprocess.Popen(
        arguments(logdir, weights), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write("\n" * 15)
            process.stdin.flush()
            wait_until(lambda: newest(logdir) > before, f"a checkpoint after step {before}")
            process.stdin.write("\n" * after)
            process.stdin.flush()
            for _ in range(15 + after):
                assert process.stdout.readline()
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL


def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_one_that_is_not(tmp_path):
    whole, killed, logdir = tmp_path / "whole.npz", tmp_path / "killed.npz", tmp_path / "logdir"
    run("", whole)

    for _ in range(KILLS):
        after = random.randint(1, 40)
        print(f"killed {after} steps after a checkpoint")
        run_and_kill(logdir, killed, after=after)
    assert not killed.exists()
    resumed_at = run(logdir, killed)

    assert resumed_at >= 10 * KILLS
    assert killed.read_bytes() == whole.read_bytes()
