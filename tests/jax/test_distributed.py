"""Several processes of ``jax.distributed``: they save and stop at one step, and each writes the shards that it has."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import jax_forked
import pytest

from stepguard.store import CheckpointStore

KILLS = int(os.environ.get("STEPGUARD_JAX_KILLS", "3"))


class Run:
    """Processes that train together in ``logdir``."""

    def __init__(self, logdir: Path, processes: int, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._outputs = [logdir.with_suffix(f".output-{rank}") for rank in range(processes)]
        self._begin_at = [one.stat().st_size if one.exists() else 0 for one in self._outputs]
        common = [f"--logdir={logdir}", f"--processes={processes}", f"--port={port}", "--notes", *arguments]
        self.processes = [
            jax_forked.start("jax_distributed.py", str(output), [*common, f"--rank={rank}"])
            for rank, output in enumerate(self._outputs)
        ]

    def printed(self) -> list[str]:
        """What each process has printed."""
        outputs = zip(self._outputs, self._begin_at, strict=True)
        return [one.read_text()[begin:] if one.exists() else "" for one, begin in outputs]

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 100
        while not is_so():
            assert all(process.is_alive() for process in self.processes), self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.01)

    def wait_for_steps(self) -> list[int]:
        """Wait until all train; the steps at which they began."""
        self.wait_until(lambda: all("trains" in one for one in self.printed()))
        return [int(re.search(r"began at (\d+)", one)[1]) for one in self.printed()]

    def kill(self, ranks: list[int]) -> None:
        """Kill these, and end the others as a launcher does that has lost one of its processes."""
        for rank in ranks:
            assert self.processes[rank].is_alive(), self.printed()
            os.kill(self.processes[rank].pid, signal.SIGKILL)
        for process in self.processes:
            process.join(0.5)
            process.kill()
            process.join()

    def outcomes(self) -> list[str]:
        for process in self.processes:
            process.join(100)
        assert [process.exitcode for process in self.processes] == [0] * len(self.processes), self.printed()
        return [re.search(r"outcome (.*)", one)[1] for one in self.printed()]


def seen(logdir: Path, rank: int) -> dict[int, list[int]]:
    """The batch of each step, as the last process of the rank has seen it that did the step."""
    lines = logdir.with_suffix(f".seen-{rank}").read_text().splitlines()
    return {int(step): json.loads(batch) for step, batch in (line.split(" ", 1) for line in lines)}


def steps_saved(logdir: Path) -> list[int]:
    return [one.step for one in CheckpointStore(logdir).candidates()] if logdir.exists() else []


@pytest.mark.parametrize("kills", [KILLS])
def test_kills_of_two_processes_change_nothing_and_one_takes_over_from_them(tmp_path: Path, kills: int) -> None:
    chance = random.Random(15)
    steps = 40 + 20 * kills
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = Run(whole, 2, f"--steps={steps}", "--save-steps=1000").outcomes()
    begun = []
    for number in range(kills):
        # On a busy machine the kill may come late, and is to find a run that has not ended.
        hold_at = f"--hold-at={20 * (number + 1)}"
        run = Run(killed, 2, f"--steps={steps}", "--save-secs=0.03", "--step-secs=0.02", hold_at)
        begun += run.wait_for_steps()
        run.wait_until(lambda: max(steps_saved(killed), default=0) > 0)
        time.sleep(chance.uniform(0.05, 0.35))
        run.kill([[0, 1], [1], [0]][number % 3])
    last = Run(killed, 2, f"--steps={steps}", "--save-secs=0.03")

    assert last.outcomes() == expected
    assert expected[0] == expected[1]
    assert [seen(killed, rank) for rank in (0, 1)] == [seen(whole, rank) for rank in (0, 1)]
    assert begun[::2] == begun[1::2] == sorted(begun[::2])
    assert begun[0] == 0 < begun[2]
    assert list(killed.glob("quarantine")) == []

    alone = Run(killed, 1, f"--steps={steps + 2}")
    alone.outcomes()
    assert f"began at {steps}" in alone.printed()[0]
    assert [len(seen(killed, 0)[step]) for step in (steps - 1, steps)] == [4, 8]


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path: Path) -> None:
    logdir = tmp_path / "run"
    run = Run(logdir, 2, "--steps=100000", "--save-secs=0.05")
    run.wait_until(lambda: max(steps_saved(logdir), default=0) > 0)
    first, second = run.processes
    os.kill(second.pid, signal.SIGTERM)
    second.join(100)
    assert second.exitcode == -signal.SIGTERM, run.printed()
    # At its exit a process of JAX waits for the others, until it is told to end too.
    os.kill(first.pid, signal.SIGTERM)
    first.join(100)

    assert first.exitcode == -signal.SIGTERM, run.printed()
    last = [max(seen(logdir, rank)) + 1 for rank in (0, 1)]
    assert last == [steps_saved(logdir)[0]] * 2
