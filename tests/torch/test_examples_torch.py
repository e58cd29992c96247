"""The examples for PyTorch, run as a user runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"


def run(program: Path, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(program), *arguments],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


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


def test_the_demo_takes_this_engine(tmp_path):
    logdir = tmp_path / "demo"
    printed = run(EXAMPLES / "demo.py", "--engine=torch", f"--logdir={logdir}", "--batch-size=512")
    restored = int(re.search(r"restored +step (\d+) of", printed)[1])
    assert restored > 0
    assert "killed with SIGKILL" in printed
    assert accuracy(printed) > 0.95


def test_the_program_in_the_manual_runs_as_it_stands(tmp_path):
    manual = (ROOT / "docs" / "torch.md").read_text()
    program = re.search(r"```python\n(.*?)```", manual, re.DOTALL)[1]
    (tmp_path / "first.py").write_text(program)
    for expected in ("at step 0", "at step 2000"):
        ended = subprocess.run(
            [sys.executable, "first.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True
        )
        assert expected in ended.stdout
    assert (tmp_path / "runs" / "first" / "model.ckpt-2000" / "model.pt").exists()
