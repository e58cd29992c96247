"""The life of a supervised run: prepare, start the services, stop, close. Knows no framework."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic

from stepguard.coordination import process_exit
from stepguard.coordination.coordinator import Coordinator
from stepguard.coordination.looper import LooperThread
from stepguard.coordination.outside_stop import OutsideStop
from stepguard.coordination.services import StepCounter, StepCounterThread, WhileOpen
from stepguard.coordination.time_limit import TimeLimit
from stepguard.engine import Engine, EventLog, Prepared, RestsBetweenLoops, SessionT
from stepguard.errors import described
from stepguard.managed_session import ManagedSession
from stepguard.options import Options
from stepguard.saving.answers import Answers
from stepguard.saving.cadence import LOOK_SECS
from stepguard.saving.nan_guard import NanGuard
from stepguard.saving.run_saver import RunSaver
from stepguard.steps.numbers import as_numbers
from stepguard.stops import ERROR, FINISHED, end_time
from stepguard.store import CheckpointStore, Recovery
from stepguard.store.marks import check_name
from stepguard.watching import trial
from stepguard.watching.observer import Observer
from stepguard.words import logger

_log = logger(__name__)

# How long the last save may take when the grace period is 0: the last step of a good run is worth a moment.
_LAST_SAVE_SECS = 5.0
# At the exit of a process that has not called stop(), the last lines of the event log and the ledger get at least so
# long, in case a disk has hung until then.
_LAST_LINES_SECS = 0.5
# How long the last lines may take to reach the mirror.
_LAST_LINES_MIRRORED_SECS = 5.0


@dataclass(slots=True)
class _Life:
    """What the supervisor knows about the session that it opened last."""

    pid: int = field(default_factory=os.getpid)
    # What the preparation recovered, kept for services that are started later.
    recovered: Recovery | None = None
    # Why the run stops, where the coordinator cannot tell: a signal, or an exception that left the `with` block.
    stop_reason: str | None = None


class Supervisor(Generic[SessionT]):
    """Runs the services around the training loop of one program, through one engine.

    An engine's own Supervisor adds properties and a constructor in the terms of its framework. It overrides nothing
    that is defined here.

    Args:
        engine: everything that differs between frameworks.
        coord: carries the stop flag and the first error.
        is_chief: whether this process initialises, restores, saves and logs.
        logdir: where the run writes its files, the same for the chief and its workers; ``None`` when it writes none.
        store: where checkpoints are committed; ``None`` when only the framework can reach the place.
        events: the event log, or ``None``.
        has_summaries: whether the program has summaries to compute.
        saves_model: whether there is a model to save and a place to save it.
        options: how the run is saved, stopped, watched and guarded; see :meth:`stepguard.options.Options.check_return`.
            A worker saves nothing, whatever the saving options say.
        role: the name of a worker in the ledger and in its heartbeat.

    Raises:
        ValueError: ``hang_secs`` is set, and there is no logdir for the stacks; or there is a mirror, and nothing to
            put into it.
        ModuleNotFoundError: the mirror needs obstore, which is not installed.
    """

    _step_counter: StepCounter | None = None

    def __init__(
        self,
        engine: Engine[SessionT],
        *,
        coord: Coordinator,
        is_chief: bool,
        logdir: str | None,
        store: CheckpointStore | None,
        events: EventLog | None,
        has_summaries: bool,
        saves_model: bool,
        options: Options,
        role: str = "worker",
    ) -> None:
        self._engine = engine
        self._coord = coord
        self._is_chief = is_chief
        self._logdir = logdir if is_chief else None
        self._store = store
        self._events = events
        self._has_summaries = has_summaries
        self._options = options
        self._stop_grace_secs = options.stopping.stop_grace_secs
        if is_chief:
            options.check_mirror(commits=saves_model and store is not None, logdir=logdir)
        self._observer = Observer(engine, logdir=logdir, is_chief=is_chief, options=options)
        self._saving = RunSaver(
            engine,
            store=store,
            events=events,
            observer=self._observer,
            options=options.saving if saves_model and is_chief else None,
            mirror=options.mirror,
            on_error=coord.report,
        )
        self._worker_role = role
        self._built_in = os.getcwd()
        self._life = _Life()
        self._guard = self._make_guard()

    def _make_guard(self) -> NanGuard | None:
        if self._options.guarding.nan_guard is None:
            return None
        return NanGuard(
            self._options.guarding,
            engine=self._engine,
            coord=self._coord,
            store=self._store,
            events=self._events,
            observer=self._observer,
            one_save=self._saving.one_save,
            on_error=self._coord.report,
            on_return=self._went_back,
        )

    def _went_back(self, step: int | None) -> None:
        """The NaN guard has put the session back to ``step``, inside its boundary."""
        self._saving.went_back()
        self._observer.went_back(step)

    @property
    def is_chief(self) -> bool:
        """Whether this process initialises, restores, saves and logs."""
        return self._is_chief

    @property
    def coord(self) -> Coordinator:
        """The coordinator: the stop flag, the first error, and the threads that stop together."""
        return self._coord

    @property
    def save_summaries_secs(self) -> float | None:
        """Seconds between summaries; ``None`` in a worker."""
        return self._options.watching.save_summaries_secs if self._is_chief else None

    @property
    def save_model_secs(self) -> float | None:
        """Seconds between timed checkpoints; ``None`` in a worker."""
        return self._options.saving.save_model_secs if self._is_chief else None

    # --- the stop flag ---

    def request_stop(self, ex: BaseException | tuple[Any, Any, Any] | None = None) -> None:
        """Ask everything to stop; ``ex`` is re-raised when the run ends. Any thread, or a signal handler."""
        self._coord.request_stop(ex)

    def should_stop(self) -> bool:
        """Whether a stop was requested. A training loop asks this at each iteration."""
        return self._coord.should_stop()

    def stop_on_exception(self) -> AbstractContextManager[None]:
        """A context that turns an exception leaving it into a stop request, for the program's own threads."""
        return self._coord.stop_on_exception()

    def wait_for_stop(self) -> None:
        """Block until a stop is requested."""
        self._coord.wait_for_stop()

    # --- services ---

    def loop(
        self,
        timer_interval_secs: float | None,
        target: Callable[..., object],
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> LooperThread:
        """Call ``target(*args, **kwargs)`` every ``timer_interval_secs`` seconds on a thread until the run stops.

        With ``None`` as the interval, the calls follow each other without a pause. An error from ``target`` stops the
        run. :meth:`stop` waits for the thread.
        """
        looper = LooperThread(self._coord, timer_interval_secs, target=target, args=args, kwargs=kwargs)
        self._is_running()
        looper.start()
        return looper

    def start_standard_services(self, sess: SessionT) -> list[threading.Thread]:
        """Start the services for ``sess``: summaries and step rate, and checkpoints.

        Returns:
            The threads that run them, for ``sv.coord.join``.

        Raises:
            RuntimeError: this is not the chief.
            ValueError: no logdir was given, so the services have nowhere to write.
        """
        if not self._is_chief:
            raise RuntimeError(
                "start_standard_services: only the chief starts the standard services, and this supervisor was made "
                "with is_chief=False; use loop() for a service of your own"
            )
        if not self._logdir:
            raise ValueError(
                "start_standard_services: expected a logdir for checkpoints and summaries, found none; pass logdir= "
                "to the Supervisor, or start_standard_services=False to the call that prepares the session"
            )
        self._saving.claim_logdir()
        self._observe()
        step = self._engine.step(sess)
        if step is not None and self._events is not None:
            self._events.started(step)
        threads: list[threading.Thread] = []
        if self._events is not None and self.save_summaries_secs:
            if self._has_summaries:
                summarise = functools.partial(self._engine.summarise, sess)
                threads.append(self._service("summary", self.save_summaries_secs, sess, summarise))
            if step is not None:
                self._step_counter = StepCounter(self._engine, sess, self._events)
                counting = WhileOpen(self._engine, sess, self._step_counter)
                threads.append(
                    StepCounterThread(
                        self._coord, self.save_summaries_secs, target=counting, name="stepguard-step-counter"
                    )
                )
        if self._saving.is_on:
            self._engine.watch(sess, self._save_before_close)
            save = self._saving.start(sess, step, self._guard)
            if self.save_model_secs:
                threads.append(self._service("checkpoint", self.save_model_secs, sess, save))
            look = self._saving.cadence_service(sess)
            if look is not None:
                threads.append(self._service("cadence", LOOK_SECS, sess, look))
        self._is_running()
        answer = Answers(self._engine, sess, coord=self._coord, saver=self._saving)
        self._observer.session_ready(sess, step, self._life.recovered, answer)
        for thread in threads:
            thread.start()
        return threads

    def _observe(self) -> None:
        """Start the ledger, the heartbeat and the other ways of watching, unless they have started."""
        # An evaluator is a chief too, although another process trains in this logdir.
        is_passing = self._is_chief and self._store is not None and not self._saving.holds_logdir
        role = f"process-{os.getpid()}" if is_passing else "chief" if self._is_chief else self._worker_role
        self._observer.begin(role, is_passing=is_passing)

    def _service(
        self, name: str, interval_secs: float, session: SessionT, service: Callable[[], object]
    ) -> LooperThread:
        target = WhileOpen(self._engine, session, service)
        return LooperThread(self._coord, interval_secs, target=target, name=f"stepguard-{name}")

    # --- what an engine's Supervisor calls ---

    def open_session(
        self,
        prepare: Callable[[], Prepared[SessionT]],
        start_standard_services: bool,
        *,
        waits_for_another: bool = False,
        on_open: Callable[[SessionT], object] | None = None,
    ) -> SessionT:
        """Return a prepared session with its services running, as ``prepare_or_wait_for_session`` does.

        Args:
            prepare: the engine's ``prepare``, with its arguments bound.
            start_standard_services: whether to start the services: checkpoints, summaries, step rate.
            waits_for_another: whether ``prepare`` waits for a chief in another process. The logdir is left to that
                chief meanwhile.
            on_open: called with the session once its services run; the framework starts its own threads there.

        If anything fails, the session is closed before the error leaves.
        """
        self._coord.clear_stop()
        self._warn_of_another_directory()
        self._life.pid, self._life.stop_reason = os.getpid(), None
        if self._events is not None:
            self._events.reopen()
        try:
            if start_standard_services and not waits_for_another:
                self._begin_observation()
            prepared = prepare()
        except BaseException as error:
            self._saving.leave_logdir()
            self._observer.end("error" if isinstance(error, Exception) else "interrupt", error)
            self._saving.leave_mirror(_LAST_LINES_MIRRORED_SECS)
            raise
        session, self._life.recovered = prepared.session, prepared.recovered
        self._is_running()
        try:
            self._engine.watch(session, self._save_before_close)
            if self._guard is not None:
                self._guard.begin(session)
            self._end_trial_in_time(session)
            if start_standard_services and self._is_chief:
                if self._logdir:
                    self.start_standard_services(session)
                else:
                    self._engine.call_after_steps(session, 1, self._warn_of_no_logdir)
                    self._observer.session_ready(session, None, None)
            elif start_standard_services:
                self._observer.session_ready(session, None, None)
            if on_open is not None:
                on_open(session)
            self._limit_time()
        except BaseException as error:
            self._give_up(session, error)
            raise
        return session

    def managed(
        self, open_session: Callable[[], SessionT], *, close_summary_writer: bool
    ) -> AbstractContextManager[SessionT]:
        """Return the context that a training loop lives in, as ``managed_session`` does.

        ``open_session`` opens the session through :meth:`open_session`; ``close_summary_writer`` is as in :meth:`stop`.
        """
        return ManagedSession(_Block(self, open_session, close_summary_writer))

    def keep_metrics(self, session: SessionT, values: Mapping[str, Any]) -> None:
        """Note numbers that were measured of the last step, for a session without ``metrics``. Not inside a step.

        Raises:
            TypeError: a value is no number; the message names it.
        """
        numbers = as_numbers(values, "metrics")
        if self._guard is not None:
            self._guard.look(numbers)
        if self._saving.keeper is not None:
            self._saving.keeper.metrics(numbers, self._engine.step(session))

    def keep_checkpoint(self, session: SessionT, name: str | None) -> None:
        """Save now, and keep that under ``name``, for a session without ``save``. Not inside a step.

        Raises:
            TypeError, ValueError: ``name`` is no word.
        """
        if name is not None:
            check_name(name)
        if self._saving.keeper is not None:
            self._saving.keeper.save(name, self._engine.step(session))
        elif self._is_chief:
            _log.warning("save: this run saves nothing, because it has no logdir or its saving is off")

    # --- the life of a session ---

    def _warn_of_another_directory(self) -> None:
        logdir, here = self._logdir, os.getcwd()
        if logdir and "://" not in logdir and not os.path.isabs(logdir) and here != self._built_in:
            _log.warning(
                "the logdir %r is relative, and the working directory was %s when the supervisor was built: what is "
                "restored and saved from now on is in %s. Pass an absolute logdir",
                logdir,
                self._built_in,
                os.path.join(here, logdir),
            )

    def _warn_of_no_logdir(self) -> int:
        """Warn at the first step, and not before: a program that only reads or evaluates has nothing to lose."""
        _log.warning("no logdir was given: nothing is saved or logged, and a crash loses the whole run")
        return sys.maxsize

    def _limit_time(self) -> None:
        """Have the run stop before its time is over."""
        stopping = self._options.stopping
        ends_at = end_time(stopping.at)
        TimeLimit(stopping.after_secs, ends_at, self._observer.stop_secs, self._stop_grace_secs).start(self._coord)

    def _end_trial_in_time(self, session: SessionT) -> None:
        """Have a trial of `stepguard prove` end exactly at its last step."""
        known = trial.current()
        if known is not None and known.stop_at is not None:
            OutsideStop(self._engine, self._coord, session, trial.REASON).after(known.stop_at)

    def _begin_observation(self) -> None:
        if self._is_chief:
            self._saving.claim_logdir()
        self._observe()

    def _give_up(self, session: SessionT, error: BaseException) -> None:
        """Undo the opening of ``session`` after ``error``, which the caller raises next."""
        self._coord.end()
        if self._guard is not None:
            self._guard.end(was_asked=True)
        self._engine.close(session)
        self._observer.end("error" if isinstance(error, Exception) else "interrupt", error)
        self._saving.leave_mirror(_LAST_LINES_MIRRORED_SECS)

    def stop(
        self,
        threads: Sequence[threading.Thread] | None = None,
        close_summary_writer: bool = True,
        ignore_live_threads: bool = False,
    ) -> None:
        """Stop the services, save the last step, and close the event log. The session stays open.

        Args:
            threads: more threads to wait for, besides those of the services, of ``loop()`` and of queue runners.
            close_summary_writer: whether to write the STOP record and close the event log.
            ignore_live_threads: whether threads that outlive ``stop_grace_secs`` cause a warning instead of an error.

        Raises:
            Exception: the first error that was reported during the run, with later errors as its notes.
            RuntimeError: threads did not stop in time.
        """
        if not self._has_threads():
            return
        process_exit.forget(self)
        was_asked = self._coord.should_stop()
        self._coord.end()
        self._observer.stopping()
        self._saving.note_end()
        try:
            try:
                if self._guard is not None:
                    self._guard.end(was_asked=was_asked)
                self._coord.join(
                    threads, stop_grace_period_secs=self._stop_grace_secs, ignore_live_threads=ignore_live_threads
                )
            finally:
                self._finish_saving(is_finished=not was_asked and self._life.stop_reason is None)
            # A failed last checkpoint is an error of the run like any other.
            self._coord.raise_requested_exception()
        except BaseException as error:
            exit_code = self._options.stopping.exit_code(ERROR)
            self._observer.end("error", error, request=self._life.stop_reason, exit_code=exit_code)
            raise
        else:
            reason = self._life.stop_reason or self._coord.stop_reason or FINISHED
            self._observer.end(reason, exit_code=self._options.stopping.exit_code(reason))
        finally:
            if close_summary_writer and self._events is not None:
                self._events.stopped()
                self._events.close()
            # The last, so that the mirror has the whole story.
            self._saving.leave_mirror(_LAST_LINES_MIRRORED_SECS)

    def _finish_saving(self, *, is_finished: bool) -> None:
        """Save the last step, even when some threads did not stop; but not after a failed run, since its state may be
        the fault. The state is not the fault of an error in reading the data.
        """
        deadline = time.monotonic() + (self._stop_grace_secs or _LAST_SAVE_SECS)
        try:
            error = self._coord.first_error
            if error is None or self._saving.is_outside_steps(error):
                self._finish_counting()
                self._saving.save_last(deadline, is_finished=is_finished, was_told=self._was_told())
        finally:
            if not self._saving.stop(deadline):
                _log.warning(
                    "the time to stop was over before the checkpoint at hand was complete; "
                    "those before it are as they were"
                )
            self._saving.leave_logdir()

    def _was_told(self) -> bool:
        """Whether a signal or sys.exit ends this process, and not a step at which the others end too."""
        return self._life.stop_reason is not None

    def _finish_counting(self) -> None:
        counter, self._step_counter = self._step_counter, None
        if counter is not None:
            counter.finish()

    def _save_before_close(self) -> None:
        """Save the last step of a session that the program closes before it stops the supervisor."""
        if not self._has_threads():
            return
        if self._guard is not None and not self._guard.end(was_asked=self._coord.should_stop()):
            return
        self._finish_counting()
        try:
            deadline = time.monotonic() + (self._stop_grace_secs or _LAST_SAVE_SECS)
            self._saving.save_last(deadline, is_finished=not self._coord.should_stop(), was_told=self._was_told())
        except Exception as error:  # noqa: BLE001 - closing goes on; `stop` raises this
            self._coord.report(error)

    def _has_threads(self) -> bool:
        """Whether the run can still be ended here. In a child that was forked during the run it belongs to the parent;
        when the interpreter ends, the exit of the process has ended it.
        """
        return process_exit.has_threads(self._life.pid)

    def _is_running(self) -> None:
        process_exit.end_with_process(self, Supervisor._end_with_process)

    def _end_with_process(self, deadline: float) -> None:
        """Bring the threads of a run that the program never stopped to rest before the interpreter exits."""
        self._coord.end()
        if self._guard is not None:
            self._guard.end(was_asked=True, within_secs=max(0.0, deadline - time.monotonic()))
        # The session closes when it is garbage-collected, too late for a thread that still wants to save it.
        self._saving.stop(deadline)
        failure = None
        try:
            self._coord.join(stop_grace_period_secs=max(0.0, deadline - time.monotonic()), ignore_live_threads=True)
        except Exception as error:  # noqa: BLE001 - nobody is left to raise it to
            failure = error
            _log.error("the program ended without stop(), which would have raised: %s", described(error))
        if self._events is not None:
            process_exit.call_within(max(_LAST_LINES_SECS, deadline - time.monotonic()), self._events.flush)
        self._observer.end(
            "exit" if failure is None else "error",
            failure,
            within_secs=max(_LAST_LINES_SECS, deadline - time.monotonic()),
        )
        self._saving.leave_mirror(max(_LAST_LINES_SECS, deadline - time.monotonic()))


@dataclass(frozen=True, slots=True)
class _Block(Generic[SessionT]):
    """One run of a supervisor in a ``with`` block; see :class:`stepguard.managed_session.Supervision`."""

    supervisor: Supervisor[SessionT]
    open: Callable[[], SessionT]
    close_summary_writer: bool

    @property
    def grace_secs(self) -> float:
        return self.supervisor._stop_grace_secs

    @property
    def stop_signals(self) -> Sequence[signal.Signals]:
        return self.supervisor._options.stopping.stop_signals

    def exit_code(self, reason: str) -> int | None:
        return self.supervisor._options.stopping.exit_code(reason)

    @property
    def stop_reason(self) -> str | None:
        return self.supervisor._coord.stop_reason

    def request_stop(self, error: BaseException | None) -> None:
        self.supervisor.request_stop(error)

    def ask_stop(self, reason: str) -> None:
        self.supervisor._coord.ask_stop(reason)

    def stop_at_boundary(self, session: SessionT) -> None:
        self.supervisor._engine.stop_at_boundary(session, self.supervisor._coord.main_thread_was_told)

    def note_end(self, reason: str) -> None:
        self.supervisor._life.stop_reason = reason

    def ending(self) -> str:
        return self.supervisor._observer.ending()

    def ends_by_itself(self, session: SessionT) -> bool:
        supervisor = self.supervisor
        engine: object = supervisor._engine
        if not isinstance(engine, RestsBetweenLoops):
            return False
        if engine.is_resting(session) and engine.is_alone(session):
            supervisor._saving.save_now(supervisor._stop_grace_secs or _LAST_SAVE_SECS)
        return True

    def save(self) -> None:
        self.supervisor._save_before_close()

    def stop(self) -> None:
        self.supervisor.stop(close_summary_writer=self.close_summary_writer)

    def close(self, session: SessionT) -> None:
        self.supervisor._engine.close(session)
