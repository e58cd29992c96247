"""A real process that trains, really killed, again and again."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from forked import begin, fork

from stepguard.store import CheckpointStore
from stepguard.watching import ledger


class Run:
    """One process that trains, in its first step or later."""

    def __init__(self, logdir: Path, *arguments: str) -> None:
        self.output = Path(f"{logdir}.output")
        self.output.write_text("")
        command = [f"--logdir={logdir}", f"--seen={logdir}.seen", *arguments]
        self.process = fork(_train, str(self.output), command)
        deadline = time.monotonic() + 60
        while "in the first step" not in self.output.read_text():
            assert self.process.is_alive(), self.output.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def kill(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill_now(self) -> None:
        """SIGKILL. Its loader workers hold the pipe by which `join` would see its end, and stay for some seconds."""
        assert self.process.is_alive(), self.output.read_text()
        process = psutil.Process(self.process.pid)
        process.kill()
        process.wait(60)

    def end(self) -> int:
        self.process.join(60)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def outcome(self) -> str:
        assert self.end() == 0, self.output.read_text()
        return re.search(r"outcome (.*)", self.output.read_text())[1]


def _train(output: str, command: list[str]) -> None:
    import training

    begin(output)
    training.main(command)


def history(logdir: Path) -> dict[int, list[int]]:
    """The batch of each step, as the last process has seen it that did the step."""
    lines = Path(f"{logdir}.seen").read_text().splitlines()
    # A process that is killed may leave half a line.
    steps = [line.split(" ", 1) for line in lines if re.fullmatch(r"\d+ \[.*\]", line)]
    return {int(step): json.loads(batch) for step, batch in steps}


@pytest.mark.timeout(500)
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.soak)])
def test_kills_at_random_change_nothing(kills, tmp_path):
    chance = random.Random(20)
    fast = ("--step-secs=0.004", f"--steps={50 * kills}", "--workers=2")
    expected = Run(tmp_path / "whole", *fast, "--save-secs=0").outcome()
    killed = tmp_path / "killed"
    for number in range(kills):
        # On a busy machine the kill may come late, and is to find a run that has not ended.
        run = Run(killed, *fast, "--save-secs=0.02", f"--hold-at={45 * (number + 1)}")
        time.sleep(chance.uniform(0.05, 0.35))
        run.kill_now()

    assert Run(killed, *fast, "--save-secs=0.02").outcome() == expected
    assert history(killed) == history(tmp_path / "whole")
    assert [path.name for path in killed.glob("quarantine")] == []
    replays = [one for one in ledger.read(killed) if one["event"] == "replay"]
    assert {one["outcome"] for one in replays} == {"same"}, [one["message"] for one in replays]


def test_stopped_and_continued_it_is_only_later(tmp_path):
    chance = random.Random(5)
    short = ("--step-secs=0.004", "--steps=200", "--workers=2")
    expected = Run(tmp_path / "whole", *short, "--save-secs=0").outcome()
    run = Run(tmp_path / "stopped", *short, "--save-secs=0.02", "--hold-at=190")
    process = psutil.Process(run.process.pid)
    wait_until(lambda: Path(f"{tmp_path / 'stopped'}.seen").exists())
    for _ in range(6):
        run.kill(signal.SIGSTOP)
        wait_until(lambda: process.status() == psutil.STATUS_STOPPED)
        steps = len(history(tmp_path / "stopped"))
        time.sleep(0.05)  # how long it is stopped
        assert len(history(tmp_path / "stopped")) == steps < 200
        run.kill(signal.SIGCONT)
        time.sleep(chance.uniform(0.01, 0.08))
    (tmp_path / "stopped.go-on").touch()

    assert run.outcome() == expected
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")
    assert CheckpointStore(tmp_path / "stopped").newest_good(quarantine=False).checkpoint.step == 200


def test_sigterm_stops_at_a_step_saves_it_and_ends_as_the_signal_asks(tmp_path):
    run = Run(tmp_path / "run", "--steps=100000", "--save-secs=3600", "--workers=2")
    time.sleep(0.5)
    run.kill(signal.SIGTERM)

    assert run.end() == -signal.SIGTERM
    assert "stopping at the next step boundary" in run.output.read_text()
    last = max(history(tmp_path / "run"))
    assert CheckpointStore(tmp_path / "run").candidates()[0].step == last + 1
    Run(tmp_path / "run", f"--steps={last + 5}", "--workers=2").outcome()
    assert sorted(history(tmp_path / "run")) == list(range(last + 5))


def test_ctrl_c_leaves_after_the_step_that_is_under_way_and_saves_it(tmp_path):
    run = Run(tmp_path / "run", "--steps=100000", "--save-secs=3600", "--workers=0", "--step-secs=0.3")
    time.sleep(0.5)
    run.kill(signal.SIGINT)

    assert run.end() == 1
    assert "KeyboardInterrupt" in run.output.read_text()
    assert "while stopping" not in run.output.read_text()
    last = max(history(tmp_path / "run"))
    assert CheckpointStore(tmp_path / "run").candidates()[0].step == last + 1


def test_the_second_ctrl_c_leaves_at_once_and_saves_nothing_of_the_step(tmp_path):
    run = Run(tmp_path / "run", "--steps=100000", "--save-secs=3600", "--workers=0", "--step-secs=300")
    run.kill(signal.SIGINT)
    wait_for("at the end of this step", run)
    run.kill(signal.SIGINT)

    assert run.end() == 1
    assert "KeyboardInterrupt" in run.output.read_text()
    assert [one.step for one in CheckpointStore(tmp_path / "run").candidates()] == [0]


def test_a_worker_process_that_is_killed_does_not_look_like_a_stop_of_the_run(tmp_path):
    run = Run(tmp_path / "run", "--steps=100000", "--workers=2")
    workers = psutil.Process(run.process.pid).children()
    assert len(workers) == 2
    workers[0].kill()

    # PyTorch reports the loss of a worker as an error; it is not a stop that was asked for.
    assert run.end() == 1
    assert "DataLoader worker" in run.output.read_text()
    assert "stopping at the next step boundary" not in run.output.read_text()


def wait_for(text: str, run: Run) -> None:
    deadline = time.monotonic() + 60
    while text not in run.output.read_text():
        assert time.monotonic() < deadline, run.output.read_text()
        time.sleep(0.01)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
