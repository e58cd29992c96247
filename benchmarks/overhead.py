"""What ``Saving(overhead=0.01)`` costs a PyTorch program, and what a SIGKILL then loses.

Processes with and without checkpoints train in turns, on steps of fixed work. Each that saves is killed at the end, and
its newest checkpoint says how many seconds of work are lost. The ledger says what a kill at any other moment would have
lost. On a machine whose speed changes from minute to minute, a process that saves is also compared with its own steps
between two checkpoints::

    python benchmarks/overhead.py --megabytes=200 --secs=36 --rounds=3

Aims: a kill loses less than 5 s; the steps per second are 0.985 of those of a process without checkpoints. The aims
mean something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from common import median, print_machine, print_table, quantile, write_result

# A weight and its two moments.
TENSORS = 3
STEPS_FILE = "steps.bin"
SAID_FILE = "output"
AIM_LOSS_SECS = 5.0
AIM_THROUGHPUT = 0.985


@dataclass
class Round:
    """What one process has done: steps per second, and of one that saves, what its checkpoints were."""

    steps_per_sec: float
    # Steps per second, of those between two checkpoints.
    own: float = float("nan")
    checkpoints: int = 0
    interval_secs: float = float("nan")
    cost: float = float("nan")
    stall_secs: float = float("nan")
    write_secs: float = float("nan")
    lost_secs: float = float("nan")
    losses: tuple[float, ...] = ()


# --- the process that trains ---


def train(folder: Path, options: argparse.Namespace) -> None:
    """Train until this process is killed; leave the time at which each step has ended in a file."""
    import torch

    from stepguard import Saving
    from stepguard.torch import Supervisor

    torch.set_num_threads(options.threads)
    size = options.megabytes * 1_000_000 // 4 // TENSORS // 8
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(size)) for _ in range(8)])
    optimizer = torch.optim.Adam(model.parameters())
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    saving = Saving(save_model_secs=0)
    if options.saves:
        saving = Saving(
            save_model_secs=0, overhead=options.overhead, min_interval_secs=options.min_secs, max_bytes_per_day=None
        )
    sv = Supervisor({"model": model, "optimizer": optimizer}, folder, saving=saving, save_summaries_secs=0)
    with sv.managed_session() as session, open(folder / STEPS_FILE, "wb", buffering=0) as ends:
        for step in session.steps():
            if step < 2:
                for parameter in model:
                    parameter.grad = torch.ones_like(parameter)
                optimizer.step()
                optimizer.zero_grad()
            for _ in range(options.products):
                torch.mm(left, right)
            ends.write(time.time_ns().to_bytes(8, "little"))


def products_of(step_secs: float, threads: int) -> int:
    """How many products of matrices take about ``step_secs``."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    spent = []
    for _ in range(200):
        began = time.perf_counter()
        for _ in range(10):
            torch.mm(left, right)
        spent.append((time.perf_counter() - began) / 10)
    return max(1, round(step_secs / min(spent)))


# --- the process that measures ---


def measured(options: argparse.Namespace, products: int, *, saves: bool, seed: int) -> Round:
    """Have a process train, kill it, and look at what it has left."""
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        command = [sys.executable, __file__, "--child", name, "--products", str(products)]
        command += ["--megabytes", str(options.megabytes), "--overhead", str(options.overhead)]
        command += ["--min-secs", str(options.min_secs), "--threads", str(options.threads)]
        with open(folder / SAID_FILE, "wb") as said:
            child = subprocess.Popen([*command, *(["--saves"] if saves else [])], stdout=said, stderr=said)
            try:
                # The moment of the kill has nothing to do with that of a checkpoint.
                wait_for_steps(folder, child, options.settle_secs + options.secs + random.Random(seed).uniform(0, 3))
            finally:
                child.send_signal(signal.SIGKILL)
                child.wait()
        content = (folder / STEPS_FILE).read_bytes()
        ends = [int.from_bytes(content[at : at + 8], "little") / 1e9 for at in range(0, len(content) // 8 * 8, 8)]
        lines = (folder / "run.jsonl").read_text().splitlines() if saves else []
        beat = json.loads((folder / "heartbeats" / "chief.json").read_text()) if saves else {}
    return evaluated(ends, [json.loads(one) for one in lines if one.endswith("}")], beat, options.settle_secs)


def wait_for_steps(folder: Path, child: subprocess.Popen[bytes], secs: float) -> None:
    """Wait until the process has trained for ``secs``."""
    path, began = folder / STEPS_FILE, None
    while began is None or time.monotonic() - began < secs:
        if child.poll() is not None:
            said = (folder / SAID_FILE).read_text()[-4000:]
            sys.exit(f"the process that trains has ended with {child.returncode}\n{said}")
        if began is None and path.exists() and path.stat().st_size:
            began = time.monotonic()
        time.sleep(0.05)


def evaluated(ends: list[float], events: list[dict], beat: dict, settle_secs: float) -> Round:
    """What a process has done after its first ``settle_secs``, by the ends of its steps and its ledger."""
    begin = ends[0] + settle_secs
    counted = [end for end in ends if end >= begin]
    rate = (len(counted) - 1) / (counted[-1] - counted[0])
    saved = [one for one in events if one["event"] == "checkpoint"]
    later = [one for one in saved if one["time"] >= begin]
    if not saved:
        return Round(rate)
    # Just before a commit, the work since the state of the checkpoint before is lost; in between, less.
    losses = []
    for end in counted:
        steps = [one["step"] for one in saved if one["time"] <= end]
        if steps:
            losses.append(end - ends[steps[-1] - 1])
    # A write may begin before the stall is over, and slow down the step that is under way at its end.
    writes = [(one["time"] - one["secs"] - one["stall_secs"] - 0.01, one["time"] + 0.01) for one in saved]
    quiet = [
        end - begun
        for begun, end in itertools.pairwise(counted)
        if not any(begun <= until and end >= since for since, until in writes)
    ]
    cadence = beat.get("cadence") or {}
    gaps = [after["time"] - before["time"] for before, after in itertools.pairwise(later)]
    return Round(
        steps_per_sec=rate,
        own=rate * mean(quiet) if quiet else float("nan"),
        checkpoints=len(later),
        interval_secs=median(gaps),
        cost=cadence.get("cost", float("nan")),
        stall_secs=median([one["stall_secs"] for one in later]),
        write_secs=median([one["secs"] for one in later]),
        lost_secs=ends[-1] - ends[saved[-1]["step"] - 1],
        losses=tuple(losses),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="the size of the state")
    parser.add_argument("--secs", type=float, default=36.0, help="how long each process trains and is measured")
    parser.add_argument("--settle-secs", type=float, default=10.0, help="how long it trains before that")
    parser.add_argument("--rounds", type=int, default=3, help="how many pairs of processes")
    parser.add_argument("--step-secs", type=float, default=0.02, help="about how long a step takes")
    parser.add_argument("--overhead", type=float, default=0.01, help="the part of the time that checkpoints may cost")
    parser.add_argument("--min-secs", type=float, default=2.0, help="the shortest interval")
    parser.add_argument("--threads", type=int, default=1, help="threads of a step; one leaves the writer a core")
    parser.add_argument("--dir", help="where the logdirs are; by default where temporary files are")
    parser.add_argument("--out", help="a file for the figures, as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--saves", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--products", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train(Path(options.child), options)
        return
    print_machine()
    products = products_of(options.step_secs, options.threads)
    rounds: dict[bool, list[Round]] = {False: [], True: []}
    for number in range(options.rounds):
        # Each goes first in every other round.
        for saves in (False, True) if number % 2 == 0 else (True, False):
            rounds[saves].append(measured(options, products, saves=saves, seed=number))
    report(rounds[False], rounds[True], options)


def report(without: list[Round], with_: list[Round], options: argparse.Namespace) -> None:
    """Print the figures, and leave them in a file."""
    ratios = [one.steps_per_sec / other.steps_per_sec for one, other in zip(with_, without, strict=True)]
    own = [one.own for one in with_ if not math.isnan(one.own)]
    losses = [loss for one in with_ for loss in one.losses]
    figures = {
        "steps_per_sec_without": median([one.steps_per_sec for one in without]),
        "steps_per_sec": median([one.steps_per_sec for one in with_]),
        "throughput": median(ratios),
        "throughput_lowest": min(ratios),
        "throughput_highest": max(ratios),
        "throughput_of_own": [one.own for one in with_],
        "throughput_of_own_median": median(own),
        "checkpoints": sum(one.checkpoints for one in with_),
        "interval_secs": median([one.interval_secs for one in with_ if one.checkpoints > 1]),
        "cost_reported": median([one.cost for one in with_]),
        "stall_secs": median([one.stall_secs for one in with_]),
        "write_secs": median([one.write_secs for one in with_]),
        "lost_secs": [one.lost_secs for one in with_],
        "lost_secs_median": median([one.lost_secs for one in with_]),
        "lost_at_any_moment_median": median(losses),
        "lost_at_any_moment_95": quantile(losses, 0.95) if losses else float("nan"),
        "lost_at_any_moment_longest": max(losses, default=float("nan")),
    }
    if options.out:
        write_result(options.out, figures)
    print(f"{options.megabytes} MB, overhead={options.overhead:g}; medians of {options.rounds} rounds\n")
    print_table(
        ["", "steps/s", "checkpoints", "interval s", "stall ms", "write ms", "cost by status %"],
        [
            ["without", figures["steps_per_sec_without"], 0, *["-"] * 4],
            [
                "with overhead",
                figures["steps_per_sec"],
                figures["checkpoints"],
                figures["interval_secs"],
                1e3 * figures["stall_secs"],
                1e3 * figures["write_secs"],
                1e2 * figures["cost_reported"],
            ],
        ],
    )
    print_table(
        ["", "median", "lowest", "highest", "aim"],
        [
            ["steps/s, of those without", median(ratios), min(ratios), max(ratios), f">= {AIM_THROUGHPUT}"],
            [
                "steps/s, of those between its checkpoints",
                figures["throughput_of_own_median"],
                min(own, default=float("nan")),
                max(own, default=float("nan")),
                f">= {AIM_THROUGHPUT}",
            ],
            [
                "work lost by the kill at the end, s",
                figures["lost_secs_median"],
                min(figures["lost_secs"]),
                max(figures["lost_secs"]),
                f"< {AIM_LOSS_SECS:g}",
            ],
            [
                "work that a kill at any moment loses, s",
                figures["lost_at_any_moment_median"],
                min(losses, default=float("nan")),
                figures["lost_at_any_moment_longest"],
                f"< {AIM_LOSS_SECS:g}",
            ],
        ],
    )


if __name__ == "__main__":
    main()
