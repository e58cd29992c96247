"""Replicas on one machine: how soon a worker follows its chief, how soon a task is back, and what supervision costs.

    python benchmarks/replicas.py [--secs 5] [--repeat 3]

A worker of TensorFlow's class that finds no chief looks again after ``recovery_wait_secs``, 30 by default.
Everything runs in real processes on loopback. Times are medians of ``--repeat`` runs; TensorFlow's class runs in turn
with ours, with the same program.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "replicas"))

from cluster import Cluster


def worker_after_chief(kind: str, place: Path, waited_secs: float, options: dict[str, Any]) -> float:
    """Seconds from the chief's session to the first step of a worker that has waited for it for a while."""
    cluster = Cluster(place, workers=2)
    try:
        cluster.serve()
        worker = cluster.train(1, kind=kind, narrow=True, supervisor=options)
        worker.wait_for("asked")
        time.sleep(waited_secs)
        ready = cluster.train(0, kind=kind, narrow=True, supervisor=options).wait_for("session")["time"]
        return worker.wait_for("step", after=ready)["time"] - ready
    finally:
        cluster.close()


def back_after_kill(kind: str, index: int, place: Path, options: dict[str, Any]) -> float:
    """Seconds from the session request of a task that was killed and started again to its first step."""
    cluster = Cluster(place, workers=2)
    try:
        cluster.serve()
        for task in range(2):
            # Without device filters TensorFlow's would wait for whatever server is not there at that moment.
            cluster.train(task, kind=kind, narrow=True, supervisor=options)
        for task in cluster.workers:
            task.wait_for_step(20)
        killed = cluster.workers[index]
        killed.kill()
        killed.restart()
        asked = killed.wait_for("asked")["time"]
        return killed.wait_for("step")["time"] - asked
    finally:
        cluster.close()


def steps_per_second(kind: str, secs: float, place: Path) -> float:
    """Steps per second of two workers together; ``kind`` ``bare`` is a loop without any supervisor."""
    cluster = Cluster(place, workers=2)
    try:
        cluster.serve()
        options = {"secs": secs, "kind": kind, "supervisor": {"save_model_secs": 600}}
        for index in range(2):
            cluster.train(index, "measure", **options)
        return sum(task.wait_for("rate", timeout_secs=60 + 2 * secs)["rate"] for task in cluster.workers)
    finally:
        cluster.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--secs", type=float, default=5.0, help="length of one measurement of speed")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--waited-secs", type=float, default=3.0, help="how long a worker has waited for its chief")
    parser.add_argument("--recovery-wait-secs", type=float, default=30.0, help="of the supervisors; 30 by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        number = 0

        def place() -> Path:
            nonlocal number
            number += 1
            return Path(root) / str(number)

        options = {"recovery_wait_secs": given.recovery_wait_secs}
        for kind in ("stepguard", "tensorflow"):
            found = [worker_after_chief(kind, place(), given.waited_secs, options) for _ in range(given.repeat)]
            print(f"{kind:10s} worker after chief's session   {statistics.median(found):6.2f} s", flush=True)
            for index, role in enumerate(["chief", "worker"]):
                found = [back_after_kill(kind, index, place(), options) for _ in range(given.repeat)]
                print(f"{kind:10s} {role:6s} request to first step    {statistics.median(found):6.2f} s", flush=True)
        rates: dict[str, list[float]] = {"bare": [], "stepguard": [], "tensorflow": []}
        for _ in range(given.repeat):
            for kind, measured in rates.items():
                measured.append(steps_per_second(kind, given.secs, place()))
        bare = statistics.median(rates["bare"])
        for kind, measured in rates.items():
            rate = statistics.median(measured)
            spread = f"{min(measured):.0f} to {max(measured):.0f}"
            print(f"{kind:10s} two workers {rate:8.0f} steps/s ({spread})   {rate / bare:.3f} of bare", flush=True)


if __name__ == "__main__":
    main()
