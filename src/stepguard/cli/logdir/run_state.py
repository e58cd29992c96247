"""The state of a run for `status`, computed from the heartbeats, ledger and checkpoints in its logdir."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stepguard.cli.logdir.contents import ListedCheckpoint, newest
from stepguard.cli.logdir.launcher_state import Launcher, launcher_of
from stepguard.remote import record
from stepguard.remote.record import MirrorRecord
from stepguard.watching import heartbeat, history, ledger
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.history import History


@dataclass(frozen=True, slots=True)
class Process:
    """One process of the run.

    ``state`` is the result of `heartbeat.state`. ``is_left_behind`` says that the process belongs to an earlier start,
    ``is_from_ledger`` that it has no heartbeat and is known from the ledger only.
    """

    beat: Heartbeat
    state: str
    age_secs: float
    secs_left: float | None
    is_left_behind: bool
    is_from_ledger: bool

    @property
    def hangs(self) -> bool:
        """Whether its hang watch has reported a hang that goes on."""
        return self.state == "alive" and self.beat.stacks is not None

    @property
    def is_well(self) -> bool:
        """Whether it runs, or stopped without an error."""
        if self.state == "stopped":
            return self.beat.reason != "error"
        return self.state == "alive" and not self.hangs


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of a run. A crash now would lose ``steps_at_risk``; None if the step is unknown.

    ``last_error`` is that of the newest start that ended by one, also when the run goes on since. ``unreadable`` says
    what the system could not read, and was passed over.
    """

    logdir: Path
    now: float
    processes: tuple[Process, ...]
    newest: ListedCheckpoint | None
    newest_good: ListedCheckpoint | None
    steps_at_risk: int | None
    history: History
    last_error: str | None
    launcher: Launcher | None
    has_ledger: bool
    unreadable: tuple[str, ...] = ()
    mirror: MirrorRecord | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the logdir has no heartbeat, no ledger and no checkpoint."""
        return not self.processes and not self.has_ledger and self.newest is None

    @property
    def is_well(self) -> bool:
        """Whether all processes of the present start run, or stopped without an error, and no launcher has given up.

        Nothing at all is not well.
        """
        if self.is_empty or self.unreadable:
            return False
        if self.launcher is not None and self.launcher.state == "gave up":
            return False
        return all(one.is_well for one in self.processes if not one.is_left_behind)


def read_run_state(logdir: Path) -> RunState:
    """Read the state of the run in a logdir. Locks and writes nothing. Raises OSError if it cannot be read."""
    now = time.time()
    unreadable: list[str] = []

    def note(path: Path, error: OSError) -> None:
        unreadable.append(f"{path}: could not be read: {error.strerror or error}")

    events = ledger.read(logdir, note)
    beats = heartbeat.read(logdir, note)
    roles = {one.role for one in beats}
    # Heartbeats are not synced: after a power loss the chief's may be empty, and only the ledger tells of it.
    if history.CHIEF not in roles and (told := history.last_seen(events)) is not None:
        beats = [told, *beats]
    events_of: dict[object, list[dict[str, Any]]] = {}
    for event in events:
        events_of.setdefault(event.get("role"), []).append(event)
    beats = [
        history.completed(one, events_of.get(one.role, ()), None if heartbeat.state(one, now) == "alive" else logdir)
        for one in beats
    ]
    last, good = newest(logdir)
    beats = [_saved(one, good, now) if one.role == history.CHIEF else one for one in beats]
    chief = next((one for one in beats if one.role == history.CHIEF), None)
    return RunState(
        logdir=logdir,
        now=now,
        processes=tuple(_process(one, chief, now, is_from_ledger=one.role not in roles) for one in beats),
        newest=last,
        newest_good=good,
        steps_at_risk=0 if _is_rolled_back(events, chief) else _at_risk(chief, good),
        history=history.from_events(events, chief),
        last_error=history.last_error(events),
        launcher=launcher_of(events),
        has_ledger=bool(events),
        unreadable=tuple(unreadable),
        mirror=record.read(logdir),
    )


def _saved(beat: Heartbeat, good: ListedCheckpoint | None, now: float) -> Heartbeat:
    """A chief that was killed had come to the step of its newest checkpoint at least, even if it was killed before it
    could tell of that one.
    """
    saved = None if good is None or good.checkpoint.time < beat.started else good.checkpoint.step
    if saved is None or heartbeat.state(beat, now) != "dead":
        return beat
    return replace(beat, step=max(beat.step or 0, saved))


def document(found: RunState) -> dict[str, Any]:
    """The state as a JSON document."""
    return {
        "logdir": str(found.logdir),
        "time": found.now,
        "well": found.is_well,
        "processes": [_process_document(one) for one in found.processes],
        "checkpoint": _checkpoint_document(found.newest),
        "good_checkpoint": _checkpoint_document(found.newest_good),
        "steps_at_risk": found.steps_at_risk,
        "restarts": found.history.restarts,
        "productive_secs": found.history.productive_secs,
        "replayed_secs": found.history.replayed_secs,
        "down_secs": found.history.down_secs,
        "replayed_steps": found.history.lost_steps,
        "last_error": found.last_error,
        "attempts": [asdict(one) for one in found.history.attempts],
        "unreadable": list(found.unreadable),
        "mirror": None if found.mirror is None else found.mirror.document(),
        "launcher": None if found.launcher is None else asdict(found.launcher),
    }


def _process(beat: Heartbeat, chief: Heartbeat | None, now: float, *, is_from_ledger: bool) -> Process:
    state = heartbeat.state(beat, now)
    is_left_behind = chief is not None and beat is not chief and state != "alive" and beat.time < chief.started
    return Process(beat, state, max(0.0, now - beat.time), _secs_left(beat, state), is_left_behind, is_from_ledger)


def _secs_left(beat: Heartbeat, state: str) -> float | None:
    if state != "alive" or beat.total_steps is None or beat.step is None or not beat.steps_per_sec:
        return None
    return max(0, beat.total_steps - beat.step) / beat.steps_per_sec


def _at_risk(chief: Heartbeat | None, good: ListedCheckpoint | None) -> int | None:
    if chief is None or chief.step is None:
        return None
    saved = [0]
    if good is not None:
        if good.checkpoint.step is None:
            return None
        saved.append(good.checkpoint.step)
    elif chief.last_checkpoint is not None and isinstance(chief.last_checkpoint.get("step"), int):
        # The checkpoints may lie where only the framework can read them.
        saved.append(chief.last_checkpoint["step"])
    return max(0, chief.step - max(saved))


def _is_rolled_back(events: Sequence[Mapping[str, Any]], chief: Heartbeat | None) -> bool:
    """Whether the run was rolled back after its last sign of life: its later steps are given up, not at risk."""
    times = [one["time"] for one in events if one["event"] == "rollback"]
    return chief is not None and bool(times) and times[-1] > chief.time


def _process_document(one: Process) -> dict[str, Any]:
    return {
        **asdict(one.beat),
        "state": one.state,
        "age_secs": one.age_secs,
        "secs_left": one.secs_left,
        "left_behind": one.is_left_behind,
        "from_ledger": one.is_from_ledger,
    }


def _checkpoint_document(one: ListedCheckpoint | None) -> dict[str, Any] | None:
    if one is None:
        return None
    checkpoint = one.checkpoint
    return {
        "name": checkpoint.name,
        "step": checkpoint.step,
        "time": checkpoint.time,
        "bytes": one.size,
        "state": one.state,
    }
