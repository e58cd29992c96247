"""The record of one process of a run: its current state, and the lines that it adds to the ledger."""

from __future__ import annotations

import contextlib
import math
import platform
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepguard import __version__
from stepguard.errors import described
from stepguard.store import Recovery
from stepguard.watching import heartbeat, history, launcher_link, ledger
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.ledger import Ledger
from stepguard.watching.metrics import Totals
from stepguard.watching.outcome import Outcome
from stepguard.words import logger

_log = logger(__name__)

_WARNINGS_KEPT = 5
_SAVES_KEPT = 10


@dataclass(frozen=True, slots=True)
class Room:
    """Where a process of a run writes its ledger and its heartbeat. If ``logdir`` is ``None``, it writes neither."""

    logdir: Path | None
    is_chief: bool

    def make(self) -> None:
        """Make the directory of heartbeats if this process is the chief."""
        if self.logdir is None or not self.is_chief:
            return
        try:
            heartbeat.prepare(self.logdir)
        except OSError as error:
            # The first checkpoint will try again, and report the same error.
            _log.debug("%s: no place for heartbeats: %s", self.logdir, error)

    def is_open(self) -> bool:
        """Whether this process may write: a worker writes only where its chief has made the directory."""
        return self.logdir is not None and (self.is_chief or (self.logdir / heartbeat.DIR_NAME).is_dir())


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run has ended.

    Args:
        reason: ``finished``, one of `stops.REQUESTS`, ``exit`` or ``error``.
        error: the error that ended the run.
        request: the stop request before ``error``, if there was one. The request may be the cause: SIGTERM to all
            processes of a job also ends the workers of a data loader.
        exit_code: the exit code that the program has chosen for this ending.
    """

    reason: str
    error: BaseException | None = None
    request: str | None = None
    exit_code: int | None = None


class RunRecord:
    """The state of one process of a run since its start, and its lines in the ledger.

    ``now`` is the content of its heartbeat, ``totals`` the sums for its metrics. Any thread.
    """

    def __init__(self, now: Heartbeat, room: Room) -> None:
        self.now = now
        self.totals = Totals()
        self._room = room
        self._ledger = None if room.logdir is None else Ledger(room.logdir, role=now.role)
        # The `start` line, as long as the chief has not made the directory yet. One thread takes it out.
        self._start: deque[dict[str, Any]] = deque(maxlen=1)
        # The last heartbeat of the previous start.
        self._previous: Heartbeat | None = None
        # The events of the ledger up to the start of this process.
        self._before: list[dict[str, Any]] = []
        # How long the last saves have taken, with the time that training waited.
        self._save_secs: deque[float] = deque(maxlen=_SAVES_KEPT)

    @property
    def longest_save_secs(self) -> float | None:
        """The longest of the last saves of this run and those before it, in seconds; ``None`` if there is none."""
        return max(list(self._save_secs), default=None)

    @property
    def logdir(self) -> Path | None:
        """The directory of the ledger, if there is one."""
        return self._room.logdir

    @property
    def may_write(self) -> bool:
        """Whether this process may write into the logdir: a worker only where its chief has begun."""
        return self._room.is_open()

    def begin(self, options: Mapping[str, Any]) -> None:
        """Read the records of the previous run, and add a `start` line. Before a session is prepared.

        ``options`` are those of `configuration.told`.
        """
        if self._room.logdir is not None:
            self._read_the_run_before(self._room.logdir)
        self.append(
            "start",
            # No fsync, which would delay the program and its workers. The fsync of the next durable line covers it.
            durable=False,
            engine=self.now.engine,
            argv=list(sys.orig_argv),
            options=options,
            version=__version__,
            python=platform.python_version(),
            framework_version=_version_of(self.now.engine),
            restarts=self.now.restarts,
            process_start=self.now.process_start,
            attempt=launcher_link.attempt(),
        )

    def _read_the_run_before(self, logdir: Path) -> None:
        """Read the previous run's ledger and heartbeat. Unreadable ones cause a warning, never a failure."""
        now = self.now
        try:
            events = ledger.read(logdir)
            last = heartbeat.read_one(logdir, now.role) or history.last_seen(events, now.role)
            if self._room.is_chief:
                heartbeat.forget_the_gone(logdir, now.role)
        except OSError as error:
            _log.warning("%s: what the run before says of itself cannot be read: %s", logdir, error)
            return
        self._previous = None if last is None else history.completed(last, events, logdir)
        mine = {"event": "start", "time": now.started, "pid": now.pid, "host": now.host}
        self._before = [*events, {**mine, "role": now.role}]
        now.restarts = history.from_events(self._before, role=now.role).restarts
        self._save_secs.extend(_save_secs(one) for one in events if one["event"] == "checkpoint")

    def trains(self, recovery: Recovery | None) -> None:
        """Note that the session can run. ``recovery`` is ``None`` in a process that did not search for a checkpoint."""
        now, previous = self.now, self._previous
        checkpoint = None if recovery is None else recovery.checkpoint
        before = {
            "previous_step": None if previous is None else previous.step,
            "previous_time": None if previous is None else previous.time,
        }
        if recovery is None and not self._room.is_chief:
            # A worker uses the state that its chief has restored.
            return
        if recovery is None or checkpoint is None:
            so_far = self._so_far("fresh", step=now.step, **before)
            self.append("fresh", durable=False, step=now.step, **before, so_far=so_far)
            return
        if recovery.rolled_back:
            self.append("rollback", checkpoint=checkpoint.name, step=now.step, previous_step=before["previous_step"])
        lost = None
        if previous is not None and previous.step is not None and now.step is not None:
            lost = max(0, previous.step - now.step)
        committed_at = checkpoint.time if checkpoint.manifest is None else checkpoint.manifest.time
        now.last_checkpoint = {
            "time": committed_at,
            "name": checkpoint.name,
            "step": checkpoint.step,
            "bytes": None if checkpoint.manifest is None else checkpoint.manifest.size,
            "secs": None,
            "stall_secs": None,
        }
        restored = {"checkpoint": checkpoint.name, "checkpoint_time": committed_at, "lost_steps": lost}
        so_far = self._so_far("restore", step=now.step, **before, **restored)
        self.append(
            "restore",
            durable=False,
            step=now.step,
            checkpoint=checkpoint.name,
            checkpoint_time=committed_at,
            **before,
            lost_steps=lost,
            so_far=so_far,
            damaged=[
                {"name": one.checkpoint.name, "reason": one.reason, "moved_to": one.moved_to}
                for one in recovery.damaged
            ],
        )
        # If checkpoints were damaged, a warning has already said what was lost.
        if lost and not recovery.damaged and not recovery.rolled_back:
            _log.warning("the run before had come to step %d: %d steps are done again", (now.step or 0) + lost, lost)
        if message := recovery.message():
            self.note_warning(message)

    def _so_far(self, event: str, **fields: Any) -> dict[str, float]:
        """What the time before this start adds up to, for ``event``, by which it begins to train."""
        now = self.now
        before, self._before = self._before, []
        mine = {"event": event, "time": time.time(), "pid": now.pid, "host": now.host, "role": now.role}
        return history.totals([*before, {**mine, **fields}], role=now.role)

    def checkpointed(self, name: str, step: int | None, nbytes: int, secs: float, stall_secs: float) -> None:
        """Note a commit: the checkpoint's size, the seconds to write it, and those that training waited."""
        self.totals.checkpoints += 1
        self.totals.write_secs += secs
        self.totals.written_bytes += nbytes
        self.totals.stall_secs += stall_secs
        self._save_secs.append(secs + stall_secs)
        fields = {
            "name": name,
            "step": step,
            "bytes": nbytes,
            "secs": round(secs, 3),
            "stall_secs": round(stall_secs, 4),
        }
        self.now.last_checkpoint = {"time": time.time(), **fields}
        self.append("checkpoint", **fields)

    def warn(self, message: str) -> None:
        """Keep a warning for the user, which was already logged."""
        self.note_warning(message)
        self.append("warning", message=message)

    def note_warning(self, message: str) -> None:
        """Add a warning to the heartbeat only: the ledger has another kind of line for it."""
        self.now.warnings = [*self.now.warnings, message][-_WARNINGS_KEPT:]

    def replayed(self, outcome: Outcome) -> None:
        """Note what the comparison of steps that were done again has found."""
        self.now.replay = outcome.document()
        self.append("replay", **outcome.document())

    def append(self, event: str, **fields: Any) -> None:
        """Add a line to the ledger, if there is one. A `start` line that had to wait is added first."""
        if self._ledger is None:
            return
        if not self._room.is_open():
            # A worker may start before its chief: keep its `start` line for later.
            if event == "start":
                self._start.append({"time": round(time.time(), 3), **fields})
            return
        self.add_start()
        self._ledger.append(event, **fields)

    def add_start(self) -> None:
        """Add the `start` line if it had to wait, and may be written now: a worker that is killed adds no other."""
        if self._ledger is not None and self._start and self._room.is_open():
            with contextlib.suppress(IndexError):
                self._ledger.append("start", **self._start.pop())

    def stop(self, ending: Ending) -> None:
        """Note that the run has stopped, and add the `stop` line."""
        now = self.now
        now.phase, now.reason, now.exit_code = "stopped", ending.reason, ending.exit_code
        if ending.error is not None:
            now.error = describe(ending.error)
        self.append(
            "stop",
            reason=ending.reason,
            step=now.step,
            error=now.error,
            request=ending.request,
            exit_code=ending.exit_code,
        )


def _version_of(engine: str) -> str | None:
    """The version of the framework that an engine is named after, if the program has imported it."""
    version = getattr(sys.modules.get(engine), "__version__", None)
    return None if version is None else str(version)


def _save_secs(checkpoint: dict[str, Any]) -> float:
    """The seconds that a save has taken, by its line in the ledger, which may lack or garble them."""
    secs = [checkpoint.get(name) for name in ("secs", "stall_secs")]
    return sum(one for one in secs if isinstance(one, (int, float)) and math.isfinite(one) and one > 0)


def describe(error: BaseException) -> str:
    """The type and the first line of an error."""
    return described(error).split("\n", 1)[0][:500]
