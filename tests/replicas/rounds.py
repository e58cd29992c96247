"""Rounds of misfortune for a training cluster, and what each of them cost; for one Supervisor class or the other.

    python tests/replicas/rounds.py --rounds 50 --class stepguard tensorflow

In each round a task is killed with SIGKILL and started again, or frozen with SIGSTOP for longer than its peers put up
with, at a random moment of training. A round is over when every worker trains again, and failed when one does not.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster, Task

from stepguard.options import Watching

PEER_TIMEOUT_SECS = 2.0
FREEZE_SECS = 4.0


@dataclass(frozen=True, slots=True)
class Round:
    """What happened to ``victim``: ``back_secs`` until every worker trained again, ``None`` for never.

    ``lost_live`` is the number of steps that a model went back although it lived; ``behind_commit`` how far it came
    back behind the newest commit after it had died; ``lost_dead`` the steps that died with it.
    """

    victim: str
    back_secs: float | None
    lost_live: int = 0
    behind_commit: int = 0
    lost_dead: int = 0


class Misfortune:
    """One cluster of two parameter servers, a chief and two workers, and the rounds that it goes through."""

    def __init__(self, place: Path, kind: str, *, seed: int, back_within_secs: float) -> None:
        self._random = random.Random(seed)
        self._kind = kind
        self._back_within_secs = back_within_secs
        self._cluster = Cluster(place, ps=2, workers=3)
        self._options: dict[str, Any] = {"kind": kind, "step_secs": 0.02, "parts": 2}
        if kind == "tensorflow":
            # As quick as its own arguments make it.
            self._options["supervisor"] = {"recovery_wait_secs": 1}
        else:
            self._options["supervisor"] = {"watching": Watching(peer_timeout_secs=PEER_TIMEOUT_SECS)}
        for index in range(2):
            self._cluster.serve(index)
        for index in range(3):
            self._cluster.train(index, **self._options)
        assert self._all_train(time.time(), 120) is not None, "\n".join(t.story() for t in self._cluster.tasks)

    def close(self) -> None:
        self._cluster.close()

    def victims(self) -> list[tuple[str, list[Task], bool]]:
        """Name, tasks, and whether the model dies with them."""
        cluster = self._cluster
        chief, *workers = cluster.workers
        return [
            ("kill chief", [chief], False),
            ("kill worker 1", [workers[0]], False),
            ("kill worker 2", [workers[1]], False),
            ("kill ps 0", [cluster.ps[0]], True),
            ("kill ps 1", [cluster.ps[1]], True),
            ("kill all", cluster.tasks, True),
            ("freeze ps", [self._random.choice(cluster.ps)], False),
            ("freeze chief", [chief], False),
            ("freeze worker", [self._random.choice(workers)], False),
        ]

    def play(self, number: int) -> Round:
        victims = self.victims()
        name, tasks, model_dies = victims[number % len(victims)]
        time.sleep(self._random.uniform(0.0, 1.0))
        live, committed = self._live_step(), max(self._committed(), default=0)
        if name.startswith("freeze"):
            for task in tasks:
                task.freeze()
            time.sleep(FREEZE_SECS)
            began = time.time()
            for task in tasks:
                task.thaw()
        else:
            for task in tasks:
                task.kill()
            time.sleep(self._random.uniform(0.0, 1.0))
            began = time.time()
            for task in tasks:
                task.restart()
        back = self._all_train(began, self._back_within_secs)
        if back is None:
            self._start_over()
            return Round(name, None)
        if model_dies:
            lowest = min(step for task in self._cluster.workers for step in self._steps_of_new_session(task, began))
            return Round(name, back - began, behind_commit=max(0, committed - lowest), lost_dead=max(0, live - lowest))
        return Round(name, back - began, lost_live=max(self._went_back(task, began) for task in self._cluster.workers))

    def _committed(self) -> list[int]:
        if self._kind == "stepguard":
            return self._cluster.saved_steps()
        return [int(path.stem.split("-")[1]) for path in self._cluster.logdir.glob("model.ckpt-*.index")]

    def _live_step(self) -> int:
        # The last of each, not the highest of all: steps that died in an earlier round are no part of the model.
        return max(task.reports("step", since_start=False)[-1]["step"] for task in self._cluster.workers)

    @staticmethod
    def _steps_of_new_session(task: Task, moment: float) -> list[int]:
        """The steps since the first session after ``moment``; before it, one of the old model may be told of late."""
        lines = [line for line in task.reports(since_start=False) if line["time"] > moment]
        sessions = [place for place, line in enumerate(lines) if line["kind"] == "session"]
        return [line["step"] for line in lines[sessions[0] :] if line["kind"] == "step"] if sessions else []

    @staticmethod
    def _went_back(task: Task, moment: float) -> int:
        """By how much the steps that this one task has seen went back at ``moment``.

        Not compared with those of the others: a worker may be held up between a step and its report.
        """
        steps = [(line["time"] > moment, line["step"]) for line in task.reports("step", since_start=False)]
        before = [step for is_after, step in steps if not is_after]
        after = [step for is_after, step in steps if is_after]
        return max(0, before[-1] - min(after)) if before else 0

    def _all_train(self, since: float, within_secs: float) -> float | None:
        """When the last of the workers began to train, after ``since``; ``None`` if one did not in time."""
        deadline = time.monotonic() + within_secs
        while time.monotonic() < deadline:
            # A process that ended by itself is started again, as whoever runs a cluster would do.
            for task in self._cluster.workers:
                if not task.is_alive():
                    task.restart()
            firsts = [self._third_step(task, since) for task in self._cluster.workers]
            if None not in firsts:
                return max(first for first in firsts if first is not None)
            time.sleep(0.1)
        return None

    def _third_step(self, task: Task, since: float) -> float | None:
        # Not the first: a step may have been on its way when its server was killed.
        times = [line["time"] for line in task.reports("step", since_start=False) if line["time"] > since]
        return times[2] if len(times) > 2 else None

    def _start_over(self) -> None:
        for task in self._cluster.tasks:
            if task.is_alive():
                task.kill()
        for task in self._cluster.tasks:
            task.restart()
        assert self._all_train(time.time(), 120) is not None, "\n".join(t.story() for t in self._cluster.tasks)


def run(kind: str, rounds: int, *, place: Path, seed: int = 0, back_within_secs: float = 45.0) -> list[Round]:
    """Play ``rounds`` rounds, each victim in its turn."""
    misfortune = Misfortune(place, kind, seed=seed, back_within_secs=back_within_secs)
    try:
        played = []
        for number in range(rounds):
            played.append(misfortune.play(number))
            print(kind, number, json.dumps(asdict(played[-1])), flush=True)
        return played
    finally:
        misfortune.close()


def table(kind: str, played: list[Round]) -> list[str]:
    """The rows of a Markdown table, one for each kind of misfortune."""
    rows = []
    for victim in dict.fromkeys(one.victim for one in played):
        ours = [one for one in played if one.victim == victim]
        back = [one.back_secs for one in ours if one.back_secs is not None]
        median = f"{statistics.median(back):.1f} ({max(back):.1f})" if back else "-"
        rows.append(
            f"| {victim} | {kind} | {len(ours)} | {len(ours) - len(back)} | {median} "
            f"| {max(one.lost_live for one in ours)} | {max(one.behind_commit for one in ours)} "
            f"| {max(one.lost_dead for one in ours)} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--class", dest="kinds", nargs="+", default=["stepguard", "tensorflow"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--back-within-secs", type=float, default=45.0)
    given = parser.parse_args()
    rows = []
    for kind in given.kinds:
        with tempfile.TemporaryDirectory() as place:
            played = run(
                kind, given.rounds, place=Path(place), seed=given.seed, back_within_secs=given.back_within_secs
            )
            rows += table(kind, played)
    print("| what | class | rounds | not back | back, s: median (longest) | rolled back alive | behind commit | lost |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(sorted(rows)))


if __name__ == "__main__":
    main()
