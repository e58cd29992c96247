"""Several nodes, as docs/recipes/nodes.md has them: a launcher and a torchrun on each, here on one machine."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launch import PROGRAM, began, outcomes, seen, steps_saved, train

from stepguard.watching import ledger

pytestmark = pytest.mark.timeout(400)


def start_node(rank: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    # Longer than the other node takes to end: see the recipe.
    launcher = [sys.executable, "-m", "stepguard", "run", "--first-delay-secs=8", "--"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=0"]
    torchrun += [f"--node-rank={rank}", "--monitor-interval=0.1", "--local-addr=127.0.0.1"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-id=digits", f"--rdzv-endpoint=127.0.0.1:{port}"]
    command = [*launcher, *torchrun, str(PROGRAM), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_process_that_dies_on_one_node_is_one_restart_of_both(logdir, tmp_path):
    whole = tmp_path / "whole"
    train(whole, 2, "--steps=30", "--save-steps=10")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    training = (f"--logdir={logdir}", "--steps=30", "--save-steps=10", "--kill=1:15", "--kill-once-saved=9")
    nodes = [start_node(rank, port, *training) for rank in range(2)]
    try:
        said = [node.communicate(timeout=200)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert all("stepguard: ended well after" in one for one in said), said
    # Both have gone on from one step, the batches are those of a run that nobody killed, and so are the weights.
    assert began(logdir, 2)[0].split()[0] == began(logdir, 2)[1].split()[0] != "0"
    assert outcomes(logdir, 2) == outcomes(whole, 2)
    assert [seen(logdir, rank) for rank in range(2)] == [seen(whole, rank) for rank in range(2)]
    assert steps_saved(logdir)[0] == 30
    events = [one["event"] for one in ledger.read(logdir) if one.get("role") == "chief"]
    assert (events.count("start"), events.count("restore")) == (2, 1)
