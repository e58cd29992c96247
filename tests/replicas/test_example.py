"""The example, as a user runs it: alone, and as a cluster that loses three of its tasks on the way."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cluster import FORKS
from forks import run_program

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


class Forked:
    """A task of the demo that is forked from a process which has imported TensorFlow: seven starts take no time."""

    def __init__(self, argv: list[str], output: Path) -> None:
        self.output = output
        self._process = FORKS.start(run_program, str(output), argv)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_secs: float | None = None) -> None:
        self._process.join(timeout_secs)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def alone(output: Path, *arguments: str) -> str:
    process = Forked([str(EXAMPLES / "replicas.py"), *arguments], output)
    process.wait(240)
    assert process.returncode == 0, output.read_text()
    return output.read_text()


def test_the_program_of_a_cluster_runs_alone(tmp_path):
    logdir = f"--logdir={tmp_path / 'run'}"
    first = alone(tmp_path / "first", logdir, "--steps=600")
    assert float(re.search(r"test accuracy ([\d.]+)% after 600 steps", first)[1]) > 90
    # The step that is fetched beside the training operation may be the one before it.
    assert re.search("begins at step 60[01]", alone(tmp_path / "second", logdir, "--steps=700"))


def assert_ended_well(printed: str) -> None:
    assert "Traceback" not in printed, printed
    assert printed.count("kill -9") == 3
    assert re.search(r"^  test accuracy +9\d", printed, re.MULTILINE)
    assert "grpc" not in printed.lower()


@pytest.mark.timeout(500)
def test_the_demo_loses_a_worker_the_chief_and_the_server_and_ends_well(tmp_path):
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo_replicas.py"), f"--logdir={tmp_path / 'run'}", "--steps=2000"],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=480,
    )
    assert ended.returncode == 0, ended.stdout
    assert_ended_well(ended.stdout)


@pytest.mark.timeout(500)
def test_the_demo_in_step_does_too(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import demo_replicas

    class Task(demo_replicas.Task):
        def start(self) -> None:
            starts = len(list(tmp_path.glob(f"{self.name}-*")))
            self.process: Any = Forked(self._command[1:], tmp_path / f"{self.name}-{starts}")

        def kill(self) -> None:
            self.process.kill()
            with self.process.output.open() as printed:
                self._show(SimpleNamespace(stdout=printed))

    monkeypatch.setattr(demo_replicas, "Task", Task)
    monkeypatch.setattr(sys, "argv", ["demo_replicas.py", f"--logdir={tmp_path / 'run'}", "--steps=600", "--sync"])
    demo_replicas.main()

    assert_ended_well(capsys.readouterr().out)
