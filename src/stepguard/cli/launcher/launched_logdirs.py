"""The logdirs of a program: what they say about one start of it, such as its progress, its stop, and the cause."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from stepguard.cli.logdir.contents import DAMAGED, newest
from stepguard.watching import heartbeat, history, launcher_link, ledger
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.history import History
from stepguard.watching.ledger import Ledger

_Event = dict[str, Any]


class LaunchedLogdirs:
    """The logdirs that were given or announced, and the launcher's own lines in their ledgers."""

    def __init__(self, given: Path | None, announcements: Path) -> None:
        self._given = given
        self._announcements = announcements
        self._ledgers: dict[Path, Ledger] = {}
        self._best: dict[Path, int | None] = {}
        # All lines so far, for logdirs that become known later.
        self._told: list[tuple[str, _Event]] = []
        if given is not None:
            self.find_announced()
            # Read the state of an announced logdir from its ledger, because the program may have trained already.
            self._best = {logdir: _checkpoint(logdir)[0] for logdir in self._ledgers}

    def find_announced(self) -> None:
        """Take up the logdirs that processes have announced since the last call."""
        found = launcher_link.announced(self._announcements)
        for logdir in found if self._given is None else [self._given.absolute(), *found]:
            # The launcher must not create the logdir: some programs behave differently when it exists.
            if logdir not in self._ledgers and os.path.isdir(logdir):
                self._ledgers[logdir] = Ledger(logdir, role=history.LAUNCHER)
                for event, line in self._told:
                    self._ledgers[logdir].append(event, **line)

    def record(self, event: str, time: float, **fields: Any) -> None:
        """Add a line to every ledger, including those that become known later."""
        line = {"time": round(time, 3), **fields}
        self._told.append((event, line))
        for one in self._ledgers.values():
            one.append(event, **line)

    def has_progressed(self, since: float) -> bool:
        """Whether the start at ``since`` came to a step, or saved a checkpoint, that no start before it had."""
        # A list, not a generator: the best step of every logdir has to be remembered for the next start.
        progressed = [self._has_progressed(logdir, since) for logdir in self._ledgers]
        return any(progressed)

    def last_stop(self, since: float) -> _Event | None:
        """The last `stop` line since then: preferably a chief's, and preferably one with an error."""
        stops = [one for one in self._since(since) if one["event"] == "stop"]
        return max(
            stops,
            key=lambda one: (one.get("role") == history.CHIEF, bool(one.get("error")), one["time"]),
            default=None,
        )

    def cause(self, since: float) -> str | None:
        """The first error of any process since then: later errors, such as a lost peer, follow from it.

        The error of a process that was restarted since, for example by torchrun, did not end the program.
        """
        firsts = [first for logdir in self._ledgers if (first := _first_error(_read(logdir), since)) is not None]
        return min(firsts, key=lambda one: one["time"])["error"] if firsts else None

    def _has_progressed(self, logdir: Path, since: float) -> bool:
        events = [one for one in _read(logdir) if one.get("role") != history.LAUNCHER]
        began = [one for one in events if one["time"] >= since]
        starts = [one for one in began if one["event"] in ("restore", "fresh")]
        saved = [one.get("step") for one in began if one["event"] == "checkpoint"]
        before = _highest(
            self._best.get(logdir),
            *(one.get("step") for one in events if one["time"] < since),
            *(one.get(name) for one in starts for name in ("step", "previous_step")),
        )
        # As the next start will see it: `previous_step` is what the trace knows too.
        ended = [history.completed(one, events, logdir) for one in _beats(logdir)]
        beats = [one.step for one in ended if one.time >= since]
        newest_step, newest_time = _checkpoint(logdir)
        after = _highest(*(one.get("step") for one in began), *beats, newest_step)
        self._best[logdir] = _highest(before, after)
        if before is None:
            # No session was opened before, or the program counts no steps.
            return newest_time >= since
        if _is_beyond(after, before):
            return True
        # After damage a run resumes from an older step than before, and makes progress below its best step.
        return _is_beyond(_highest(*saved), _highest(*(one.get("step") for one in starts)))

    def histories(self, since: float) -> list[tuple[Path, History]]:
        """The history since then of every logdir that has lines of a chief."""
        found = []
        for logdir in self._ledgers:
            chief = next((one for one in _beats(logdir) if one.role == history.CHIEF), None)
            became = history.from_events([one for one in _read(logdir) if one["time"] >= since], chief)
            if became.attempts:
                found.append((logdir, became))
        return found

    def _since(self, since: float) -> list[_Event]:
        return [event for logdir in self._ledgers for event in _read(logdir) if event["time"] >= since]


# A logdir that cannot be read must not stop the launcher from restarting its program.


def _read(logdir: Path) -> list[_Event]:
    with contextlib.suppress(OSError):
        return ledger.read(logdir)
    return []


def _first_error(events: list[_Event], since: float) -> _Event | None:
    """The first stop by an error, in the order of the lines: the clocks of several hosts may differ.

    An error after a stop request does not count: a launcher of several processes ends the others when one has died,
    and with them the workers of their loaders.
    """
    failed: dict[object, _Event] = {}
    for one in events:
        if one["time"] < since:
            continue
        if one["event"] == "start":
            failed.pop(one.get("role"), None)
        elif one["event"] == "stop" and isinstance(one.get("error"), str) and one["error"] and not one.get("request"):
            failed.setdefault(one.get("role"), one)
    return next(iter(failed.values()), None)


def _beats(logdir: Path) -> list[Heartbeat]:
    with contextlib.suppress(OSError):
        return heartbeat.read(logdir)
    return []


def _checkpoint(logdir: Path) -> tuple[int | None, float]:
    """Step and time of the newest checkpoint that is not damaged; ``(None, 0.0)`` if there is none."""
    with contextlib.suppress(OSError):
        for found in newest(logdir):
            if found is not None and found.state != DAMAGED:
                return found.checkpoint.step, found.checkpoint.time
    return None, 0.0


def _highest(*steps: object) -> int | None:
    return max((one for one in steps if isinstance(one, int)), default=None)


def _is_beyond(after: int | None, before: int | None) -> bool:
    return after is not None and (before is None or after > before)
