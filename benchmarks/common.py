"""What the benchmarks share: children in fresh processes, tables, and a description of the machine."""

from __future__ import annotations

import datetime as dt
import json
import math
import multiprocessing
import os
import platform
import runpy
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

NAMES = {
    "bare": "bare Session",
    "tf": "TensorFlow's Supervisor",
    "mts": "MonitoredTrainingSession",
    "ours": "stepguard",
}


def run_child(script: str, arguments: Sequence[object], *, timeout_secs: float = 900.0) -> dict[str, Any]:
    """Run ``script ARGUMENTS --out FILE`` in a fresh process, and return the JSON object that it left there.

    The process is forked from one that has imported TensorFlow, and made neither a session nor a thread with it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorflow", "stepguard.tensorflow"])
    with tempfile.TemporaryDirectory() as directory:
        out, said = Path(directory, "result.json"), Path(directory, "output")
        command = [script, *map(str, arguments), "--out", str(out)]
        child = context.Process(target=_run_script, args=(command, str(said)))
        child.start()
        child.join(timeout_secs)
        if child.exitcode != 0 or not out.exists():
            ended = "was still running" if child.is_alive() else f"ended with {child.exitcode}"
            child.kill()
            sys.exit(f"{' '.join(command)}: {ended}\n{said.read_text()[-4000:] if said.exists() else ''}")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def _run_script(command: list[str], output: str) -> None:
    """In the child: run the script as Python would, with what it says in the file ``output``."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def write_result(path: str, result: dict[str, Any]) -> None:
    """Leave a child's result for its parent."""
    Path(path).write_text(json.dumps(result))


def disable_eager_execution() -> None:
    """The timers of TensorFlow's Supervisor fail where threads start in eager mode; ours would not need this."""
    import tensorflow as tf

    tf.compat.v1.disable_eager_execution()


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, aligned so that it is readable as it is."""
    cells = [list(header), *[[_shown(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)


def print_machine() -> None:
    """When and where this was measured, and what else was going on there."""
    versions = []
    for package in ("stepguard", "tensorflow-cpu", "tensorflow", "numpy"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(
        f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d %H:%M} UTC; {_processor()}, {os.cpu_count()} cores, "
        f"{platform.system()} {platform.release()}; Python {platform.python_version()}, {', '.join(versions)}; "
        f"load average at the start {load}\n",
        flush=True,
    )


def median(values: Sequence[float]) -> float:
    """The median; not a number for none."""
    return statistics.median(values) if values else float("nan")


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def _shown(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    if math.isnan(cell):
        return "-"
    return f"{cell:.1f}" if abs(cell) >= 100 else f"{cell:.2f}" if abs(cell) >= 1 else f"{cell:.3f}"
