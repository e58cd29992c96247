"""The program that is proven: it is started, watched by its trace, sent signals, and waited for."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepguard.cli.launcher.processes import Processes, send
from stepguard.cli.launcher.relay import without_noise
from stepguard.cli.proving.trace_tail import TraceTail
from stepguard.watching import heartbeat, history, ledger

_LOOK_SECS = 0.001
# The share of the time that may go into reading the trace, while a step is waited for.
_READING_SHARE = 0.2
_KEPT_BLOCKS = 64
_GRACE_SECS = 10.0


class OutOfTimeError(Exception):
    """The time for the whole proof is over."""


class Clock:
    """The time that the whole proof may take."""

    def __init__(self, limit_secs: float) -> None:
        self._ends = time.monotonic() + limit_secs

    def check(self) -> None:
        """Raise OutOfTimeError if it is over."""
        if time.monotonic() >= self._ends:
            raise OutOfTimeError


class Program:
    """Starts ``argv``, one start at a time. What it prints is kept, and shown on stderr if ``is_shown``."""

    def __init__(self, argv: Sequence[str], clock: Clock, *, environment: Mapping[str, str], is_shown: bool) -> None:
        self.argv = list(argv)
        self.clock = clock
        self._environment = dict(environment)
        self._is_shown = is_shown
        self._own: Processes | None = None

    def __reduce__(self) -> Any:
        """A copy in another process has that process's own children."""
        make = functools.partial(type(self), environment=self._environment, is_shown=self._is_shown)
        return make, (self.argv, self.clock)

    @property
    def _processes(self) -> Processes:
        # Made when it is first needed: from then on this process reaps all of its children.
        if self._own is None:
            self._own = Processes()
        return self._own

    def start(self, environment: Mapping[str, str]) -> Running:
        """Start it.

        Raises:
            OSError: there is no such program, or it cannot be executed.
        """
        reader, writer = os.pipe()
        try:
            pid = self._processes.start(
                self.argv,
                environment={**os.environ, **self._environment, **environment},
                stdout=writer,
                stderr=writer,
                has_own_group=True,
                in_child=lambda: None,
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        return Running(self._processes, pid, reader, self.clock, is_shown=self._is_shown)

    def kill(self) -> None:
        """Kill whatever is left of it."""
        if self._own is not None:
            self._own.kill_all(-1)


class Running:
    """One start of the program, with all processes that it has started."""

    def __init__(self, processes: Processes, pid: int, reader: int, clock: Clock, *, is_shown: bool) -> None:
        self.pid = pid
        self._processes = processes
        self._clock = clock
        self.began = time.time() - 0.001
        self._blocks: collections.deque[bytes] = collections.deque(maxlen=_KEPT_BLOCKS)
        self._reading = threading.Thread(target=self._read, args=(reader, is_shown), daemon=True)
        self._reading.start()

    def _read(self, reader: int, is_shown: bool) -> None:
        with os.fdopen(reader, "rb", buffering=0) as file:
            while block := file.read(1 << 14):
                self._blocks.append(block)
                if is_shown:
                    with contextlib.suppress(OSError):
                        os.write(2, block)

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; ``None`` while it runs."""
        return self._processes.ending(self.pid)

    def wait(self, look: Callable[[], object]) -> int:
        """Wait for its end, and end what it leaves behind; ``look()`` is called meanwhile. Returns the exit code.

        Raises:
            OutOfTimeError: the time of the proof is over; everything was killed.
        """
        while (code := self.code) is None:
            look()
            try:
                self._clock.check()
            except OutOfTimeError:
                self.kill()
                raise
            time.sleep(0.01)
        self._end_the_rest()
        self._reading.join(1.0)
        return code

    def wait_for(self, is_so: Callable[[], bool]) -> bool:
        """Wait until ``is_so()``; ``False`` if the program ends before.

        Raises:
            OutOfTimeError: the time of the proof is over; everything was killed.
        """
        while self.code is None:
            began = time.monotonic()
            if is_so():
                return True
            try:
                self._clock.check()
            except OutOfTimeError:
                self.kill()
                raise
            time.sleep(max(_LOOK_SECS, (time.monotonic() - began) / _READING_SHARE))
        return False

    def lines(self) -> list[str]:
        """The last lines that it has printed."""
        return without_noise(b"".join(self._blocks))

    # --- what is done to it ---

    def descendants(self) -> list[int]:
        """Its processes: all of them on Linux, elsewhere the first one."""
        return self._processes.descendants() or [self.pid]

    def kill(self) -> None:
        """Kill all of it at once, as a machine that loses its power does."""
        self._processes.kill_all(-1, self.pid)

    def ask(self) -> None:
        """Send SIGTERM to the process that was started, as `kill` and most schedulers do."""
        send(self.pid, signal.SIGTERM)

    def interrupt(self) -> None:
        """Press Ctrl-C: SIGINT for every process of its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGINT)

    def _end_the_rest(self) -> None:
        deadline = time.monotonic() + _GRACE_SECS
        asked: set[int] = set()
        while orphans := self._processes.orphans(-1):
            for pid in set(orphans) - asked:
                send(pid, signal.SIGTERM)
            asked.update(orphans)
            if time.monotonic() >= deadline:
                self._processes.kill_all(-1)
                return
            time.sleep(0.01)


class Live:
    """How far the present start of a run has come, as its ledger and its trace tell."""

    def __init__(self, logdir: Path) -> None:
        self.logdir = logdir
        self._before = _sessions(logdir)
        self._tail = TraceTail(logdir, history.CHIEF)

    def step(self) -> int | None:
        """The number of steps done; ``None`` until its session is open."""
        return reached(self.logdir, self._tail) if _sessions(self.logdir) > self._before else None


def _sessions(logdir: Path) -> int:
    """How many sessions the chief has opened."""
    events = ledger.read(logdir)
    return sum(one["event"] in ("fresh", "restore") and one.get("role") == history.CHIEF for one in events)


def reached(logdir: Path, tail: TraceTail | None = None) -> int:
    """The last step of the chief's newest session that left a sign: in its trace, its ledger, or its heartbeat.

    A program whose steps report nothing leaves no sign of each; the result may then be too small.
    """
    begun, steps = 0.0, [0]
    for one in ledger.read(logdir):
        if one.get("role") != history.CHIEF or one["event"] not in ("fresh", "restore", "checkpoint"):
            continue
        if one["event"] != "checkpoint":
            begun, steps = one["time"], [0]
        if isinstance(one.get("step"), int):
            steps.append(one["step"])
    tail = TraceTail(logdir, history.CHIEF) if tail is None else tail
    tail.look()
    if tail.started is not None and tail.step is not None and tail.started >= begun - 1:
        steps.append(tail.step)
    beat = heartbeat.read_one(logdir, history.CHIEF)
    if beat is not None and beat.time >= begun and isinstance(beat.step, int):
        steps.append(beat.step)
    return max(steps)
