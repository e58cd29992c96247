"""The observer of a run: it keeps the ledger, the heartbeat, the progress line, the metrics and the hang watch.

Each way of watching is a :class:`stepguard.watching.part.Part`. The observer starts the parts and passes events on to
them.

The protocol: the observer's thread waits on a queue, and is woken by its interval or by the ending of the run. At each
interval it lets every part look. It never waits for the training thread: it reads the step counter without a boundary.
The thread that ends the run puts the ending into the queue, and joins the observer's thread for ``within_secs`` at
most, because the last lines go to a disk that may hang. It then closes the parts itself, whether the observer's thread
has ended or not, so neither waits for the other for ever. Other threads only append to the ledger, under the ledger's
own lock, and replace fields of the heartbeat in single assignments. A kill leaves a ledger without a `stop` line, and
the last heartbeat; the next start reads both.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stepguard.engine import Engine, TracesSteps
from stepguard.options import BATCHES, Options
from stepguard.store import Recovery
from stepguard.watching import configuration, launcher_link, ledger
from stepguard.watching.hang_report import HangReport
from stepguard.watching.hang_watch import HangWatch
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.metrics import MetricsServer
from stepguard.watching.part import Part
from stepguard.watching.progress_line import ProgressLine
from stepguard.watching.pulse import Pulse
from stepguard.watching.requests import Answer, Reception, Request
from stepguard.watching.run_record import Ending, Room, RunRecord, describe
from stepguard.watching.step_meter import StepMeter
from stepguard.watching.step_recorder import StepRecorder
from stepguard.words import logger

_log = logger(__name__)

# How often the step counter is read.
_LOOK_SECS = 1.0
# How long the end of a run waits for the last lines to be written.
_FAREWELL_SECS = 2.0


class Observer:
    """Watches one process of a run, from a thread of its own that looks at the step counter once a second.

    Threads: :meth:`begin`, :meth:`session_ready` and :meth:`end` are called by the thread that opens and stops the
    session; :meth:`checkpointed`, :meth:`paced`, :meth:`mirrored`, :meth:`save_failed`, :meth:`warn` and
    :meth:`returned` by any thread.

    Args:
        engine: reports the number of steps done.
        logdir: where the ledger and the heartbeats are written; ``None`` writes neither.
        is_chief: whether this process may create them; a worker only adds to those of its chief.
        options: those of the Supervisor, which the ledger tells; `watching` says what else is started.

    Raises:
        ValueError: ``hang_secs`` is set, and there is no logdir for the stacks.
    """

    def __init__(self, engine: Engine[Any], *, logdir: str | None, is_chief: bool, options: Options) -> None:
        # No ledger or heartbeats in a place that only the framework can reach.
        self._place = None if logdir is None or "://" in logdir else logdir
        if options.watching.hang_secs is not None and self._place is None:
            raise ValueError(
                f"hang_secs needs a logdir on this machine, for the stacks: expected a path, found {logdir!r}"
            )
        self._engine = engine
        self._is_chief = is_chief
        self._options = options.watching
        self._told = configuration.told(options)
        self._record = RunRecord(self._heartbeat(""), Room(None, is_chief))
        self._watch: _Watch | None = None
        self._is_passing = False
        self._recorder: StepRecorder | None = None

    @property
    def now(self) -> Heartbeat:
        """The current state of the run."""
        return self._record.now

    def stop_secs(self) -> float | None:
        """How many seconds a stop takes, as measured: the step at hand, a save at hand, and the last one.

        ``None`` before any save was measured, of this run or, in its ledger, of the runs before. Any thread.
        """
        save_secs = self._record.longest_save_secs
        if save_secs is None:
            return None
        rate = self.now.steps_per_sec
        return 2 * save_secs + (1 / rate if rate else 0.0) + _FAREWELL_SECS

    def _heartbeat(self, role: str) -> Heartbeat:
        total = self._options.total_steps
        # A plain int, because JSON cannot encode NumPy's numbers.
        return Heartbeat(role, engine=self._engine.name, total_steps=None if total is None else int(total))

    # --- the life of the run ---

    def begin(self, role: str, *, is_passing: bool = False) -> None:
        """Start watching, before this process prepares a session as ``role``. A second call in a row does nothing.

        ``is_passing`` marks a visitor of a chief's logdir, such as an evaluator: its heartbeat is removed at its end.

        Raises:
            ModuleNotFoundError, OSError: the metrics cannot be served.
        """
        if self._watch is not None:
            return
        # Resolve a relative logdir now, against the same directory as the checkpoints; it stays the same later.
        room = Room(None if self._place is None else Path(self._place).absolute(), self._is_chief)
        self._is_passing, self._recorder = is_passing, None
        self._record = record = RunRecord(self._heartbeat(role), room)
        metrics = self._serve_metrics(record)
        room.make()
        if room.logdir is not None:
            launcher_link.announce(room.logdir)
        record.begin(self._told)
        pulse = Pulse(record.now, room, is_passing=is_passing)
        pulse.beat()
        hang_secs = self._options.hang_secs
        interval_secs = _LOOK_SECS if hang_secs is None else min(_LOOK_SECS, hang_secs / 4)
        self._watch = _Watch(record, StepMeter(self._engine, record.now), pulse, metrics, interval_secs)

    def _serve_metrics(self, record: RunRecord) -> list[Part]:
        port = self._options.metrics_port
        # Only one process of a host can have a fixed port: a worker serves metrics only on a free port.
        if port is None or (port and not self._is_chief):
            return []
        metrics = MetricsServer(
            record.now,
            record.totals,
            host=self._options.metrics_host,
            port=port,
            run="" if record.logdir is None else str(record.logdir),
        )
        _log.info("metrics are served at %s", metrics.url)
        return [metrics]

    def session_ready(
        self,
        session: Any,
        step: int | None,
        recovery: Recovery | None,
        answer: Callable[[Request], Answer] | None = None,
    ) -> None:
        """Note that the session can run, from ``step`` on if known. ``recovery`` is the result of the search for
        a checkpoint; ``None`` in a process that did not search. This must be fast, because the program waits for it.
        ``answer`` does what is asked from outside; only the chief is given it.
        """
        watch = self._watch
        if watch is None:
            return
        watch.meter.begin_at(step)
        self._record.trains(recovery)
        if self.now.phase == "preparing":
            added = [*self._watch_for_hangs(watch.meter), *self._show_progress(), *self._trace(session, recovery)]
            added += self._receive(answer)
            watch.parts = [*added, *watch.parts]
        self.now.phase = "training"
        # Last, because from now on the observer's thread uses all of the above.
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

    def _receive(self, answer: Callable[[Request], Answer] | None) -> list[Part]:
        """Take requests from outside. A visitor of a chief's logdir leaves them to that chief."""
        logdir = self._record.logdir
        if answer is None or logdir is None or self._is_passing or not self._is_chief:
            return []
        return [Reception(logdir, self.now, answer)]

    def _trace(self, session: Any, recovery: Recovery | None) -> list[Part]:
        """Record what the steps of ``session`` are. A visitor of a chief's logdir records nothing there."""
        engine: object = self._engine
        logdir, what = self._record.logdir, self._options.trace
        if what is None or logdir is None or self._is_passing or not isinstance(engine, TracesSteps):
            return []
        if not self._record.may_write:
            return []
        recorder = StepRecorder(logdir, self._record, wants_digests=what == BATCHES)
        beginning = engine.trace_steps(session, recorder)
        if beginning is None:
            return []
        # A worker takes the state that its chief has restored, and does not search itself.
        is_resumed = recovery.checkpoint is not None if recovery is not None else beginning.step > 0
        recorder.begin(beginning, is_resumed=is_resumed)
        if recovery is not None and recovery.rolled_back:
            # On purpose, and perhaps with other settings: not the steps of the run before, done again.
            recorder.went_back(beginning.step)
        self._recorder = recorder
        return [recorder]

    def went_back(self, step: int | None) -> None:
        """Note that the session was put back to ``step``, inside its boundary, to go on in another way."""
        if self._recorder is not None:
            self._recorder.went_back(step or 0)

    def stopping(self) -> None:
        """Note that the loop is over: the rest of the run has no step boundaries, and is not a hang."""
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
        """Stop watching at the end of the run. For the arguments see :class:`stepguard.watching.run_record.Ending`."""
        watch, self._watch = self._watch, None
        ending = Ending(reason, error, request, exit_code)
        if watch is not None and not watch.end(ending, within_secs):
            _log.warning("%s: ledger and heartbeat could not be ended in %.1f s", self._record.logdir, within_secs)

    def ending(self) -> str:
        """One line that says at which step the run stopped and which step is saved. After :meth:`end`."""
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
        """Note a commit: the checkpoint's size, the seconds to write it, and those that training waited."""
        self._record.checkpointed(name, step, nbytes, secs, stall_secs)

    def paced(self, *, overhead: float, interval_secs: float, cost: float, bytes_per_day: float) -> None:
        """Note what ``Saving(overhead=...)`` has come to; see :class:`stepguard.saving.cadence.CadenceReport`."""
        self.now.cadence = {
            "overhead": overhead,
            "interval_secs": round(interval_secs, 3),
            "cost": round(cost, 6),
            "bytes_per_day": round(bytes_per_day),
        }

    def mirrored(self, *, name: str, step: int | None, nbytes: int, secs: float) -> None:
        """Note that a checkpoint is in the mirror: the bytes that were sent for it, and the seconds that it took."""
        self._record.append("mirrored", name=name, step=step, bytes=nbytes, secs=secs)

    def save_failed(self, message: str) -> None:
        """Note a failed try to save, which will be repeated."""
        self.now.save_failures += 1
        self._record.warn(message)

    def warn(self, message: str) -> None:
        """Keep a warning for the user, which was already logged."""
        self._record.warn(message)

    def returned(self, *, step: int | None, to_step: int | None, reason: str, number: int, message: str) -> None:
        """Note the ``number``-th return of the run, from ``step`` to ``to_step``. ``message`` was already logged."""
        self._record.append("return", step=step, to_step=to_step, reason=reason, number=number)
        self._record.warn(message)


class _Watch:
    """The observer's thread. In each round it serves the step meter first, then the parts, the heartbeat last."""

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
        """Make all parts leave, and close them; ``False`` if they did not leave in time."""
        self._ending.put(ending)
        self._thread.join(within_secs)
        for part in self.parts:
            try:
                part.close()
            except Exception as failure:  # noqa: BLE001 - a good run must not fail because of a way of watching it
                _log.warning("%s", describe(failure))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (ending := self._wait()) is None:
            for part in (self.meter, *self.parts, self._pulse):
                part.look()
            self._record.add_start()
        for part in (self.meter, *self.parts):
            part.leave()
        self._record.stop(ending)
        # The heartbeat comes last, because it reports what the other parts have put into the record.
        self._pulse.leave()

    def _wait(self) -> Ending | None:
        """Wait for the next round. Returns the ending of the run if it has ended, else ``None``."""
        try:
            return self._ending.get(timeout=self._interval_secs)
        except queue.Empty:
            return None
