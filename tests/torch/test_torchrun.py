"""Several processes that train one model under torchrun: they save, stop and go on together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepguard.store import CheckpointStore

PROGRAM = Path(__file__).with_name("distributed_training.py")

pytestmark = pytest.mark.timeout(240)


def torchrun(logdir: Path, processes: int, *arguments: str, fails: bool = False) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["--max-restarts=0", "--monitor-interval=0.1", str(PROGRAM), f"--logdir={logdir}", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert (ended.returncode != 0) == fails, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def outcomes(logdir: Path, processes: int) -> list[str]:
    return [logdir.with_suffix(f".outcome-{rank}").read_text() for rank in range(processes)]


def seen(logdir: Path, rank: int) -> dict[int, list[int]]:
    lines = logdir.with_suffix(f".seen-{rank}").read_text().splitlines()
    return {int(step): json.loads(batch) for step, batch in (line.split(" ", 1) for line in lines)}


def steps_saved(logdir: Path) -> list[int]:
    return [one.step for one in CheckpointStore(logdir).candidates()]


def test_one_killed_and_all_killed_change_nothing(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    torchrun(whole, 2, "--steps=60")
    # Started anew, and not with --max-restarts: with gloo PyTorch's own restart hangs now and then, also in a program
    # that only calls all_reduce.
    for kills in (["--kill=1:20"], ["--kill=0:33"], ["--kill=0:47", "--kill=1:47"]):
        torchrun(killed, 2, "--steps=60", *kills, fails=True)
    torchrun(killed, 2, "--steps=60")

    assert outcomes(killed, 2) == outcomes(whole, 2)
    for rank in range(2):
        assert seen(killed, rank) == seen(whole, rank)
    assert steps_saved(killed)[0] == 60


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(before, after, tmp_path):
    logdir = tmp_path / "run"
    # 50 items in batches of 4: an epoch is 13 steps of one process, and 7 of two.
    steps = 4 if before == 2 else 8
    torchrun(logdir, before, f"--steps={steps}")
    more = 4 if before == 2 else 2
    torchrun(logdir, after, f"--steps={steps + more}")

    assert steps_saved(logdir)[0] == steps + more
    items = [item for rank in range(max(before, after)) for batch in seen(logdir, rank).values() for item in batch]
    assert len(items) == len(set(items)), "an item of the epoch was seen twice"


def test_a_loss_that_is_not_finite_in_one_ends_all(tmp_path):
    said = torchrun(tmp_path / "run", 2, "--steps=100000", "--save-steps=5", "--nan=1:12", fails=True)

    assert "NonFiniteError: loss is nan at step 12" in said
    # After the same step: nobody was left waiting for the others.
    assert "stopping without the others" not in said
    assert "a round of the chief was left" not in said


def test_checkpoints_by_steps_are_met_for(tmp_path):
    torchrun(tmp_path / "run", 2, "--steps=30", "--save-steps=10")

    found = steps_saved(tmp_path / "run")
    assert found[0] == 30
    # They are taken at a step that all can still reach.
    assert any(10 <= step < 20 for step in found)
    assert any(20 <= step < 30 for step in found)


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_of_one_stops_all_after_the_same_step(rank, tmp_path):
    logdir = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for each in range(2):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(each), "WORLD_SIZE": "2"}
        command = [sys.executable, str(PROGRAM), f"--logdir={logdir}", "--steps=100000"]
        processes.append(subprocess.Popen(command, env={**os.environ, **place}, stderr=subprocess.PIPE, text=True))
    deadline = time.monotonic() + 60
    while not all(logdir.with_suffix(f".seen-{each}").exists() for each in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    processes[rank].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=60)[1] for process in processes]

    assert processes[rank].returncode == -signal.SIGTERM, errors
    assert processes[1 - rank].returncode == 0, errors
    last = [max(seen(logdir, each)) for each in range(2)]
    assert last[0] == last[1]
    assert steps_saved(logdir)[0] == last[0] + 1
