"""The examples for PyTorch, run as a user runs them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepguard.store import CheckpointStore

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"


# TensorBoard's package loads TensorFlow where there is one: several seconds for each process, for nothing.
WITHOUT_TENSORFLOW = {**os.environ, "OMP_NUM_THREADS": "1"}

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module", autouse=True)
def _without_tensorflow(tmp_path_factory):
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "tensorflow.py").write_text("raise ImportError('hidden by a test')")
    WITHOUT_TENSORFLOW["PYTHONPATH"] = os.pathsep.join([str(hidden), *filter(None, [os.environ.get("PYTHONPATH")])])


def run(program: Path, *arguments: str, launcher: tuple[str, ...] = ("-W", "error")) -> str:
    ended = subprocess.run(
        [sys.executable, *launcher, str(program), *arguments],
        check=False,
        env=WITHOUT_TENSORFLOW,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def run_and_kill(program: Path, logdir: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> int:
    """SIGKILL the program, or one of those that it has launched, between two checkpoints; return the newest step."""
    command = [sys.executable, *launcher, str(program), f"--logdir={logdir}", "--save-model-secs=0.1", *arguments]
    process = subprocess.Popen(
        command, env=WITHOUT_TENSORFLOW, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 150
    while not (step := newest_step(logdir)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    training = psutil.Process(process.pid).children()[-1] if launcher else psutil.Process(process.pid)
    training.kill()
    process.communicate(timeout=150)
    assert process.returncode == (1 if launcher else -signal.SIGKILL)
    return step


def newest_step(logdir: Path) -> int:
    return max((one.step or 0 for one in CheckpointStore(logdir).candidates()), default=0)


def accuracy(printed: str) -> float:
    return float(re.findall(r"test accuracy ([\d.]+)%", printed)[-1]) / 100


def test_digits_trains_and_resumes(tmp_path):
    program = EXAMPLES / "torch" / "digits.py"
    first = run(program, f"--logdir={tmp_path}", "--steps=300")
    assert "starting from scratch" in first
    second = run(program, f"--logdir={tmp_path}", "--steps=600")
    assert f"resumed at step 300 from {tmp_path}/model.ckpt-300" in second
    assert accuracy(second) > 0.9
    curves = EventAccumulator(str(tmp_path))
    curves.Reload()
    assert {"loss", "test_accuracy"} <= set(curves.Tags()["scalars"])


def test_digits_trains_and_resumes_in_two_processes_one_of_which_is_killed(tmp_path):
    program = EXAMPLES / "torch" / "digits_ddp.py"
    logdir = tmp_path / "run"
    step = run_and_kill(program, logdir, "--steps=100000", launcher=TORCHRUN)
    steps = newest_step(logdir) + 400
    printed = run(program, f"--logdir={logdir}", f"--steps={steps}", launcher=TORCHRUN)
    (resumed,) = re.findall(r"resumed at step (\d+) from", printed)
    assert int(resumed) >= step
    assert newest_step(logdir) == steps
    assert accuracy(printed) > 0.9


def test_the_language_model_writes_the_same_after_a_kill(tmp_path):
    program = EXAMPLES / "torch" / "characters.py"
    short = ("--steps=60", "--characters=80")
    whole = run(program, f"--logdir={tmp_path / 'whole'}", *short)
    step = run_and_kill(program, tmp_path / "killed", *short)
    resumed = run(program, f"--logdir={tmp_path / 'killed'}", *short)

    assert int(re.search(r"resumed at step (\d+) from", resumed)[1]) >= step
    end = whole[whole.index("held-out loss") :]
    assert "The Congress shall have power" in end
    assert resumed.endswith(end)
    # Sixty steps learn something, though no English.
    assert float(re.search(r"held-out loss ([\d.]+)", end)[1]) < 3


def test_the_demo_takes_this_engine(tmp_path):
    logdir = tmp_path / "demo"
    printed = run(EXAMPLES / "demo.py", "--engine=torch", f"--logdir={logdir}")
    restored = int(re.search(r"restored +step (\d+) of", printed)[1])
    assert restored > 0
    assert "killed with SIGKILL" in printed
    assert accuracy(printed) > 0.95
    assert re.search(r"^  proof .*: bit for bit the same \(batches, random states, ", printed, re.MULTILINE)
    assert printed.endswith("is the one that was not, bit for bit.\n")


def test_the_program_in_the_manual_runs_as_it_stands(tmp_path):
    manual = (ROOT / "docs" / "torch.md").read_text()
    program = re.search(r"```python\n(.*?)```", manual, re.DOTALL)[1]
    (tmp_path / "first.py").write_text(program)
    for expected in ("at step 0", "at step 2000"):
        ended = subprocess.run(
            [sys.executable, "first.py"],
            cwd=tmp_path,
            env=WITHOUT_TENSORFLOW,
            capture_output=True,
            text=True,
            timeout=250,
            check=True,
        )
        assert expected in ended.stdout
    assert (tmp_path / "runs" / "first" / "model.ckpt-2000" / "model.pt").exists()


def test_what_accelerate_prepares_resumes_in_two_processes(tmp_path):
    program = EXAMPLES / "torch" / "digits_accelerate.py"

    def end(logdir, epochs):
        output = "".join(train(tmp_path / logdir, 2, f"--epochs={epochs}", program=program))
        return [line for line in output.splitlines() if "sum of the weights" in line]

    end("parts", 1)
    resumed, whole = end("parts", 2), end("whole", 2)
    assert len(resumed) == 1
    assert resumed == whole


def test_the_reported_run_has_crashes_and_damage_and_its_page_tells_them(tmp_path):
    pytest.importorskip("plotly")
    page = tmp_path / "report.html"
    run(EXAMPLES / "torch" / "reported.py", f"--logdir={tmp_path / 'run'}", f"--output={page}", launcher=())
    told = page.read_text()
    assert told.count(">ended without a word</span>") == 2
    # A run that was killed soon after it had done its steps again may not have said so yet.
    assert re.search(r"the runs before them: [12] same\.", told)
    assert "1 damaged checkpoint in quarantine/" in told
    assert "before-the-crash" in told
