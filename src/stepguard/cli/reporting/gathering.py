"""What a report tells of a run, gathered from its logdir. Nothing is locked, written, or kept of what may be endless.

The ledger is read once, line by line: what is kept of it has a bound, whatever its length. Only the starts of the run
are all kept.
"""

from __future__ import annotations

import fnmatch
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from stepguard.cli.logdir import story
from stepguard.cli.logdir.contents import LogdirContents, list_contents
from stepguard.cli.logdir.event_files import Curve, event_files, read_curves
from stepguard.cli.logdir.run_state import RunState, read_run_state
from stepguard.cli.logdir.standings import marks_of, standings, why_kept
from stepguard.cli.logdir.story import Entry
from stepguard.cli.reporting.thinning import Sample
from stepguard.cli.text import output
from stepguard.remote.record import MirrorRecord
from stepguard.watching import history, ledger, trace
from stepguard.watching.history import CHIEF, History
from stepguard.watching.redaction import without_secrets

MOST_CURVES = 24
"""How many curves are drawn; others are named."""

_MOST_POINTS = 2000
_MOST_ENTRIES = 300
_MOST_VERDICTS = 100
_MOST_MARKS = 200
_EVENT_POINTS = 40_000
_MOVES = frozenset({"fresh", "restore", "checkpoint", "return", "stop"})

_Event = Mapping[str, Any]


class Point(NamedTuple):
    """The step at which the run was at a time (Unix seconds)."""

    time: float
    step: int


class Save(NamedTuple):
    """One commit: its time (Unix seconds), what it took, for how long training waited, in seconds, and its bytes."""

    time: float
    step: int | None
    secs: float
    stall_secs: float
    bytes: int


class Mark(NamedTuple):
    """Something that happened to the run at a step, as far as the step is known: a hang, a return of the NaN guard."""

    time: float
    step: int
    text: str


@dataclass(slots=True)
class Costs:
    """What all saves of the run have cost together, and some of them. ``sent`` is what went to the mirror."""

    bytes: int = 0
    secs: float = 0.0
    stall_secs: float = 0.0
    longest_secs: float = 0.0
    longest_stall_secs: float = 0.0
    saves: Sample[Save] = field(default_factory=lambda: Sample(_MOST_POINTS))
    sent_bytes: int = 0
    sent_secs: float = 0.0
    sent: int = 0

    def add(self, one: Save) -> None:
        """Add one commit."""
        self.bytes += one.bytes
        self.secs += one.secs
        self.stall_secs += one.stall_secs
        self.longest_secs = max(self.longest_secs, one.secs)
        self.longest_stall_secs = max(self.longest_stall_secs, one.stall_secs)
        self.saves.add(one)


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """One checkpoint, in the logdir or, with the state "mirrored", only in the mirror. ``kept`` says why it stays."""

    name: str
    step: int | None
    time: float
    state: str
    bytes: int
    metrics: Mapping[str, float]
    kept: str
    is_best: bool
    is_next: bool
    reasons: tuple[str, ...]


@dataclass(slots=True)
class LedgerFacts:
    """What the ledger tells: of starts all, of the rest what has room. ``history`` is that of the chief."""

    history: History | None = None
    start: _Event = field(default_factory=dict)
    costs: Costs = field(default_factory=Costs)
    points: Sample[Point] = field(default_factory=lambda: Sample(_MOST_POINTS))
    marks: deque[Mark] = field(default_factory=lambda: deque(maxlen=_MOST_MARKS))
    verdicts: deque[_Event] = field(default_factory=lambda: deque(maxlen=_MOST_VERDICTS))
    outcomes: Counter[str] = field(default_factory=Counter)
    entries: deque[Entry] = field(default_factory=lambda: deque(maxlen=_MOST_ENTRIES))
    entries_told: int = 0
    troubles: int = 0
    _step: int = 0

    def take(self, event: _Event) -> None:
        """Take one event, of any process."""
        kind, time, step = event["event"], float(event["time"]), event.get("step")
        if event.get("role") == CHIEF:
            # A `replay` tells of steps before.
            for came_to in (step, event.get("to_step")) if kind in _MOVES else ():
                if isinstance(came_to, int):
                    self._step = came_to
                    self.points.add(Point(time, came_to))
            if kind == "start":
                self.start = event
            elif kind == "checkpoint":
                secs, stall_secs = (max(0.0, event.get(name) or 0.0) for name in ("secs", "stall_secs"))
                self.costs.add(Save(time, step, secs, stall_secs, max(0, event.get("bytes") or 0)))
            elif kind == "mirrored":
                self.costs.sent += 1
                self.costs.sent_bytes += max(0, event.get("bytes") or 0)
                self.costs.sent_secs += max(0.0, event.get("secs") or 0.0)
        if kind in ("hang", "return"):
            self.marks.extend(Mark(one.time, self._step, one.text) for one in story.told([event]))
        elif kind == "replay":
            self.verdicts.append(event)
            self.outcomes[str(event.get("outcome"))] += 1

    def tell(self, entry: Entry) -> None:
        """Keep one entry of the story, unless it is a save: their numbers tell more."""
        if story.SAVES.isdisjoint(event["event"] for event in entry.events):
            self.entries.append(entry)
            self.entries_told += 1
            self.troubles += entry.is_trouble


@dataclass(frozen=True, slots=True)
class RunFacts:
    """All that a report tells of a run. ``left_out`` names curves for which there is no room.

    ``curves_of`` says where the curves are from: "event files" or "the trace".
    """

    logdir: Path
    state: RunState
    told: LedgerFacts
    history: History
    contents: LogdirContents
    checkpoints: tuple[CheckpointRow, ...]
    curves: tuple[Curve, ...]
    curves_of: str
    left_out: tuple[str, ...]
    hyperparameters: Mapping[str, float]
    unreadable: tuple[str, ...]

    @property
    def is_running(self) -> bool:
        """Whether the newest start has not ended, as far as can be seen from here."""
        return any(one.beat.role == CHIEF and one.state in ("alive", "silent") for one in self.state.processes)

    def end_of(self, number: int) -> str:
        """How the attempt of that number, from 0, has ended, as text."""
        one = self.history.attempts[number]
        if one.reason is not None:
            return story.STOPS.get(one.reason, f"stopped: {one.reason}") + (f": {one.error}" if one.error else "")
        is_last = number == len(self.history.attempts) - 1
        return "runs" if is_last and self.is_running else "ended without a word"

    @property
    def is_empty(self) -> bool:
        """Whether nothing has run there."""
        return self.state.is_empty and not self.told.entries and not self.checkpoints


def gather(logdir: Path, tags: Sequence[str] = ()) -> RunFacts:
    """Gather what there is in a logdir; of the curves those that match one of ``tags``, if there are any.

    Raises:
        OSError: the logdir cannot be read.
        CommandError: there are event files, and no tensorboard package to read them.
    """
    unreadable: list[str] = []

    def note(path: Path, error: OSError) -> None:
        unreadable.append(f"{path}: could not be read: {error.strerror or error}")

    state = read_run_state(logdir)
    told = LedgerFacts()
    chief = next((one.beat for one in state.processes if one.beat.role == CHIEF), None)
    whole = history.from_events(_told_on(ledger.read_whole(logdir, note), told), chief)
    contents = list_contents(logdir)
    recorded = trace.read(logdir, CHIEF, note)
    curves, curves_of, reasons = _curves(logdir, recorded, tags)
    curves.sort(key=lambda one: ("loss" not in one.tag.lower(), one.tag))
    unreadable += [*state.unreadable, *contents.unreadable, *reasons]
    return RunFacts(
        logdir=logdir,
        state=state,
        told=told,
        history=whole,
        contents=contents,
        checkpoints=tuple(_rows(contents, state.mirror)),
        curves=tuple(curves[:MOST_CURVES]),
        curves_of=curves_of,
        left_out=tuple(one.tag for one in curves[MOST_CURVES:]),
        hyperparameters=_hyperparameters(recorded),
        unreadable=tuple(dict.fromkeys(unreadable)),
    )


def _told_on(events: Iterable[_Event], told: LedgerFacts) -> Iterator[_Event]:
    """The events as they come, which are taken, and told as a story, on their way."""
    passing: list[_Event] = []

    def taken() -> Iterator[_Event]:
        for event in events:
            if isinstance(event.get("argv"), list):
                # Once more: a page is passed on, and a ledger may be of a version that knew fewer secrets.
                event = {**event, "argv": without_secrets(event["argv"])}
            told.take(event)
            passing.append(event)
            yield event

    # Without folds, so that the story has an entry for each event, and nothing waits for the end of a row.
    for entry in story.told(taken(), folds=False):
        told.tell(entry)
        yield from passing
        passing.clear()


def _rows(contents: LogdirContents, mirror: MirrorRecord | None) -> Iterator[CheckpointRow]:
    known = standings(contents.found)
    for one in contents.found:
        checkpoint, marks, standing = one.checkpoint, marks_of(one), known[one.basename]
        yield CheckpointRow(
            checkpoint.name,
            checkpoint.step,
            checkpoint.time,
            one.state,
            one.size,
            marks.metrics,
            why_kept(one, standing),
            checkpoint.name in standing.best,
            one.is_next,
            one.reasons,
        )
    here = {one.checkpoint.name for one in contents.found}
    for copy in () if mirror is None else mirror.checkpoints:
        if copy.name not in here:
            yield CheckpointRow(
                copy.name, copy.step, copy.time, "mirrored", copy.bytes, {}, "", False, False, ("only in the mirror",)
            )


def _curves(
    logdir: Path, recorded: Sequence[trace.Item], tags: Sequence[str]
) -> tuple[list[Curve], str, tuple[str, ...]]:
    """The curves of the event files or, where there are none, the numbers of the trace; and what was unreadable."""
    found = event_files(logdir)
    if not found.paths:
        return _curves_of(recorded, tags), "the trace", found.unreadable
    curves, lost = read_curves(found.paths, tags, most_points=_EVENT_POINTS, extra="report")
    told = [f"{logdir}: {output.counted(lost, 'record')} of its event files cannot be read"] if lost else []
    return curves, "event files", (*found.unreadable, *told)


def _curves_of(recorded: Sequence[trace.Item], tags: Sequence[str]) -> list[Curve]:
    found: dict[str, list[tuple[int, float]]] = {}
    for (step, _, _), one in trace.steps(recorded).items():
        for name, values in one.numbers.items():
            if not tags or any(fnmatch.fnmatchcase(name, pattern) for pattern in tags):
                found.setdefault(name, []).append((step, values[-1]))
    return [
        Curve(name, tuple(step for step, _ in points), (0.0,) * len(points), tuple(value for _, value in points))
        for name, points in found.items()
    ]


def _hyperparameters(recorded: Sequence[trace.Item]) -> dict[str, float]:
    """The newest of those that the trace has."""
    found: dict[str, float] = {}
    for one in recorded:
        if isinstance(one, trace.Record) and one.kind == "settings":
            found.update(one.values)
    return found
