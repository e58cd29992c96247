"""Starting several processes of the distributed test program, and reading what they have noted."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from stepguard.store import CheckpointStore

PROGRAM = Path(__file__).with_name("distributed_training.py")


def torchrun(logdir: Path, processes: int, *arguments: str, fails: bool = False) -> str:
    return run(*torchrun_command(logdir, processes, *arguments), fails=fails)


def run(*command: str, fails: bool = False) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (ended.returncode != 0) == fails, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def torchrun_command(logdir: Path, processes: int, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*command, "--max-restarts=0", "--monitor-interval=0.1", str(PROGRAM), f"--logdir={logdir}", *arguments]


def outcomes(logdir: Path, processes: int) -> list[str]:
    return [logdir.with_suffix(f".outcome-{rank}").read_text() for rank in range(processes)]


def seen(logdir: Path, rank: int) -> dict[int, list[int]]:
    lines = logdir.with_suffix(f".seen-{rank}").read_text().splitlines()
    return {int(step): json.loads(batch) for step, batch in (line.split(" ", 1) for line in lines)}


def steps_saved(logdir: Path) -> list[int]:
    return [one.step for one in CheckpointStore(logdir).candidates()]


def began(logdir: Path, processes: int) -> list[str]:
    return [logdir.with_suffix(f".began-{rank}").read_text() for rank in range(processes)]


def start_two(logdir: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """Two processes without torchrun, which takes as long to start as one of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, str(PROGRAM), f"--logdir={logdir}", *arguments]
        processes.append(subprocess.Popen(command, env={**os.environ, **place}, stderr=subprocess.PIPE, text=True))
    return processes


def run_two(logdir: Path, *arguments: str) -> list[str]:
    processes = start_two(logdir, *arguments)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return errors


def terminate_one(logdir: Path, rank: int, *arguments: str, by: signal.Signals = signal.SIGTERM) -> list[str]:
    """Send a signal to one of two processes, in the middle of the training; what each wrote to its stderr."""
    processes = start_two(logdir, "--steps=100000", *arguments)
    deadline = time.monotonic() + 120
    awaited = [".seen-0", ".seen-1", *([".evaluating"] if "--loop-steps=5" in arguments else [])]
    while not all(logdir.with_suffix(one).exists() for one in awaited) or not steps_saved(logdir):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[rank].send_signal(by)
    errors = [process.communicate(timeout=150)[1] for process in processes]

    assert processes[rank].returncode == -by, errors
    assert processes[1 - rank].returncode == 0, errors
    return errors
