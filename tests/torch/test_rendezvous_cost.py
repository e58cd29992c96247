"""The benchmark of many processes, with two of them: what it counts is what the documentation promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "rendezvous.py"


def test_two_processes_ask_nothing_while_idle_and_little_for_a_checkpoint():
    # Now and then two say a word at the same moment, of which one says it again: in few saves, and not in the median.
    options = ["--processes", "2", "--saves", "5", "--idle-secs", "0.5", "--step-secs", "0.02", "--hosts", "1"]
    command = [sys.executable, str(BENCHMARK), *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr
    names, _, values = (line.strip("| ").split(" | ") for line in ran.stdout.splitlines())
    found = dict(zip(names, map(float, values), strict=True))

    assert found["idle requests a minute"] == 0
    assert found["requests"] <= (12 * 2 + 4) / 2
    # Of the words that are said to all, however many there are, and one answer of 71 bytes.
    assert found["bytes at the chief"] < 200
