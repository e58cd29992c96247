"""The history of a run, computed from its ledger: its starts, and its productive, replayed and down time.

Time is counted along the chief's lines, in the order in which they were written. When a clock was set back, the counted
time stands still for a moment, so that no span is ever negative.

- An *attempt* is one start of the training process. It trains from its `restore` or `fresh` to its last sign of life:
  its `stop`, the last heartbeat before the next start, or its last line. An attempt that the hang watch ended trained
  until its last step boundary.
- *Replayed* is the training time whose steps were done again: from the time of a checkpoint to the end of the attempt
  that lost the steps after that checkpoint. A return of the NaN guard gives up steps in the same way.
- *Productive* is the rest of training.
- *Down* is the time between attempts that trained, including attempts in between that failed to start. The time after a
  finished attempt, and the time since the last sign of life, do not count.
- A *restart* is a start after a crash: after an attempt that left no `stop`, or stopped with an error. A start by
  `stepguard run` counts too if the program failed before it opened a session.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepguard.disk import schema
from stepguard.watching import configuration, trace
from stepguard.watching.heartbeat import Heartbeat

CHIEF = "chief"
LAUNCHER = "launcher"

_OF_A_CHECKPOINT = ("name", "step", "time", "bytes", "secs", "stall_secs")

_Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of the training process. Times are Unix seconds by its own clock.

    ``ended`` is the last sign of life. ``reason`` is why the attempt stopped: ``None`` while it runs and after a crash.
    ``options`` are those of the Supervisor that are not the defaults, by names such as ``saving.max_to_keep``; ``None``
    where no line tells them.
    """

    pid: int | None
    host: str | None
    started: float
    ended: float
    first_step: int | None
    last_step: int | None
    reason: str | None
    error: str | None
    options: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class History:
    """How the time of a run was spent. `lost_steps` is the number of steps that were done again."""

    attempts: tuple[Attempt, ...]
    restarts: int
    productive_secs: float
    replayed_secs: float
    down_secs: float
    lost_steps: int


def from_events(events: Iterable[Mapping[str, Any]], last: Heartbeat | None = None, *, role: str = CHIEF) -> History:
    """The history of ``role`` from the events of a ledger, as `stepguard.watching.ledger.read` gives them.

    Args:
        events: the events of all roles.
        last: the last heartbeat of ``role``, which may be newer than its last event.
        role: the role whose time is counted.
    """
    reader = _EventReader(role)
    for event in events:
        if event.get("role") == LAUNCHER:
            reader.launcher(event)
        elif event.get("role") == role:
            reader.read(event)
    return reader.history(last)


def last_seen(events: Iterable[Mapping[str, Any]], role: str = CHIEF) -> Heartbeat | None:
    """The newest start of ``role`` in the ledger, as a heartbeat: a substitute if a power loss emptied the real one.

    Returns ``None`` if the ledger has no start of ``role``. The step is that of the last line.
    """
    own = [one for one in events if one.get("role") == role]
    known = [one for one in from_events(own, role=role).attempts if one.pid is not None and one.host is not None]
    if not known:
        return None
    last = known[-1]
    lines = [
        one for one in own if one["time"] >= last.started and (one.get("pid"), one.get("host")) == (last.pid, last.host)
    ]
    start = next((one for one in lines if one["event"] == "start"), {})
    has_trained = any(one["event"] in ("restore", "fresh") for one in lines)
    saved = [one for one in lines if one["event"] == "checkpoint"]
    return Heartbeat(
        role,
        engine=_text(start.get("engine")) or "",
        pid=last.pid or 0,
        host=last.host or "",
        process_start=_integer(start.get("process_start")),
        started=last.started,
        time=last.ended,
        phase="stopped" if last.reason else "training" if has_trained else "preparing",
        reason=last.reason,
        first_step=last.first_step,
        step=last.last_step,
        last_checkpoint={name: saved[-1].get(name) for name in _OF_A_CHECKPOINT} if saved else None,
        restarts=_integer(start.get("restarts")) or 0,
        error=last.error,
    )


def completed(last: Heartbeat, events: Iterable[Mapping[str, Any]], logdir: Path | None = None) -> Heartbeat:
    """Update a heartbeat from the lines that its process and its hang watch added to the ledger afterwards.

    Of a process that was killed, the trace in ``logdir`` may know newer steps. A trace that cannot be read is passed
    over.
    """
    own = [one for one in events if (one.get("pid"), one.get("role")) == (last.pid, last.role)]
    own = [one for one in own if one["time"] >= last.started]
    steps = [last.step, *(one.get("step") for one in own if one["event"] in ("checkpoint", "stop"))]
    if logdir is not None and last.phase != "stopped":
        steps.append(trace.came_to(logdir, last.role, pid=last.pid, started=last.started, since=last.step or 0))
    found = replace(
        last,
        step=max((one for one in steps if isinstance(one, int)), default=None),
        # A line of the hang watch, a process of its own, does not prove that the watched process is alive.
        time=max([last.time, *(one["time"] for one in own if one["event"] != "hang")]),
    )
    ended = [one for one in own if one["event"] == "hang" and one.get("ended")]
    if ended and found.phase != "stopped":
        found.stacks = str(ended[-1].get("stacks"))
        found.error = found.error or _hang(ended[-1])
    return found


def totals(events: Iterable[Mapping[str, Any]], role: str = CHIEF) -> dict[str, float]:
    """What the time of ``role`` adds up to, for the field ``so_far`` of the last of the events, by which a start begins
    to train: who reads a ledger from there on needs no more of what came before.
    """
    found = from_events(events, role=role)
    return {
        "productive_secs": round(found.productive_secs, 3),
        "replayed_secs": round(found.replayed_secs, 3),
        "down_secs": round(found.down_secs, 3),
        "lost_steps": found.lost_steps,
    }


def needed(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those events that tell of the present start of each role, for a ledger that begins with them."""
    starts: dict[object, int] = {}
    last: dict[tuple[object, object], int] = {}
    for number, one in enumerate(events):
        role, event = one.get("role"), one["event"]
        if event in ("start", "launch"):
            starts[role] = number
        last[role, event] = number
    kept = {*starts.values(), *(number for key, number in last.items() if key[0] == LAUNCHER)}
    for number, one in enumerate(events):
        is_of_this_start = number > starts.get(one.get("role"), -1)
        if is_of_this_start and (one["event"] in ("fresh", "restore", "return", "stop", "hang")):
            kept.add(number)
    kept |= {last[CHIEF, event] for event in ("checkpoint",) if (CHIEF, event) in last}
    return [events[number] for number in sorted(kept)]


def last_error(events: Iterable[Mapping[str, Any]]) -> str | None:
    """The error of the newest start that ended with one, even if the run goes on now.

    The error of a start is the first error that a process reported, because those of other processes follow from it, or
    the end by the hang watch. If the start reported none, it is the failure that `stepguard run` saw before it started
    the program again or gave up. A requested stop is not an error.
    """
    last: str | None = None
    told_at: float | None = None
    failure: str | None = None
    for one in events:
        event, is_launcher = one["event"], one.get("role") == LAUNCHER
        if event == "rotated":
            last, told_at = _text(one.get("error")) or last, None
        elif event == "launch" or (event == "start" and one.get("role") == CHIEF):
            # The line of a launch may come late, and tell of a time before.
            if told_at is not None and one["time"] > told_at:
                told_at = None
        elif event == "stop" and told_at is None and _text(one.get("error")):
            # An error after a stop request may be its consequence: a failure that the launcher saw says more.
            last, told_at = _text(one.get("error")), None if _text(one.get("request")) else one["time"]
        elif event == "hang" and told_at is None and one.get("ended"):
            last, told_at = _hang(one), one["time"]
        elif event == "exit" and is_launcher:
            failure = _text(one.get("failure"))
        elif event in ("restart", "gave_up") and is_launcher and told_at is None:
            last = failure or last
    return last


def _hang(event: Mapping[str, Any]) -> str:
    return f"ended by its hang watch: no step boundary for {event.get('secs')} s"


class _OpenAttempt:
    """An attempt while its events are read. ``begin``, ``trained``, ``end`` and ``hung`` use the reader's clock."""

    def __init__(self, event: Mapping[str, Any], begin: float, *, is_restart: bool) -> None:
        self.pid, self.host = _integer(event.get("pid")), _text(event.get("host"))
        self.started = self.ended = float(event["time"])
        self.begin = self.end = begin
        self.trained: float | None = None
        self.hung: float | None = None
        self.is_restart = is_restart
        self.first_step: int | None = None
        self.last_step: int | None = None
        self.reason: str | None = None
        self.error: str | None = None
        self.options = configuration.as_read(event.get("options")) if event["event"] == "start" else None

    @property
    def has_crashed(self) -> bool:
        """Whether the next start is a restart. True while the attempt runs: a next start would prove a crash."""
        return self.reason in (None, "error")

    def alive_at(self, time: float) -> None:
        """Note a sign of life after the last event, by the clock of the attempt's host."""
        if time > self.ended:
            self.end += time - self.ended
            self.ended = time

    def came_to(self, step: object) -> None:
        step = _integer(step)
        if step is not None:
            self.last_step = step if self.last_step is None else max(self.last_step, step)

    def span(self) -> _Span | None:
        """The time in which the attempt trained; ``None`` if it never did."""
        if self.trained is None:
            return None
        end = self.end if self.hung is None else min(self.hung, self.end)
        return self.trained, max(self.trained, end)

    def attempt(self) -> Attempt:
        return Attempt(
            self.pid,
            self.host,
            self.started,
            self.ended,
            self.first_step,
            self.last_step,
            self.reason,
            self.error,
            self.options,
        )


class _EventReader:
    def __init__(self, role: str) -> None:
        self._role = role
        self._now = 0.0
        self._time: float | None = None
        self._runs: list[_OpenAttempt] = []
        self._lost: list[_Span] = []
        self._lost_steps = 0
        self._saved: dict[str | int | None, float] = {}
        # The newest launch that has opened no session yet; then the attempt and time of the newest opened session.
        self._launched: int | None = None
        self._newest_start: tuple[int | None, float] = (None, 0.0)
        self._failed_launches = 0
        # Restarts of which no line is left, and the sums up to a start that tells them.
        self._restarts_before = 0
        self._since = 0.0
        self._so_far = {"productive_secs": 0.0, "replayed_secs": 0.0, "down_secs": 0.0, "lost_steps": 0}

    def launcher(self, event: Mapping[str, Any]) -> None:
        """Read an event of the launcher, which also records starts that opened no session."""
        if event["event"] == "launch":
            attempt, (started, time) = _integer(event.get("attempt")), self._newest_start
            # The launcher learns the logdir from its program, so the launcher's line may follow the program's.
            self._launched = None if attempt == started and event["time"] <= time else attempt
        elif event["event"] == "exit" and self._launched is not None:
            self._failed_launches += self._launched > 1
            self._launched = None

    def read(self, event: Mapping[str, Any]) -> None:
        time = float(event["time"])
        self._now += 0.0 if self._time is None else max(0.0, time - self._time)
        self._time = time
        run = self._run_of(event)
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(run, event)
        run.came_to(event.get("step"))
        run.ended, run.end = time, self._now

    def history(self, last: Heartbeat | None) -> History:
        if last is not None and last.role == self._role and self._runs:
            run = self._runs[-1]
            if (run.pid, run.host) == (last.pid, last.host):
                run.alive_at(last.time)
                run.came_to(last.step)
        since = [(self._since, math.inf)]
        training = _common(_union(span for run in self._runs if (span := run.span()) is not None), since)
        replayed = _length(_common(training, _union(self._lost)))
        return History(
            attempts=tuple(run.attempt() for run in self._runs),
            restarts=self._restarts(),
            productive_secs=self._so_far["productive_secs"] + max(0.0, _length(training) - replayed),
            replayed_secs=self._so_far["replayed_secs"] + replayed,
            down_secs=self._so_far["down_secs"] + self._down(),
            lost_steps=self._lost_steps,
        )

    def _run_of(self, event: Mapping[str, Any]) -> _OpenAttempt:
        """The attempt of an event. A `start` begins a new attempt, and so does an event whose `start` was lost."""
        process = _integer(event.get("pid")), _text(event.get("host"))
        if event["event"] != "start":
            for run in reversed(self._runs):
                if (run.pid, run.host) == process:
                    return run
        is_restart = bool(self._runs) and self._runs[-1].has_crashed
        if event["event"] == "start":
            self._launched, self._newest_start = None, (_integer(event.get("attempt")), float(event["time"]))
        self._runs.append(_OpenAttempt(event, self._now, is_restart=is_restart))
        if event["event"] == "start":
            # It counts those before it, also where their lines were put aside.
            self._restarts_before += max(0, (_integer(event.get("restarts")) or 0) - self._restarts())
        return self._runs[-1]

    def _restarts(self) -> int:
        return self._restarts_before + sum(run.is_restart for run in self._runs) + self._failed_launches

    def _on_fresh(self, run: _OpenAttempt, event: Mapping[str, Any]) -> None:
        before = self._begins_to_train(run, event)
        step = _integer(event.get("step"))
        # A fresh start at a later step continues a model that stayed alive elsewhere, as in parameter servers.
        if before is not None and before.reason != "finished" and step in (None, 0):
            self._lost.append((0.0, self._now))
            self._lost_steps += before.last_step or 0
        self._take_sums(event)

    def _on_restore(self, run: _OpenAttempt, event: Mapping[str, Any]) -> None:
        before = self._begins_to_train(run, event)
        lost = _integer(event.get("lost_steps"))
        if lost != 0 and not (lost is None and (before is None or not before.has_crashed)):
            self._lose(event, lost or 0)
        self._take_sums(event)

    def _lose(self, event: Mapping[str, Any], steps: int) -> None:
        self._lost_steps += steps
        made = self._saved.get(_text(event.get("checkpoint")))
        if made is None:
            made_at = _number(event.get("checkpoint_time"))
            made = self._now - (0.0 if made_at is None else max(0.0, event["time"] - made_at))
        self._lost.append((made, self._now))

    def _on_checkpoint(self, run: _OpenAttempt, event: Mapping[str, Any]) -> None:
        if run.trained is None:
            # The lines of its start were lost, but a checkpoint proves that the attempt trained.
            run.trained = run.begin
        # The checkpoint holds the state at the beginning of the write.
        moment = self._now - max(0.0, _number(event.get("secs")) or 0.0)
        self._saved[_text(event.get("name"))] = self._saved[_integer(event.get("step"))] = moment

    def _on_return(self, run: _OpenAttempt, event: Mapping[str, Any]) -> None:
        step, to_step = _integer(event.get("step")), _integer(event.get("to_step"))
        if step is not None and to_step is not None:
            self._lost_steps += max(0, step - to_step)
        began = run.begin if run.trained is None else run.trained
        self._lost.append((self._saved.get(to_step, began), self._now))

    def _on_hang(self, run: _OpenAttempt, event: Mapping[str, Any]) -> None:
        secs = _number(event.get("secs"))
        if event.get("ended") is True and secs is not None:
            run.hung = self._now - max(0.0, secs)

    def _on_stop(self, run: _OpenAttempt, event: Mapping[str, Any]) -> None:
        run.reason = _text(event.get("reason")) or "error"
        run.error = _text(event.get("error"))

    def _begins_to_train(self, run: _OpenAttempt, event: Mapping[str, Any]) -> _OpenAttempt | None:
        """Note that the attempt trains. Update the attempt before it from the event, and return that attempt."""
        if run.trained is None:
            run.trained = self._now
            run.first_step = _integer(event.get("step"))
        before = next((one for one in reversed(self._runs) if one is not run and one.trained is not None), None)
        if before is not None:
            previous_time = _number(event.get("previous_time"))
            if previous_time is not None and before.reason is None:
                before.alive_at(previous_time)
                before.end = min(before.end, run.begin)
            before.came_to(event.get("previous_step"))
        return before

    def _take_sums(self, event: Mapping[str, Any]) -> None:
        """A start has added up what came before it: count from here on."""
        told = event.get("so_far")
        if isinstance(told, Mapping) and all(schema.is_of(told.get(name), (float,)) for name in self._so_far):
            self._so_far = {name: max(0, told[name]) for name in self._so_far}
            self._lost_steps = int(self._so_far["lost_steps"])
            self._since = self._now
            self._lost.clear()

    def _down(self) -> float:
        if not self._runs:
            return 0.0
        down = 0.0
        # Those whose time a later start has added up have no part in it.
        runs = [run for run in self._runs if max(run.end, run.begin) >= self._since]
        first = runs[0]
        last_end, is_over = first.begin if first.trained is None else first.trained, False
        for run in runs:
            span = run.span()
            if span is None:
                continue
            down += 0.0 if is_over else max(0.0, span[0] - last_end)
            last_end, is_over = max(last_end, span[1]), run.reason == "finished"
        return down if is_over else down + max(0.0, max(run.end for run in runs) - last_end)


def _union(spans: Iterable[_Span]) -> list[_Span]:
    """Merge spans into ordered spans that do not overlap."""
    merged: list[_Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def _common(some: Sequence[_Span], others: Sequence[_Span]) -> list[_Span]:
    """The intersection of two lists of ordered spans that do not overlap."""
    found: list[_Span] = []
    first = 0
    for begin, end in some:
        while first < len(others) and others[first][1] <= begin:
            first += 1
        for other in itertools.islice(others, first, None):
            if other[0] >= end:
                break
            found.append((max(begin, other[0]), min(end, other[1])))
    return found


def _length(spans: Iterable[_Span]) -> float:
    return sum(end - begin for begin, end in spans)


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
