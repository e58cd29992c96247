"""Runs side by side: each lane is a process of its own, so that each knows its own program's processes and no others.

A lane gets its work as a pickle and gives the run back. The main process waits for the lanes in the order of the work.
If it ends, also by Ctrl-C, it ends the lanes, and a lane that ends kills its program first; if the main process is
killed, Linux ends the programs.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from stepguard.cli.proving.faults import Fault
from stepguard.cli.proving.program import Program
from stepguard.cli.proving.runs import Run, run
from stepguard.cli.proving.scratch import Place
from stepguard.disk import files

_PROGRESS = "progress"
_LOOK_SECS = 0.3

Tell = Callable[[int, "int | None"], object]


@dataclass(frozen=True, slots=True)
class Work:
    """One run: the program, its place, and the faults."""

    program: Program
    place: Place
    faults: tuple[Fault, ...] = ()

    def __call__(self, tell: Tell) -> Run:
        """Do it here; see :func:`stepguard.cli.proving.runs.run`."""
        return run(self.program, self.place, self.faults, tell=tell)


Lane = Callable[[Work, Tell], Callable[[], Run]]
"""Begins some work, and returns the function that waits for its end and gives the run, or raises its error."""


@contextmanager
def open_lanes(count: int) -> Iterator[Lane]:
    """``count`` lanes. With one, the work is done in this process, when its end is asked for."""
    if count == 1:
        yield lambda work, tell: lambda: work(tell)
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin)
    try:
        yield lambda work, tell: functools.partial(_await, pool.submit(_do, work), work.place, tell)
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Have SIGTERM, which ends a lane, and Ctrl-C raise, so that its program is killed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _await(future: Future[Run], place: Place, tell: Tell) -> Run:
    while True:
        try:
            return future.result(_LOOK_SECS)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise  # It was the work that raised it.
            start, _, step = _progress(place).partition(" ")
            tell(int(start or 0), int(step) if step.isdigit() else None)


def _progress(place: Place) -> str:
    with contextlib.suppress(OSError):
        return (place.root / _PROGRESS).read_text()
    return ""


def _do(work: Work) -> Run:
    told = 0.0

    def tell(start: int, step: int | None) -> None:
        nonlocal told
        if time.monotonic() - told > _LOOK_SECS:
            told = time.monotonic()
            files.write_volatile(work.place.root / _PROGRESS, f"{start} {step}".encode())

    try:
        return work(tell)
    finally:
        with contextlib.suppress(OSError):
            work.program.kill()
