"""Microseconds that the trace adds to a step of a PyTorch program: by default, and with digests of each batch.

The programs run in one process, each with a session of its own, in turns of some dozen steps, so that whatever else the
machine does meets all of them alike. A step does nothing but report a loss, to a writer that drops it: what is left is
the time of the supervisor. In every turn the median of the steps without a trace is taken off that of the others; the
medians of these differences over all turns are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from common import median, print_machine, print_table, run_child, write_result

# For each program: the trace, and whether a step reports a number.
PROGRAMS = {
    "silent": (None, False),
    "silent, traced": ("numbers", False),
    "reports": (None, True),
    "reports, traced": ("numbers", True),
    "reports, with digests": ("batches", True),
}
BEFORE = {
    "silent, traced": "silent",
    "reports, traced": "reports",
    "reports, with digests": "reports",
}


class Nowhere:
    """A summary writer that drops everything."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@contextlib.contextmanager
def opened(trace: str | None, batch_bytes: int) -> Iterator[tuple[Any, Iterator[Any]]]:
    """A session, and the iterator over its steps."""
    import torch

    from stepguard import Watching
    from stepguard.torch import Supervisor

    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.randint(256, (batch_bytes,), dtype=torch.uint8) for _ in range(4)]
    with tempfile.TemporaryDirectory() as logdir:
        state = {"model": model, "optimizer": optimizer}
        watching = Watching(trace=trace, save_summaries_secs=None)
        supervisor = Supervisor(state, logdir, summary_writer=Nowhere(), watching=watching)
        with supervisor.managed_session() as session:
            yield session, session.steps(batches)


def timed_turn(session: Any, steps: Iterator[Any], count: int, *, reports: bool) -> float:
    """Seconds for one step: the median of ``count``, which no other process can spoil."""
    clock, values = time.perf_counter, {"loss": 0.25}
    marks = [clock()]
    for _ in itertools.islice(steps, count):
        if reports:
            session.summary(values)
        marks.append(clock())
    return median([end - start for start, end in itertools.pairwise(marks[1:])])


def measure(batch_bytes: int, turns: int, steps: int) -> dict[str, Any]:
    """For every program the microseconds of a step, and those added to the same one without a trace, of each turn."""
    result: dict[str, Any] = {name: {"step": [], "added": []} for name in PROGRAMS}
    with contextlib.ExitStack() as stack:
        sessions = {name: stack.enter_context(opened(trace, batch_bytes)) for name, (trace, _) in PROGRAMS.items()}
        for turn in range(-2, turns):  # Two to warm up.
            took = {}
            for name in list(PROGRAMS)[:: 1 if turn % 2 else -1]:
                session, iterator = sessions[name]
                took[name] = 1e6 * timed_turn(session, iterator, steps, reports=PROGRAMS[name][1])
            if turn >= 0:
                for name, secs in took.items():
                    result[name]["step"].append(secs)
                    result[name]["added"].append(secs - took[BEFORE.get(name, name)])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each size")
    parser.add_argument("--turns", type=int, default=100, help="turns of each program in a process")
    parser.add_argument("--steps", type=int, default=60, help="steps of a turn")
    parser.add_argument(
        "--batch-bytes", type=int, action="append", help="the size of a batch; by default 1 kB and 1 MB"
    )
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        write_result(options.out, measure(options.batch_bytes[0], options.turns, options.steps))
        return
    print_machine()
    rows = []
    for size in options.batch_bytes or (1_000, 1_000_000):
        arguments = ["--batch-bytes", size, "--turns", options.turns, "--steps", options.steps]
        rounds = [run_child(__file__, arguments) for _ in range(options.rounds)]
        for name in PROGRAMS:
            step, added = ([one for part in rounds for one in part[name][what]] for what in ("step", "added"))
            rows.append([f"{size / 1000:,.0f} kB", name, median(step), median(added) if name in BEFORE else "-"])
    print("Microseconds: a step, and what the trace adds to it. Reach: without digests <= 1\n")
    print_table(["batch", "program", "step", "+ trace"], rows)


if __name__ == "__main__":
    main()
