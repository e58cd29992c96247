"""One run of the program: started, put through its faults, and resumed until it reaches the last step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepguard.cli.proving.faults import Done, Fault, inject
from stepguard.cli.proving.program import Live, Program, Running, reached
from stepguard.cli.proving.scratch import Place
from stepguard.watching import history, ledger, trial


class ProgramFailedError(Exception):
    """The program has ended by itself before the last step, with an error or without one."""

    def __init__(self, message: str, lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.lines = list(lines)


@dataclass(slots=True)
class Restart:
    """One restart: what came before it, the step that had been reached, and the step from which the run went on.

    ``step`` is ``None`` if the run began anew, without a checkpoint.
    """

    kind: str
    text: str
    reached: int
    step: int | None = None

    @property
    def again(self) -> int:
        """How many steps were done again."""
        return max(0, self.reached - (self.step or 0))


@dataclass(slots=True)
class Run:
    """How a run went. ``secs`` is the time of all its starts, ``step`` the last step that it has saved."""

    place: Place
    secs: float = 0.0
    step: int | None = None
    restarts: list[Restart] = field(default_factory=list)
    # The faults that could not be done, each with the reason.
    missed: list[str] = field(default_factory=list)
    # Why it did not come to its end, if it did not.
    problem: str | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def again(self) -> int:
        """How many steps were done again."""
        return sum(one.again for one in self.restarts)


def run(
    program: Program, place: Place, faults: Sequence[Fault] = (), *, tell: Callable[[int, int | None], object]
) -> Run:
    """Run ``program`` in ``place`` to its last step. ``tell(start, step)`` is called meanwhile, for a progress line.

    Raises:
        ProgramFailedError: it has ended by itself before the last step.
        OutOfTimeError: the time of the proof is over.
        OSError: it cannot be started.
    """
    done, pending = Run(place), list(faults)
    began, number = time.monotonic(), 0
    while True:
        number += 1
        running = program.start(place.environment)
        fault = pending.pop(0) if pending else None
        outcome, code = _ended(running, fault, Live(place.logdir), functools.partial(tell, number))
        _note_restored(done, place, running)
        stop = last_stop(place, running.began)
        has_ended = is_at_end(stop, code)
        if fault is not None and outcome.is_done and has_ended and not outcome.goes_on:
            # It has come to its end by itself before it felt the fault.
            outcome = Done(False, "the program had ended before")
        if fault is not None and not outcome.is_done:
            done.missed.append(f"{fault.kind}: {outcome.text}")
        if has_ended:
            done.missed += [f"{one.kind}: the program had ended before" for one in pending]
            break
        if fault is None or not outcome.is_done or outcome.goes_on:
            raise _failure(code, stop, running.lines())
        if outcome.is_other:
            done.missed.append(f"{fault.kind}: {outcome.text}")
        done.restarts.append(Restart(fault.kind, outcome.text, reached(place.logdir)))
    done.secs, done.step, done.lines = time.monotonic() - began, stop.get("step"), running.lines()
    return done


def _ended(running: Running, fault: Fault | None, live: Live, tell: Callable[[int | None], object]) -> tuple[Done, int]:
    """Put ``running`` through ``fault``, and wait for its end; what became of the fault, and the exit code."""

    def look() -> None:
        tell(live.step())

    look()
    outcome = Done(False) if fault is None else inject(fault, running, live)
    return outcome, running.wait(look)


def last_stop(place: Place, since: float) -> dict[str, Any]:
    """The last line of the chief in the ledger that says how a start has ended; empty if there is none."""
    stops = [one for one in _events(place, since) if one["event"] == "stop"]
    return stops[-1] if stops else {}


def _events(place: Place, since: float) -> list[dict[str, Any]]:
    return [one for one in ledger.read(place.logdir) if one["time"] >= since and one.get("role") == history.CHIEF]


def _note_restored(done: Run, place: Place, running: Running) -> None:
    """Add to the last restart the step from which it went on."""
    if not done.restarts:
        return
    begun = [one for one in _events(place, running.began) if one["event"] == "restore"]
    if begun and isinstance(begun[0].get("step"), int):
        done.restarts[-1].step = begun[0]["step"]


def is_at_end(stop: dict[str, Any], code: int | None) -> bool:
    """Whether a start has ended well, at the last step of the run; ``code`` is ``None`` if it still runs."""
    has_ended = stop.get("reason") in ("finished", trial.REASON) and not stop.get("error")
    return has_ended and code in (0, None, stop.get("exit_code"))


def _failure(code: int, stop: dict[str, Any], lines: Sequence[str]) -> ProgramFailedError:
    ending = f"exit code {code}" if code >= 0 else f"signal {-code}"
    where = f" at step {stop['step']}" if isinstance(stop.get("step"), int) else ""
    why = f": {stop['error']}" if stop.get("error") else ""
    if not stop:
        return ProgramFailedError(f"it ended with {ending} before its run was over", lines)
    reason = stop.get("reason")
    by = "" if reason in ("error", None) else f" ({reason})"
    return ProgramFailedError(f"it ended{by}{where} with {ending}{why}", lines)
