"""The examples run, and go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "jax"


def run(name, logdir, steps):
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), f"--logdir={logdir}", f"--steps={steps}"]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("name", ["digits_equinox.py"])
def test_an_example_goes_on_where_it_was(tmp_path, name):
    assert "starting from scratch" in run(name, tmp_path, 100)
    printed = run(name, tmp_path, 200)

    assert "resumed at step 100" in printed
    assert float(printed.split("test accuracy ")[1].split("%")[0]) > 90
