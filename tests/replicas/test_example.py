"""The example, as a user runs it: alone, and as a cluster that loses three of its tasks on the way."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def run(program: str, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / program), *arguments],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=480,
    )
    assert ended.returncode == 0, ended.stdout
    assert "Traceback" not in ended.stdout, ended.stdout
    return ended.stdout


def test_the_program_of_a_cluster_runs_alone(tmp_path):
    first = run("replicas.py", f"--logdir={tmp_path}", "--steps=600")
    assert float(re.search(r"test accuracy ([\d.]+)% after 600 steps", first)[1]) > 90
    # The step that is fetched beside the training operation may be the one before it.
    assert re.search("begins at step 60[01]", run("replicas.py", f"--logdir={tmp_path}", "--steps=700"))


@pytest.mark.timeout(500)
@pytest.mark.parametrize("options", [["--steps=2000"], ["--steps=600", "--sync"]], ids=["asynchronous", "synchronous"])
def test_the_demo_loses_a_worker_the_chief_and_the_server_and_ends_well(tmp_path, options):
    printed = run("demo_replicas.py", f"--logdir={tmp_path / 'run'}", *options)
    assert printed.count("kill -9") == 3
    assert re.search(r"^  test accuracy +9\d", printed, re.MULTILINE)
    assert "grpc" not in printed.lower()
