"""What the steps of a PyTorch program feel of its checkpoints: the longest step, and the usual step during a write.

The step uses all cores. The state is a model with the moments of Adam, which exist only after the first step::

    python benchmarks/torch_stalls.py --megabytes=200 --seconds=20

Aims: the longest step takes no longer than a normal step and 1.5 copies of the state; the median step during a write
takes 1.25 of the normal one. The aims mean something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import print_table

from stepguard.torch import Supervisor

# A weight and its two moments.
TENSORS = 3
# Checkpoints are this many writes apart, so that there are steps without one.
EVERY_SECS = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="the size of the state")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long the program trains")
    parser.add_argument("--step-secs", type=float, default=0.02, help="about how long a step takes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends = train(Path(folder), arguments.megabytes, arguments.seconds, arguments.step_secs)
        checkpoints = written(Path(folder))
    report(ends, checkpoints)


def train(folder: Path, megabytes: int, seconds: float, step_secs: float) -> list[tuple[float, float]]:
    """Train; return the beginning (Unix time) and the length of each step, in seconds."""
    size = megabytes * 1_000_000 // 4 // TENSORS // 8
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(size)) for _ in range(8)])
    optimizer = torch.optim.Adam(model.parameters())
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    steps = []
    sv = Supervisor({"model": model, "optimizer": optimizer}, folder, save_model_secs=EVERY_SECS, save_summaries_secs=0)
    end = None
    with sv.managed_session() as session:
        began, clock = time.time(), time.perf_counter()
        for step in session.steps():
            if step < 2:
                for parameter in model:
                    parameter.grad = torch.ones_like(parameter)
                optimizer.step()
                optimizer.zero_grad()
            until = time.perf_counter() + step_secs
            while time.perf_counter() < until:
                torch.mm(left, right)
            steps.append((began, time.perf_counter() - clock))
            began, clock = time.time(), time.perf_counter()
            # The first two make the state of the optimizer, and load what is needed.
            if step == 1:
                end = began + seconds
            elif end is not None and began > end:
                break
    return steps[2:]


def written(folder: Path) -> list[tuple[float, float, float]]:
    """Of each checkpoint: when its write began and ended (Unix time), and how long training waited, in seconds."""
    events = map(json.loads, (folder / "run.jsonl").read_text().splitlines())
    found = [one for one in events if one["event"] == "checkpoint" and one["step"] > 2]
    return [(one["time"] - one["secs"], one["time"], one["stall_secs"]) for one in found]


def report(steps: list[tuple[float, float]], checkpoints: list[tuple[float, float, float]]) -> None:
    """Print the figures."""
    during = [secs for began, secs in steps if any(one[0] <= began and began + secs <= one[1] for one in checkpoints)]
    beside = [
        secs for began, secs in steps if not any(one[0] <= began + secs and began <= one[1] for one in checkpoints)
    ]
    normal = statistics.median(beside or [secs for _, secs in steps])
    copies = [one[2] for one in checkpoints] or [0.0]
    longest, copy = max(secs for _, secs in steps), statistics.median(copies[1:] or copies)
    while_writing = statistics.median(during or [normal])
    print_table(
        [
            "checkpoints",
            "normal step",
            "first copy",
            "later copies",
            "longest step",
            "of its aim",
            "step during a write",
        ],
        [
            [
                len(checkpoints),
                f"{normal * 1e3:.1f} ms",
                f"{copies[0] * 1e3:.1f} ms",
                f"{copy * 1e3:.1f} ms",
                f"{longest * 1e3:.1f} ms",
                f"{longest / (normal + 1.5 * copy):.2f}",
                f"{while_writing / normal:.2f} of the normal one",
            ]
        ],
    )


if __name__ == "__main__":
    main()
