"""What a run says of itself while it lasts: the ledger, the heartbeat, the progress line, metrics and the hang watch.

Each is a :class:`stepguard.watching.part.Part`; the observer begins them, and passes on what happens.

The thread that ends a run hands the reason to the observer's thread and waits for it, for ``within_secs``: the last
lines go to a disk that may hang, and a run does not. Whatever becomes of them, that thread then closes the parts. So
neither waits for the other for ever.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepguard.engine import Engine
from stepguard.options import Watching
from stepguard.store import Recovery
from stepguard.watching import launcher_link, ledger
from stepguard.watching.hang_report import HangReport
from stepguard.watching.hang_watch import HangWatch
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.metrics import MetricsServer
from stepguard.watching.part import Part
from stepguard.watching.progress_line import ProgressLine
from stepguard.watching.pulse import Pulse
from stepguard.watching.run_record import Ending, Room, RunRecord, describe
from stepguard.watching.step_meter import StepMeter

_log = logging.getLogger(__name__)

# How often the step counter is read.
_LOOK_SECS = 1.0
# The longest wait for the last lines.
_FAREWELL_SECS = 2.0


class Observer:
    """Watches one process of a run, from a thread of its own that looks at the step counter once a second.

    Threads: :meth:`begin`, :meth:`session_ready` and :meth:`end` by whoever opens and stops the session;
    :meth:`checkpointed`, :meth:`save_failed`, :meth:`warn` and :meth:`returned` by any.

    Args:
        engine: tells how many steps were done.
        logdir: where the ledger and the heartbeats go; ``None`` writes neither.
        is_chief: whether this process may create them; a worker adds to those of its chief only.
        options: what else is wanted.

    Raises:
        ValueError: hangs are to be watched for, and there is no place for the stacks.
    """

    def __init__(self, engine: Engine[Any], *, logdir: str | None, is_chief: bool, options: Watching) -> None:
        # A place that only the framework can reach has neither ledger nor heartbeats.
        self._place = None if logdir is None or "://" in logdir else logdir
        if options.hang_secs is not None and self._place is None:
            raise ValueError(
                f"hang_secs needs a logdir on this machine, for the stacks: expected a path, found {logdir!r}"
            )
        self._engine = engine
        self._is_chief = is_chief
        self._options = options
        self._record = RunRecord(self._heartbeat(""), Room(None, is_chief))
        self._watch: _Watch | None = None

    @property
    def now(self) -> Heartbeat:
        """What is known of the run."""
        return self._record.now

    def _heartbeat(self, role: str) -> Heartbeat:
        total = self._options.total_steps
        # A plain int: the heartbeat is JSON, which knows no number of NumPy.
        return Heartbeat(role, engine=self._engine.name, total_steps=None if total is None else int(total))

    # --- the life of the run ---

    def begin(self, role: str, *, is_passing: bool = False) -> None:
        """A session is going to be prepared by this process as ``role``. The second call in a row does nothing.

        ``is_passing`` is an evaluator, say: it looks into the logdir of a chief, and its heartbeat ends with it.

        Raises:
            ModuleNotFoundError, OSError: the metrics cannot be served.
        """
        if self._watch is not None:
            return
        # Relative to where the program is now, as its checkpoints are; from here on it stays.
        room = Room(None if self._place is None else Path(self._place).absolute(), self._is_chief)
        self._record = record = RunRecord(self._heartbeat(role), room)
        metrics = self._serve_metrics(record)
        room.make()
        if room.logdir is not None:
            launcher_link.announce(room.logdir)
        record.begin()
        pulse = Pulse(record.now, room, is_passing=is_passing)
        pulse.beat()
        hang_secs = self._options.hang_secs
        interval_secs = _LOOK_SECS if hang_secs is None else min(_LOOK_SECS, hang_secs / 4)
        self._watch = _Watch(record, StepMeter(self._engine, record.now), pulse, metrics, interval_secs)

    def _serve_metrics(self, record: RunRecord) -> list[Part]:
        port = self._options.metrics_port
        # One port of a host is for one process: a worker serves only what it can choose itself.
        if port is None or (port and not self._is_chief):
            return []
        metrics = MetricsServer(record.now, record.totals, host=self._options.metrics_host, port=port)
        _log.info("metrics are served at %s", metrics.url)
        return [metrics]

    def session_ready(self, session: Any, step: int | None, recovery: Recovery | None) -> None:
        """The session can run, from ``step`` on if that is known. ``recovery`` is what was found to restore; ``None``
        in one who looks for nothing. Quick: the program waits, and others train already.
        """
        watch = self._watch
        if watch is None:
            return
        watch.meter.begin_at(step)
        self._record.trains(recovery)
        if self.now.phase == "preparing":
            watch.parts = [*self._watch_for_hangs(watch.meter), *self._show_progress(), *watch.parts]
        self.now.phase = "training"
        # Last: from now on the observer's thread uses all of the above.
        watch.meter.follow(session)

    def _watch_for_hangs(self, meter: StepMeter) -> list[Part]:
        hang_secs, logdir, now = self._options.hang_secs, self._record.logdir, self.now
        if hang_secs is None or logdir is None:
            return []
        hang_watch = HangWatch(
            hang_secs,
            ends_process=self._options.end_on_hang,
            logdir=logdir,
            role=now.role,
            ledger=logdir / ledger.FILE_NAME,
            head={"event": "hang", "time": 0, "pid": now.pid, "host": now.host, "role": now.role},
        )
        return [HangReport(hang_watch, meter, self._record, hang_secs)]

    def _show_progress(self) -> list[Part]:
        return [ProgressLine(self.now)] if self._options.progress else []

    def stopping(self) -> None:
        """The loop is over: what follows has no step boundaries, and is no hang."""
        if self._watch is not None:
            self.now.phase = "stopping"

    def end(
        self,
        reason: str,
        error: BaseException | None = None,
        *,
        request: str | None = None,
        exit_code: int | None = None,
        within_secs: float = _FAREWELL_SECS,
    ) -> None:
        """The run is over; the arguments are those of an :class:`stepguard.watching.run_record.Ending`."""
        watch, self._watch = self._watch, None
        ending = Ending(reason, error, request, exit_code)
        if watch is not None and not watch.end(ending, within_secs):
            _log.warning("%s: ledger and heartbeat could not be ended in %.1f s", self._record.logdir, within_secs)

    def ending(self) -> str:
        """Where the run has stopped, and what of it is saved, on one line. After :meth:`end`."""
        now, logdir = self.now, self._record.logdir
        stopped = "stopped" if now.step is None else f"stopped at step {now.step}"
        last = now.last_checkpoint
        if not self._is_chief:
            return stopped
        if last is None:
            return f"{stopped}: no checkpoint is saved"
        name = last["name"] if logdir is None else logdir / last["name"]
        return f"{stopped}: " + (
            f"{name} is saved" if last["step"] is None else f"step {last['step']} is saved in {name}"
        )

    # --- what happens meanwhile ---

    def checkpointed(self, name: str, step: int | None, nbytes: int, secs: float, stall_secs: float) -> None:
        """A checkpoint was committed: its size, how long that took, and how long training waited for the snapshot."""
        self._record.checkpointed(name, step, nbytes, secs, stall_secs)

    def save_failed(self, message: str) -> None:
        """A try to save has failed; it is tried again."""
        self.now.save_failures += 1
        self._record.warn(message)

    def warn(self, message: str) -> None:
        """Something that the user should know has happened; it was logged already."""
        self._record.warn(message)

    def returned(self, *, step: int | None, to_step: int | None, reason: str, number: int, message: str) -> None:
        """The run went back from ``step`` to ``to_step``, the ``number``-th time; ``message`` was logged already."""
        self._record.append("return", step=step, to_step=to_step, reason=reason, number=number)
        self._record.warn(message)


class _Watch:
    """The observer's thread, and the parts that it looks after between the meter and the heartbeat."""

    def __init__(
        self, record: RunRecord, meter: StepMeter, pulse: Pulse, parts: Sequence[Part], interval_secs: float
    ) -> None:
        self.meter = meter
        self.parts = list(parts)
        self._record = record
        self._pulse = pulse
        self._interval_secs = interval_secs
        self._ending: queue.SimpleQueue[Ending] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="stepguard-observer", daemon=True)
        self._thread.start()

    def end(self, ending: Ending, within_secs: float) -> bool:
        """Have all parts leave, and close them; ``False`` if they have not left in time."""
        self._ending.put(ending)
        self._thread.join(within_secs)
        for part in self.parts:
            try:
                part.close()
            except Exception as failure:  # noqa: BLE001 - a run that ended well does not fail for how it was watched
                _log.warning("%s", describe(failure))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (ending := self._wait()) is None:
            for part in (self.meter, *self.parts, self._pulse):
                part.look()
        for part in (self.meter, *self.parts):
            part.leave()
        self._record.stop(ending)
        # The heartbeat last: it tells what the others have put into the record.
        self._pulse.leave()

    def _wait(self) -> Ending | None:
        """Wait for the next look; how the run has ended, if it has."""
        try:
            return self._ending.get(timeout=self._interval_secs)
        except queue.Empty:
            return None
