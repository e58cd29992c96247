"""What a run says of itself while it lasts: heartbeat, ledger, progress line, metrics, hang watch."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from stepguard import __version__
from stepguard.engine import Engine
from stepguard.errors import described
from stepguard.options import Watching
from stepguard.store import Recovery
from stepguard.watching import heartbeat, history, launcher_link, ledger
from stepguard.watching.hang_watch import HangWatch
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.ledger import Ledger
from stepguard.watching.metrics import MetricsServer, Totals
from stepguard.watching.progress_line import ProgressLine

_log = logging.getLogger(__name__)

# So often is looked whether steps were done.
_LOOK_SECS = 1.0
# Over so long is the step rate measured.
_RATE_SECS = 30.0
_WARNINGS_KEPT = 5
# So long, at most, are the last lines waited for.
_FAREWELL_SECS = 2.0


class Observer:
    """Watches one process of a run, from a thread of its own that looks at the step counter once a second.

    Threads: :meth:`begin`, :meth:`session_ready` and :meth:`end` by whoever opens and stops the session;
    :meth:`checkpointed`, :meth:`save_failed` and :meth:`warn` by any.

    Args:
        engine: tells how many steps were done.
        logdir: where the ledger and the heartbeats go; ``None`` writes neither.
        is_chief: whether this process may create them; a worker adds to those of its chief only.
        options: what else is wanted.

    Raises:
        ValueError: hangs are to be watched for, and there is no place for the stacks.
    """

    def __init__(self, engine: Engine[Any], *, logdir: str | None, is_chief: bool, options: Watching) -> None:
        if options.hang_secs is not None and (logdir is None or "://" in logdir):
            raise ValueError(
                f"hang_secs needs a logdir on this machine, for the stacks: expected a path, found {logdir!r}"
            )
        self._engine = engine
        self._options = options
        # A plain int: the heartbeat is JSON, which knows no number of NumPy.
        self._total_steps = None if options.total_steps is None else int(options.total_steps)
        # A place that only the framework can reach has neither.
        self._place = None if logdir is None or "://" in logdir else logdir
        self._logdir: Path | None = None
        self._is_chief = is_chief
        self._ledger: Ledger | None = None
        self._start: dict[str, Any] | None = None
        self._role = ""
        self._is_passing = False
        self._previous: Heartbeat | None = None
        self._session: Any = None
        self._progress_seen: object = None
        self._rates: deque[tuple[float, int]] = deque()
        self._hang: HangWatch | None = None
        self._metrics: MetricsServer | None = None
        self._line: ProgressLine | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._reason = "finished"
        self._error: BaseException | None = None
        self._writing = threading.Lock()
        self._heartbeat_failed = False
        self.totals = Totals()
        self.now = Heartbeat("", engine=engine.name)

    # --- the life of the run ---

    def begin(self, role: str, *, is_passing: bool = False) -> None:
        """A session is going to be prepared by this process as ``role``. The second call in a row does nothing.

        ``is_passing`` is an evaluator, say: it looks into the logdir of a chief, and its heartbeat ends with it.

        Raises:
            ModuleNotFoundError, OSError: the metrics cannot be served.
        """
        if self._thread is not None:
            return
        self._role = role
        self._is_passing = is_passing
        # Relative to where the program is now, as its checkpoints are; from here on it stays.
        self._logdir = None if self._place is None else Path(self._place).absolute()
        self._progress_seen = None
        self._rates.clear()
        self.now = Heartbeat(self._role, engine=self._engine.name, total_steps=self._total_steps)
        self.totals = Totals()
        # One port of a host is for one process: a worker serves only what it can choose itself.
        if self._options.metrics_port is not None and (self._is_chief or not self._options.metrics_port):
            self._metrics = MetricsServer(
                self.now, self.totals, host=self._options.metrics_host, port=self._options.metrics_port
            )
            self.now.metrics_url = self._metrics.url
            _log.info("metrics are served at %s", self._metrics.url)
        if self._logdir is not None:
            self._make_room(self._logdir)
            launcher_link.announce(self._logdir)
            self._ledger = Ledger(self._logdir, role=role)
            self._read_the_run_before(self._logdir)
        self._append(
            "start",
            # A sync would keep the program, and those who wait for this one, waiting. The next line brings it.
            durable=False,
            engine=self._engine.name,
            argv=list(sys.orig_argv),
            version=__version__,
            restarts=self.now.restarts,
            process_start=self.now.process_start,
            attempt=launcher_link.attempt(),
        )
        self._ended = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._watch, args=(self._ended,), name="stepguard-observer", daemon=True)
        self._thread.start()

    def session_ready(self, session: Any, step: int | None, recovery: Recovery | None) -> None:
        """The session can run, from ``step`` on if that is known. ``recovery`` is what was found to restore; ``None``
        in one who looks for nothing. Quick: the program waits, and others train already.
        """
        if self._thread is None:
            return
        now = self.now
        now.first_step = now.step = step
        now.boundary_time = time.time()
        if step is not None:
            self._measure(step)
        self._record_start(recovery)
        if self._options.hang_secs is not None and self._logdir is not None:
            self._hang = HangWatch(
                self._options.hang_secs,
                ends_process=self._options.end_on_hang,
                logdir=self._logdir,
                role=self._role,
                ledger=self._logdir / ledger.FILE_NAME,
                head={"event": "hang", "time": 0, "pid": now.pid, "host": now.host, "role": self._role},
            )
            self._hang.start()
        if self._options.progress:
            self._line = ProgressLine(now)
        now.phase = "training"
        # Last: from now on the observer's thread uses all of the above.
        self._session = session

    def end(self, reason: str, error: BaseException | None = None, *, within_secs: float = _FAREWELL_SECS) -> None:
        """The run has stopped: ``finished``, ``sigterm``, ``interrupt``, ``exit`` or ``error``."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._reason, self._error = reason, error
        self._ended.set()
        # It writes the last lines, and may have to wait for a disk that hangs: a run does not.
        thread.join(within_secs)
        if thread.is_alive():
            _log.warning("%s: ledger and heartbeat could not be ended in %.1f s", self._logdir, within_secs)
        self._close_views()

    def _take_leave(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._look(session)
        line, self._line = self._line, None
        if line is not None:
            line.close()
        now, reason = self.now, self._reason
        now.phase, now.reason = "stopped", reason
        now.metrics_url = None
        if self._error is not None:
            now.error, self._error = describe(self._error), None
        self._append("stop", reason=reason, step=now.step, error=now.error)
        self._beat()
        if self._is_passing and self._logdir is not None:
            # The chief speaks for the run; where there is none, this one does, until the next comes.
            with contextlib.suppress(OSError):
                if heartbeat.read_one(self._logdir, history.CHIEF) is not None:
                    heartbeat.forget(self._logdir, self._role)

    def _close_views(self) -> None:
        hang, metrics = self._hang, self._metrics
        self._hang = self._metrics = None
        for close in (hang and hang.finish, metrics and metrics.close):
            try:
                if close:
                    close()
            except Exception as error:  # noqa: BLE001 - a run that has ended well does not fail for how it was watched
                _log.warning("%s", describe(error))

    def stopping(self) -> None:
        """The loop is over: what follows has no step boundaries, and is no hang."""
        if self._thread is not None:
            self.now.phase = "stopping"

    # --- what happens meanwhile ---

    def checkpointed(self, name: str, step: int | None, nbytes: int, secs: float, stall_secs: float) -> None:
        """A checkpoint was committed: its size, how long that took, and how long training waited for the snapshot."""
        self.totals.checkpoints += 1
        self.totals.write_secs += secs
        self.totals.written_bytes += nbytes
        self.totals.stall_secs += stall_secs
        fields = {
            "name": name,
            "step": step,
            "bytes": nbytes,
            "secs": round(secs, 3),
            "stall_secs": round(stall_secs, 4),
        }
        self.now.last_checkpoint = {"time": time.time(), **fields}
        self._append("checkpoint", **fields)

    def save_failed(self, message: str) -> None:
        """A try to save has failed; it is tried again."""
        self.now.save_failures += 1
        self.warn(message)

    def warn(self, message: str) -> None:
        """Something that the user should know has happened; it was logged already."""
        self.now.warnings = [*self.now.warnings, message][-_WARNINGS_KEPT:]
        self._append("warning", message=message)

    def returned(self, *, step: int | None, to_step: int | None, reason: str, number: int, message: str) -> None:
        """The run went back from ``step`` to ``to_step``, the ``number``-th time; ``message`` was logged already."""
        self._append("return", step=step, to_step=to_step, reason=reason, number=number)
        self.warn(message)

    # --- inside ---

    def _make_room(self, logdir: Path) -> None:
        if not self._is_chief:
            return
        try:
            heartbeat.prepare(logdir)
        except OSError as error:
            # The first checkpoint will say the same, and try again.
            _log.debug("%s: no place for heartbeats: %s", logdir, error)

    def _read_the_run_before(self, logdir: Path) -> None:
        """A run never fails for what an earlier one has left to be read here."""
        self._previous = None
        try:
            events = ledger.read(logdir)
            last = heartbeat.read_one(logdir, self._role) or history.last_seen(events, self._role)
            if self._is_chief:
                heartbeat.forget_the_gone(logdir, self._role)
        except OSError as error:
            _log.warning("%s: what the run before says of itself cannot be read: %s", logdir, error)
            return
        self._previous = None if last is None else history.completed(last, events)
        mine = {"event": "start", "time": self.now.started, "pid": self.now.pid, "host": self.now.host}
        self.now.restarts = history.of([*events, {**mine, "role": self._role}], role=self._role).restarts

    def _record_start(self, recovery: Recovery | None) -> None:
        now = self.now
        checkpoint = None if recovery is None else recovery.checkpoint
        previous = self._previous
        before = {
            "previous_step": None if previous is None else previous.step,
            "previous_time": None if previous is None else previous.time,
        }
        if recovery is None and not self._is_chief:
            # A worker takes what its chief has restored.
            return
        if recovery is None or checkpoint is None:
            self._append("fresh", durable=False, step=now.step, **before)
            return
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
        self._append(
            "restore",
            durable=False,
            step=now.step,
            checkpoint=checkpoint.name,
            checkpoint_time=committed_at,
            **before,
            lost_steps=lost,
            damaged=[
                {"name": one.checkpoint.name, "reason": one.reason, "moved_to": one.moved_to}
                for one in recovery.damaged
            ],
        )
        # What was damaged has been said already, with what it costs.
        if lost and not recovery.damaged:
            _log.warning("the run before had come to step %d: %d steps are done again", (now.step or 0) + lost, lost)
        if message := recovery.message():
            self.now.warnings = [*self.now.warnings, message][-_WARNINGS_KEPT:]

    def _watch(self, ended: threading.Event) -> None:
        next_beat = time.monotonic()
        while not ended.wait(
            _LOOK_SECS if self._options.hang_secs is None else min(_LOOK_SECS, self._options.hang_secs / 4)
        ):
            session = self._session
            if session is not None:
                self._look(session)
                self._watch_hang()
                if self._line is not None:
                    self._line.show()
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + heartbeat.INTERVAL_SECS
                self._beat()
        self._take_leave()

    def _look(self, session: Any) -> None:
        """How far the session is now."""
        try:
            progress = self._engine.progress(session)
            has_moved = progress != self._progress_seen
            if has_moved or self.now.step is None:
                self.now.step = self._engine.step(session)
                if self.now.first_step is None:
                    self.now.first_step = self.now.step
                self.now.boundary_time = time.time()
                self._progress_seen = progress
            if self._total_steps is None:
                self.now.total_steps = self._engine.total_steps(session)
        except Exception as error:  # noqa: BLE001 - the session may be closed, or its peer gone: whoever trains is told
            _log.debug("the step could not be read: %s", error)
            return
        if has_moved and self._hang is not None:
            self._hang.beat()
        if self.now.step is not None:
            self._measure(self.now.step)

    def _measure(self, step: int) -> None:
        now = time.monotonic()
        if self._rates and step < self._rates[-1][1]:
            # The run went back: what was before tells nothing of its speed.
            self._rates.clear()
        self._rates.append((now, step))
        while len(self._rates) > 2 and self._rates[0][0] < now - _RATE_SECS:
            self._rates.popleft()
        began, first = self._rates[0]
        if now > began:
            self.now.steps_per_sec = max(0.0, (step - first) / (now - began))

    def _watch_hang(self) -> None:
        hang = self._hang
        if hang is None:
            return
        if self.now.phase != "training" or self._has_come_to_the_end():
            # What comes after the last step is none; saving it, or waiting for threads, has limits of its own.
            hang.beat()
        elif hang.reported() and self.now.stacks is None:
            self.now.stacks = os.fspath(hang.stacks)
            _log.warning(
                "no step boundary for %g s: the stacks of all threads are in %s", self._options.hang_secs, hang.stacks
            )
            self.now.warnings = [*self.now.warnings, f"no step boundary for {self._options.hang_secs:g} s"][
                -_WARNINGS_KEPT:
            ]
        elif self.now.stacks is not None and time.time() - (self.now.boundary_time or 0.0) < _LOOK_SECS:
            _log.warning("steps are done again, after a hang")
            self.now.stacks = None

    def _has_come_to_the_end(self) -> bool:
        step, total = self.now.step, self.now.total_steps
        return step is not None and total is not None and step >= total

    def _beat(self) -> None:
        if not self._may_write():
            return
        assert self._logdir is not None
        try:
            with self._writing:
                heartbeat.write(self._logdir, self.now)
            self._heartbeat_failed = False
        except OSError as error:
            if not self._heartbeat_failed:
                _log.warning("%s: no heartbeat could be written: %s", self._logdir, error)
            self._heartbeat_failed = True

    def _append(self, event: str, **fields: Any) -> None:
        ledger = self._ledger
        if ledger is None:
            return
        if not self._may_write():
            # Not yet: a worker may be there before its chief.
            if event == "start":
                self._start = fields
            return
        start, self._start = self._start, None
        if start is not None:
            ledger.append("start", **start)
        ledger.append(event, **fields)

    def _may_write(self) -> bool:
        """A worker leaves nothing in a logdir but beside the heartbeat of its chief."""
        return self._logdir is not None and (self._is_chief or (self._logdir / heartbeat.DIR_NAME).is_dir())


def describe(error: BaseException) -> str:
    """The type and the first line of an error."""
    return described(error).split("\n", 1)[0][:500]
