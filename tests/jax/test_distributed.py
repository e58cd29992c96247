"""Several processes of ``jax.distributed``: they save and stop at one step, and each writes the shards that it has."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from stepguard.store import CheckpointStore

PROGRAM = Path(__file__).with_name("jax_distributed.py")


def start(logdir, processes, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(PROGRAM), f"--logdir={logdir}", f"--processes={processes}", f"--port={port}"]
    return [
        subprocess.Popen(
            [*command, f"--rank={rank}", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(processes)
    ]


def run(logdir, processes, *arguments):
    """What each process prints."""
    started = start(logdir, processes, *arguments)
    printed = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(printed)
    return printed


def outcomes(printed):
    return [re.search(r"outcome (.*)", one)[1] for one in printed]


def seen(logdir, rank):
    lines = logdir.with_suffix(f".seen-{rank}").read_text().splitlines()
    return {int(step): json.loads(batch) for step, batch in (line.split(" ", 1) for line in lines)}


def steps_saved(logdir):
    return [one.step for one in CheckpointStore(logdir).candidates()]


def wait_for_a_save(logdir, started, *, after=0):
    deadline = time.monotonic() + 100
    while not logdir.exists() or max(steps_saved(logdir), default=0) <= after:
        assert time.monotonic() < deadline
        assert [process.poll() for process in started] == [None, None], started[0].communicate()
        time.sleep(0.02)


def test_two_processes_that_are_killed_go_on_exactly_and_one_takes_over_from_them(tmp_path):
    whole = run(tmp_path / "whole", 2, "--steps=60", "--save-steps=100")
    killed = start(tmp_path / "killed", 2, "--steps=60", "--save-steps=3", "--step-secs=0.1")
    wait_for_a_save(tmp_path / "killed", killed, after=5)
    for process in killed:
        process.kill()
        process.communicate()
    printed = run(tmp_path / "killed", 2, "--steps=60", "--save-steps=3")

    begun = [int(re.search(r"began at (\d+)", one)[1]) for one in printed]
    assert begun[0] == begun[1] > 5
    assert outcomes(printed) == outcomes(whole)
    assert outcomes(whole)[0] == outcomes(whole)[1]
    assert [seen(tmp_path / "killed", rank) for rank in (0, 1)] == [seen(tmp_path / "whole", rank) for rank in (0, 1)]

    (alone,) = run(tmp_path / "killed", 1, "--steps=62")
    assert "began at 60" in alone
    assert [len(seen(tmp_path / "killed", 0)[step]) for step in (59, 60)] == [4, 8]


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path):
    logdir = tmp_path / "run"
    started = start(logdir, 2, "--steps=100000")
    wait_for_a_save(logdir, started)
    started[1].send_signal(signal.SIGTERM)
    assert started[1].wait(100) == -signal.SIGTERM
    # At its exit a process of JAX waits for the others, until it is told to end too.
    started[0].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=100)[0] for process in started]

    assert started[0].returncode == -signal.SIGTERM, printed
    last = [max(seen(logdir, rank)) + 1 for rank in (0, 1)]
    assert last == [steps_saved(logdir)[0]] * 2
