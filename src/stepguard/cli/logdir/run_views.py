"""What `status` shows of runs: one with all that is known of it, or many with a line for each."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from stepguard.cli.logdir import runs
from stepguard.cli.logdir.contents import GOOD, ListedCheckpoint
from stepguard.cli.logdir.launcher_state import Launcher
from stepguard.cli.logdir.run_state import Process, RunState, document, read_run_state
from stepguard.cli.text import output
from stepguard.cli.text.table import Column, table_lines
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.history import CHIEF
from stepguard.words import duration, printable

_WARNINGS_SHOWN = 3
_LABEL_WIDTH = 12
_COLOURS = {"alive": "green", "stopped": "green", "dead": "red", "silent": "yellow"}

_Line = tuple[str, str, str | None]
"""Label, text, colour."""


def view_of(logdirs: tuple[Path, ...]) -> One | Many:
    """The view of the runs that are meant: of one if it is one path, with a run in it or with none below it."""
    return Many(logdirs) if runs.are_many(logdirs) else One(logdirs[0])


class One:
    """The view of one run: all that is known of it."""

    def __init__(self, logdir: Path) -> None:
        self._logdir = logdir

    def read(self) -> list[RunState]:
        """Read the states. Raises OSError if they cannot be read."""
        return [read_run_state(self._logdir)]

    def text(self, found: list[RunState], width: int | None) -> str:
        """The states as text, fitted to ``width`` columns; with None, as wide as it is."""
        return _text(found[0], width)

    def document(self, found: list[RunState]) -> dict[str, Any]:
        """The states as a JSON document."""
        return document(found[0])

    def watched(self, found: list[RunState]) -> Iterator[tuple[str, object, str]]:
        """What `--follow` watches for changes: a name, its value, and the line to print."""
        return _watched(found[0])


class Many:
    """The view of all runs in or below some paths: a line for each."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths

    def read(self) -> list[RunState]:
        """Read the states. Raises OSError if they cannot be read."""
        return [read_run_state(logdir) for logdir in runs.meant(self._paths)]

    def text(self, found: list[RunState], width: int | None) -> str:
        """The states as text, fitted to ``width`` columns; with None, as wide as it is."""
        return "\n".join(table_lines(_COLUMNS, [_row(one) for one in found], width))

    def document(self, found: list[RunState]) -> dict[str, Any]:
        """The states as a JSON document."""
        return {"runs": [document(one) for one in found]}

    def watched(self, found: list[RunState]) -> Iterator[tuple[str, object, str]]:
        """What `--follow` watches for changes: a name, its value, and the line to print."""
        for state in found:
            for key, value, line in _watched(state):
                yield f"{state.logdir} {key}", value, f"{printable(str(state.logdir))}: {line}"


def _watched(found: RunState) -> Iterator[tuple[str, object, str]]:
    """What `--follow` watches for changes: a name, its value, and the line to print."""
    for one in found.processes:
        beat, role = one.beat, printable(one.beat.role)
        saved = None if beat.last_checkpoint is None else str(beat.last_checkpoint.get("name"))
        line = f"{role} {_headline(one)}, step {_step(one)}"
        line += "" if saved is None else f", checkpoint {printable(saved)}"
        yield beat.role, (beat.pid, one.state, one.hangs, beat.phase, beat.reason, saved), line
        for kind, text in (("warning", beat.warnings[-1:]), ("error", [beat.error]), ("stacks", [beat.stacks])):
            if text and text[0]:
                yield f"{beat.role} {kind}", text, f"{role} {kind}: {printable(text[0])}"
    if found.launcher is not None:
        key = (found.launcher.state, found.launcher.next_start, found.launcher.pid)
        yield "launcher", key, f"launcher {_launcher_text(found.launcher, found.now)}"
    if not found.processes:
        name = None if found.newest is None else found.newest.checkpoint.name
        yield "checkpoint", name, f"checkpoint {_checkpoint(found.newest, found.now)}"


# --- many runs ---


def _row(found: RunState) -> tuple[str, ...]:
    present = [one for one in found.processes if not one.is_left_behind]
    # A program that saves nothing here is no chief.
    chief = next((one for one in present if one.beat.role == CHIEF), present[0] if present else None)
    troubled = next((one for one in present if not one.is_well), chief)
    untold = "nothing has run here" if found.is_empty else "no heartbeat"
    beat = None if chief is None else chief.beat
    good = found.newest_good
    return (
        printable(str(found.logdir)),
        untold if troubled is None else _state(troubled),
        "-" if beat is None or beat.step is None else f"{beat.step:,}",
        "-" if beat is None or not beat.total_steps else f"{beat.total_steps:,}",
        "-" if chief is None or chief.state != "alive" or beat is None or not beat.steps_per_sec else _rate(beat),
        "-" if good is None else f"{duration(found.now - good.checkpoint.time)} old",
        "-" if found.steps_at_risk is None else f"{found.steps_at_risk:,}",
        printable((beat.error if beat is not None else None) or found.last_error or ""),
    )


def _state(one: Process) -> str:
    what = "alive, hangs" if one.hangs else one.state
    if one.state == "stopped":
        what = f"stopped: {printable(one.beat.reason or 'unknown')}"
    return what if one.beat.role == CHIEF else f"{printable(one.beat.role)} {what}"


def _rate(beat: Heartbeat) -> str:
    rate = beat.steps_per_sec or 0.0
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


def _state_colour(state: str) -> str | None:
    if state == "stopped: error" or state.startswith("dead") or "hangs" in state:
        return "red"
    return "green" if state.startswith(("alive", "stopped")) else "yellow"


_COLUMNS = (
    Column("RUN", shrink=True),
    Column("STATE", style=_state_colour),
    Column("STEP", align_right=True),
    Column("OF", align_right=True, hide=True),
    Column("RATE", align_right=True, hide=True),
    Column("CHECKPOINT", align_right=True),
    Column("AT RISK", align_right=True),
    Column("LAST ERROR", shrink=True, style=lambda _: "red"),
)


# --- text ---


def _text(found: RunState, width: int | None) -> str:
    """The state as text, wrapped at ``width`` columns; with None, not wrapped."""
    lines: list[_Line] = []
    for one in found.processes:
        lines += _left_behind(one) if one.is_left_behind else _process_lines(one, found)
    lines += _run_lines(found)
    text = [click.style(printable(str(found.logdir)), bold=True)]
    for label, value, colour in lines:
        is_head = not label.startswith(" ")
        head = f"{label:<{_LABEL_WIDTH}}" if len(label) < _LABEL_WIDTH else label + " "
        room = 10_000_000 if width is None else max(20, width - _LABEL_WIDTH)
        wrapped = textwrap.wrap(value, room, break_on_hyphens=False) or [""]
        for number, part in enumerate(wrapped):
            shown = click.style(head, bold=is_head) if number == 0 else " " * _LABEL_WIDTH
            text.append((shown + (part if colour is None else click.style(part, fg=colour))).rstrip())
    return "\n".join(text)


def _process_lines(one: Process, found: RunState) -> list[_Line]:
    beat = one.beat
    colour = "green" if one.is_well else _COLOURS[one.state] if one.state != "stopped" and not one.hangs else "red"
    lines: list[_Line] = [(printable(beat.role), _headline(one), colour)]
    where = f"pid {beat.pid} on {printable(beat.host)}, {printable(beat.engine)}"
    started = duration(found.now - beat.started)
    lines.append(("  process", f"{where}; started {started} ago, last sign of life {duration(one.age_secs)} ago", None))
    if one.is_from_ledger:
        lines.append(("  heartbeat", "none: this is what the ledger tells", "yellow"))
    lines.append(("  step", _progress(one), None))
    is_told = beat.phase != "stopped" or bool(found.steps_at_risk)
    if beat.role == CHIEF and found.steps_at_risk is not None and is_told:
        lines.append(("  at risk", output.counted(found.steps_at_risk, "step"), None))
    if beat.cadence is not None:
        lines.append(("  cadence", _cadence(beat.cadence), None))
    if beat.replay is not None:
        is_fault = beat.replay["outcome"] == "differs"
        lines.append(("  replay", printable(beat.replay["message"]), "yellow" if is_fault else None))
    if beat.save_failures:
        lines.append(("  saving", output.counted(beat.save_failures, "failed save"), "yellow"))
    lines += [("  warning", printable(text), "yellow") for text in beat.warnings[-_WARNINGS_SHOWN:]]
    if beat.error:
        lines.append(("  error", printable(beat.error), "red"))
    if beat.stacks:
        lines.append(("  stacks", printable(beat.stacks), "red"))
    if beat.metrics_url and one.state == "alive":
        lines.append(("  metrics", printable(beat.metrics_url), None))
    return lines


def _left_behind(one: Process) -> list[_Line]:
    text = f"{one.state}, of a start before this one, last sign of life {duration(one.age_secs)} ago"
    return [(printable(one.beat.role), text, "bright_black")]


def _run_lines(found: RunState) -> list[_Line]:
    lines: list[_Line] = [("unreadable", printable(one), "red") for one in found.unreadable]
    if found.is_empty:
        lines.append(("run", "no heartbeat, no ledger and no checkpoint: nothing has run here", "red"))
    elif not found.processes:
        missing = "no heartbeat" if found.has_ledger else "no heartbeat and no ledger"
        lines.append(("run", f"{missing}: no process has told of itself", None))
    newest, good = found.newest, found.newest_good
    lines.append(("checkpoint", _checkpoint(newest, found.now), None if newest is None or newest is good else "yellow"))
    if newest is not None and (good is None or good.checkpoint.name != newest.checkpoint.name):
        lines.append(("  last good", _checkpoint(good, found.now), None))
    if found.mirror is not None:
        is_behind = found.mirror.waiting is not None or found.mirror.error is not None
        lines.append(("mirror", output.mirror(found.mirror), "yellow" if is_behind else None))
    if found.history.attempts:
        lost = found.history.lost_steps
        again = f"; {output.counted(lost, 'step')} done again" if lost else ""
        lines.append(("restarts", f"{found.history.restarts:,}{again}", None))
        lines.append(("time", output.accounted(found.history), None))
    shown = {one.beat.error for one in found.processes if not one.is_left_behind}
    if found.last_error and found.last_error not in shown:
        lines.append(("last error", printable(found.last_error), None))
    if found.launcher is not None and found.launcher.state != "ended":
        colour = "red" if found.launcher.state == "gave up" else None
        lines.append(("launcher", _launcher_text(found.launcher, found.now), colour))
    return lines


def _headline(one: Process) -> str:
    beat = one.beat
    if one.hangs:
        secs = one.age_secs + beat.time - (beat.boundary_time or beat.started)
        return f"alive, and hangs: no step for {duration(secs)}"
    if one.state == "stopped":
        chosen = "" if beat.exit_code is None else f", exit code {beat.exit_code}"
        return f"stopped: {printable(beat.reason or 'unknown')}{chosen}"
    if one.state == "silent":
        return f"silent for {duration(one.age_secs)}, {printable(beat.phase)}"
    return f"{one.state}, {printable(beat.phase)}"


def _cadence(found: dict[str, Any]) -> str:
    secs = found["interval_secs"]
    every = f"{secs:.2g} s" if secs < 10 else duration(secs)
    return (
        f"a checkpoint every {every}, which costs {100 * found['cost']:.2g} % of the time "
        f"({100 * found['overhead']:.2g} % allowed) and writes {output.size(round(found['bytes_per_day']))} a day"
    )


def _progress(one: Process) -> str:
    parts = [_step(one)]
    if one.state == "alive" and one.beat.steps_per_sec is not None:
        parts.append(_rate(one.beat).replace("/", " steps/"))
    if one.secs_left is not None:
        parts.append(f"{duration(one.secs_left)} left")
    return ", ".join(parts)


def _step(one: Process) -> str:
    step, total = one.beat.step, one.beat.total_steps
    if step is None:
        return "unknown"
    if not total:
        return f"{step:,}"
    return f"{step:,} of {total:,} ({100 * step // total} %)"


def _checkpoint(one: ListedCheckpoint | None, now: float) -> str:
    if one is None:
        return "none"
    step = "" if one.checkpoint.step is None else f"step {one.checkpoint.step:,}, "
    age = f"{duration(now - one.checkpoint.time)} old, {output.size(one.size)}"
    state = one.state if one.state == GOOD else f"{one.state} ({printable('; '.join(one.reasons))})"
    return f"{printable(one.checkpoint.name)}, {step}{age}: {state}"


def _launcher_text(one: Launcher, now: float) -> str:
    where = f"pid {one.pid} on {printable(str(one.host))}"
    if one.state == "waiting" and one.next_start is not None:
        return f"{where}: starts it again in {duration(one.next_start - now)}"
    if one.state == "gave up":
        return f"gave up, {printable(str(one.reason))}: {printable(str(one.failure))}"
    return f"{where}: starts it again after a crash" if one.state == "running" else f"{where}: {one.state}"
