"""What happened to a run, as sentences: the content of `log`, made from the events of the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stepguard.cli.text import output
from stepguard.watching import configuration
from stepguard.watching.heartbeat import Heartbeat
from stepguard.words import duration, listed, printable

_Event = Mapping[str, Any]
_Options = Mapping[str, Any] | None

GOOD, BAD, PLAIN = "green", "red", None
"""The colours of entries."""
_TROUBLE = "yellow"

STOPS = {
    "finished": "finished",
    "sigterm": "stopped by SIGTERM",
    "sigusr1": "stopped by SIGUSR1",
    "sigusr2": "stopped by SIGUSR2",
    "interrupt": "stopped by Ctrl-C",
    "request_stop": "stopped: the program has asked for it",
    "time_limit": "stopped: the time that it was given is over",
    "command": "stopped by `stepguard stop`",
    "exit": "the program left without stopping the run",
    "error": "failed",
}
"""What the reasons of a `stop` say."""
SAVES = frozenset({"checkpoint", "mirrored"})
"""The events of saves, of which a run has many."""
_UNKNOWN_END = ": it was killed, or crashed, or its machine went down"
_OF_EVERY_LINE = frozenset({"event", "time", "pid", "host", "role", "so_far", "process_start"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One sentence of the story: at ``time`` (Unix seconds), about the process ``role``, with the events behind it.

    ``is_trouble`` says that something went wrong. ``text`` quotes the ledger, and is escaped for a terminal.
    """

    time: float
    role: str
    text: str
    colour: str | None
    events: tuple[_Event, ...]

    @property
    def is_trouble(self) -> bool:
        """Whether it tells of something that went wrong."""
        return self.colour in (BAD, _TROUBLE)


def told(events: Iterable[_Event], *, folds: bool = True) -> Iterator[Entry]:
    """The story of the events of a ledger. With ``folds``, saves in a row are one entry."""
    row: list[_Event] = []
    running: dict[str, _Event] = {}
    last: dict[str, float] = {}
    options: dict[str, _Options] = {}
    for event in events:
        role = str(event.get("role"))
        if event["event"] not in ("start", "stop"):
            last[role] = event["time"]
        if folds and event["event"] in SAVES and (not row or row[-1].get("role") == role):
            row.append(event)
            continue
        if row:
            yield _saves(row)
            row = [event] if folds and event["event"] in SAVES else []
            if row:
                continue
        if event["event"] == "start":
            if role in running:
                yield _ended_without_a_word(running[role], last[role], event)
            running[role], last[role] = event, event["time"]
        elif event["event"] == "stop":
            running.pop(role, None)
        yield _entry(event)
        if event["event"] == "start":
            before, options[role] = options.get(role), configuration.as_read(event.get("options"))
            yield from _other_options(event, before, options[role])
    if row:
        yield _saves(row)


def dead(beat: Heartbeat) -> Entry:
    """The entry of a process whose heartbeat has stopped, and which is gone."""
    at = "" if beat.step is None else f" at step {_number(beat.step)}"
    return Entry(beat.time, beat.role, printable(f"process {beat.pid} ended without a word{at}{_UNKNOWN_END}"), BAD, ())


def _entry(event: _Event) -> Entry:
    tell = _TELLERS.get(str(event["event"]), _other)
    text, colour = tell(event)
    return Entry(float(event["time"]), str(event.get("role", "")), printable(text), colour, (event,))


def _ended_without_a_word(before: _Event, last: float, start: _Event) -> Entry:
    # Its time is that of the last line: what the process did after that, the next `restore` tells.
    text = f"process {before.get('pid')} ended without a word{_UNKNOWN_END}"
    return Entry(float(min(last, start["time"])), str(before.get("role", "")), printable(text), BAD, (before,))


def _other_options(start: _Event, before: _Options, after: _Options) -> Iterator[Entry]:
    told = [f"{one.name} {one.after} (before: {one.before})" for one in configuration.changes(before, after)]
    if told:
        text = f"with other options than the start before: {listed(told)}"
        # Without an event of its own.
        yield Entry(float(start["time"]), str(start.get("role", "")), printable(text), PLAIN, ())


def _saves(row: list[_Event]) -> Entry:
    if len(row) == 1:
        return _entry(row[0])
    saves = [one for one in row if one["event"] == "checkpoint"]
    copies = [one for one in row if one["event"] == "mirrored"]
    told = []
    if saves:
        told.append(_checkpoint(saves[0])[0] if len(saves) == 1 else _checkpoints(saves))
    if copies:
        told.append(f"{len(copies):,} copied to the mirror, the last of step {_number(copies[-1].get('step'))}")
    return Entry(float(row[-1]["time"]), str(row[-1].get("role", "")), printable("; ".join(told)), GOOD, tuple(row))


def _checkpoints(row: list[_Event]) -> str:
    secs = [float(one["secs"]) for one in row if one.get("secs") is not None]
    stalls = [float(one["stall_secs"]) for one in row if one.get("stall_secs") is not None]
    text = f"{len(row):,} checkpoints, steps {_number(row[0].get('step'))} to {_number(row[-1].get('step'))}"
    if secs and stalls:
        text += f": the slowest took {_secs(max(secs))}, training waited {_secs(max(stalls))} at most"
    return text


# --- the sentences, each with its colour ---

_Told = tuple[str, str | None]


def _start(event: _Event) -> _Told:
    argv = " ".join(map(str, event.get("argv") or []))
    # All restarts of the run until then: a start after a stop is none, and says the same number again.
    again = f" (restarts so far: {event['restarts']})" if event.get("restarts") else ""
    return f"started as process {event.get('pid')} on {event.get('host')}{again}: {argv}", PLAIN


def _fresh(event: _Event) -> _Told:
    before = event.get("previous_step")
    if before is not None and before != event.get("step"):
        text = f"nothing to restore: begins at step {_number(event.get('step'))}"
        return f"{text}, although the run was at step {_number(before)}", _TROUBLE
    return f"begins at step {_number(event.get('step'))}: there was nothing to restore", PLAIN


def _restore(event: _Event) -> _Told:
    text = f"goes on from {event.get('checkpoint')}, step {_number(event.get('step'))}"
    if event.get("lost_steps"):
        was = f" (it was at step {_number(event['previous_step'])})" if event.get("previous_step") is not None else ""
        text += f"; {output.counted(event['lost_steps'], 'step')} lost, to be done again{was}"
    damaged = [one for one in event.get("damaged") or [] if isinstance(one, Mapping)]
    if damaged:
        text += "; damaged: " + listed(f"{one.get('name')} ({one.get('reason')})" for one in damaged)
    return text, BAD if damaged else _TROUBLE if event.get("lost_steps") else PLAIN


def _checkpoint(event: _Event) -> _Told:
    size = f", {output.size(event['bytes'])}" if event.get("bytes") is not None else ""
    text = f"checkpoint {event.get('name')}, step {_number(event.get('step'))}{size}"
    if event.get("secs") is not None and event.get("stall_secs") is not None:
        text += f": took {_secs(event['secs'])}, training waited {_secs(event['stall_secs'])}"
    return text, GOOD


def _mirrored(event: _Event) -> _Told:
    took = f" in {_secs(event['secs'])}" if event.get("secs") is not None else ""
    size = f": {output.size(event['bytes'])}{took}" if event.get("bytes") is not None else ""
    return f"{event.get('name')}, step {_number(event.get('step'))}, is copied to the mirror{size}", GOOD


def _warning(event: _Event) -> _Told:
    return f"warning: {event.get('message')}", _TROUBLE


def _return(event: _Event) -> _Told:
    steps = f"from step {_number(event.get('step'))} to step {_number(event.get('to_step'))}"
    return f"the NaN guard went back {steps}: {event.get('reason')}", BAD


def _rollback(event: _Event) -> _Told:
    was = f" from step {_number(event['previous_step'])}" if event.get("previous_step") is not None else ""
    return f"rolled back{was} to {event.get('checkpoint')}, step {_number(event.get('step'))}", _TROUBLE


def _replay(event: _Event) -> _Told:
    return str(event.get("message")), {"same": GOOD, "differs": BAD}.get(str(event.get("outcome")), PLAIN)


def _hang(event: _Event) -> _Told:
    killed = ", and was killed" if event.get("ended") else ""
    return f"no step for {_secs(event.get('secs') or 0)}{killed}; the stacks are in {event.get('stacks')}", BAD


def _stop(event: _Event) -> _Told:
    reason = str(event.get("reason"))
    text = STOPS.get(reason, f"stopped: {reason}")
    if event.get("step") is not None:
        text += f" at step {_number(event['step'])}"
    if event.get("error"):
        after = f" (after it was asked to stop: {event['request']})" if event.get("request") else ""
        return f"{text}{after}: {event['error']}", BAD
    return text, GOOD if reason == "finished" else PLAIN


def _launch(event: _Event) -> _Told:
    argv = " ".join(map(str, event.get("argv") or []))
    return f"start {event.get('attempt')} of the program, process {event.get('child_pid')}: {argv}", PLAIN


def _exit(event: _Event) -> _Told:
    after = f" after {duration(event['secs'])}" if event.get("secs") is not None else ""
    if not event.get("failure"):
        return f"the program ended{after}", PLAIN
    return f"the program ended{after}: {event['failure']}", BAD


def _restart(event: _Event) -> _Told:
    return f"starts it again in {_secs(event.get('delay_secs') or 0)}", PLAIN


def _gave_up(event: _Event) -> _Told:
    return f"gave up, {event.get('reason')}: {event.get('failure')}", BAD


def _rotated(event: _Event) -> _Told:
    return f"earlier lines are in {event.get('archive')}", PLAIN


def _other(event: _Event) -> _Told:
    """An event that this version does not know, or that says itself what it is: its ``message``."""
    if event.get("message"):
        return str(event["message"]), PLAIN
    told = ", ".join(f"{name} {value}" for name, value in event.items() if name not in _OF_EVERY_LINE)
    return f"{event['event']}{': ' if told else ''}{told}", PLAIN


_TELLERS: Mapping[str, Callable[[_Event], _Told]] = {
    "start": _start,
    "fresh": _fresh,
    "restore": _restore,
    "checkpoint": _checkpoint,
    "mirrored": _mirrored,
    "warning": _warning,
    "return": _return,
    "rollback": _rollback,
    "replay": _replay,
    "hang": _hang,
    "stop": _stop,
    "launch": _launch,
    "exit": _exit,
    "restart": _restart,
    "gave_up": _gave_up,
    "rotated": _rotated,
}


def _number(step: object) -> str:
    return f"{step:,}" if isinstance(step, int) else "unknown"


def _secs(secs: float) -> str:
    if secs < 1:
        return f"{1000 * secs:.3g} ms"
    return f"{secs:.1f} s" if secs < 10 else duration(secs)
