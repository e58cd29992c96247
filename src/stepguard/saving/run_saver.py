"""The saver of a run: holds its logdir, and joins the checkpointer, the step trigger and the writer of a session."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Generic

from stepguard.engine import Engine, EventLog, KeepsOnRequest, MakesRoom, RestsBetweenLoops, SessionT, SharedModel
from stepguard.options import Mirror, Saving
from stepguard.saving.cadence import Cadence
from stepguard.saving.cadence_service import CadenceService
from stepguard.saving.checkpointer import Checkpointer, StepTrigger
from stepguard.saving.commit import Committer
from stepguard.saving.keeper import Keeper
from stepguard.saving.mirroring import RunMirror
from stepguard.saving.nan_guard import NanGuard
from stepguard.saving.noted import Noted
from stepguard.saving.retry import Backoff
from stepguard.saving.writer import CheckpointWriter
from stepguard.steps.copying_budget import COPYING_SHARE
from stepguard.store import CheckpointStore, LogdirHold
from stepguard.store.marks import check_name
from stepguard.watching.observer import Observer
from stepguard.watching.requests import Answer
from stepguard.words import logger

_log = logger(__name__)


class RunSaver(Generic[SessionT]):
    """Saves the sessions of one supervisor, one after the other.

    Threads: all methods are called by the thread that opens and stops a session.

    Args:
        engine: takes the snapshots and writes them.
        store: where checkpoints are committed; ``None`` when only the framework can reach the place.
        events: is told of every checkpoint.
        observer: is told of every checkpoint.
        options: when to save; ``None`` when there is nothing to save or no place to save it.
        mirror: where a second copy goes; ``None`` when there is none.
        on_error: called, in the thread that saves, with the error of a save that was given up; and in a thread of the
            mirror's, when another machine has taken that over.

    Raises:
        ValueError, ModuleNotFoundError: the mirror cannot be opened.
    """

    def __init__(
        self,
        engine: Engine[SessionT],
        *,
        store: CheckpointStore | None,
        events: EventLog | None,
        observer: Observer,
        options: Saving | None,
        mirror: Mirror | None = None,
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._store = store
        self._events = events
        self._observer = observer
        self._options = options if options is not None and options.is_on else None
        self._on_error = on_error
        self._hold: LogdirHold | None = None
        self._mirror: RunMirror | None = None
        if mirror is not None and store is not None and self._options is not None:
            self._mirror = RunMirror(mirror, store, observer=observer, on_error=on_error)
        # Held while a checkpoint is written: see the store.
        self.one_save = threading.Lock() if store is None else store.one_save
        self.writer: CheckpointWriter | None = None
        self.checkpointer: Checkpointer | None = None
        # What the program says of its steps, and where it goes; with the session that says it.
        self._noted = Noted(None if store is None else store.pins.rule)
        self.keeper: Keeper | None = None
        self._session: SessionT | None = None
        self._step_trigger: StepTrigger | None = None
        self._cadence: Cadence | None = None
        if self._options is not None and self._options.overhead is not None:
            self._cadence = Cadence(self._options)

    @property
    def is_on(self) -> bool:
        """Whether anything is ever saved."""
        return self._options is not None

    # --- the logdir ---

    @property
    def holds_logdir(self) -> bool:
        """Whether this process is the chief of the logdir, the only process that saves there."""
        return self._hold is not None

    def claim_logdir(self) -> None:
        """Become the chief of the logdir, if this run saves there, and remove the leftovers of a killed chief.

        With a mirror, what only the mirror has is in the logdir afterwards.

        Raises:
            LogdirInUseError: another process is the chief, or another machine trains into the mirror.
            RemoteError: the mirror cannot be reached, and the logdir has no checkpoint.
        """
        if self._store is None or not self.is_on or self._hold is not None:
            return
        self._hold = self._store.acquire()
        # Sweep only at the first hold: another supervisor of this process may be saving now.
        for leftover in self._store.sweep() if self._hold.is_first else ():
            _log.info("removed %s, left behind by a run that was killed", leftover)
        if self._mirror is not None:
            try:
                self._mirror.begin()
            except BaseException:
                self.leave_logdir()
                raise

    def leave_logdir(self) -> None:
        """Give up being the chief, so that another process may be."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.release()

    def leave_mirror(self, within_secs: float) -> None:
        """Send the end of the history to the mirror, in about ``within_secs``, and let another machine use it."""
        if self._mirror is not None:
            self._mirror.leave(within_secs)

    # --- a session ---

    def start(self, session: SessionT, step: int | None, guard: NanGuard | None) -> Callable[[], None]:
        """Save ``session``, which starts at ``step``, from now on. Returns the function to call on a timer.

        Call this only if :attr:`is_on`.
        """
        assert self._options is not None
        # If an earlier session was not stopped, share its writer: nobody would end that writer otherwise.
        if self.writer is None:
            self.writer = CheckpointWriter(
                Committer(
                    self._engine,
                    self._store,
                    self._events,
                    self._observer,
                    noted=self._noted,
                    on_commit=self._options.on_commit,
                    mirror=self._mirror,
                    cadence=self._cadence,
                ),
                self._on_error,
                retry=Backoff(self._options.max_unprotected_secs),
                one_save=self.one_save,
                guard=guard,
            )
            self.writer.begin()
        if self._mirror is not None:
            self._mirror.trains()
        if isinstance(self._engine, MakesRoom):
            self._engine.make_room(session)
        is_saved, copies_all = self._is_newest_saved(step), self._noted.rule is not None
        checkpointer = Checkpointer(
            self._engine,
            session,
            self.writer,
            is_saved=is_saved,
            copies_all=copies_all,
            cadence=self._cadence,
            copying_share=self._copying_share,
        )
        self.checkpointer = checkpointer
        self._keep(session, checkpointer, self.writer)
        every_steps = self._options.save_model_steps
        if every_steps:
            trigger = StepTrigger(self._engine, session, checkpointer, every_steps, self._on_error)
            self._engine.call_after_steps(session, 1, trigger)
            self._step_trigger = trigger
        return checkpointer

    @property
    def _copying_share(self) -> float:
        overhead = None if self._options is None else self._options.overhead
        # Half of what is allowed: the other half is left for the checkpoints themselves.
        return COPYING_SHARE if overhead is None else min(COPYING_SHARE, overhead / 2)

    def cadence_service(self, session: SessionT) -> CadenceService | None:
        """What is to be called every few moments while ``session`` trains, after :meth:`start`; ``None`` if nothing."""
        cadence, checkpointer, writer = self._cadence, self.checkpointer, self.writer
        if cadence is None or self._options is None or checkpointer is None or writer is None:
            return None
        shared = self._engine if isinstance(self._engine, SharedModel) else None
        cadence.begin(self._engine.steps_done(session), is_shared=shared is not None and shared.is_shared(session))
        return CadenceService(
            self._engine,
            session,
            cadence,
            self._options,
            checkpointer=checkpointer,
            writer=writer,
            is_uploading=lambda: self._mirror is not None and self._mirror.is_uploading,
            tell=lambda report: self._observer.paced(**asdict(report)),
        )

    def _keep(self, session: SessionT, checkpointer: Checkpointer, writer: CheckpointWriter) -> None:
        if self._store is not None:
            # Before the first step: the manifests are read now.
            _log.debug("pinned checkpoints: %s", sorted(self._store.pins.pinned))
        self.keeper = Keeper(self._engine, self._store, checkpointer, writer, self._noted, self._on_error)
        self._session = session
        engine: object = self._engine
        if isinstance(engine, KeepsOnRequest):
            engine.keep_with(session, self.keeper)

    def _is_newest_saved(self, step: int | None) -> bool:
        """Whether the newest checkpoint is a committed one of ``step``, the step at which the session starts."""
        newest = self._store.candidates()[:1] if self._store is not None else []
        return any(one.is_committed and one.name == self._engine.checkpoint_name(step) for one in newest)

    def went_back(self) -> None:
        """Note that the run was put back to an earlier step. At a boundary."""
        if self.checkpointer is not None:
            self.checkpointer.went_back()
        if self._session is not None:
            self._noted.forget_after(self._engine.step(self._session))
        if self._step_trigger is not None:
            self._step_trigger.went_back()

    def save_for(self, name: str | None) -> Answer:
        """Save the last step for somebody outside, and keep it under ``name``, if there is one. On a thread of its own.

        Waits until the checkpoint is committed, or the disk fails.
        """
        checkpointer, writer = self.checkpointer, self.writer
        if checkpointer is None or writer is None:
            return Answer(False, "this run saves nothing")
        if name is not None:
            check_name(name)
        if not writer.wait_until_idle():
            return Answer(False, f"the disk fails: {writer.last_error}")
        if not checkpointer.save_on_request():
            return Answer(
                False,
                "no step boundary came: an evaluation inside a step saves at its end, and without the name; "
                "`stepguard log` tells of anything else",
            )
        step = checkpointer.saved_step
        if not writer.wait_until_idle():
            return Answer(False, f"step {step} is not saved yet, and will be tried again: {writer.last_error}")
        if name is not None:
            self._noted.add(step, name=name)
            writer.mark(step)
            writer.wait_until_marked()
        path = self._engine.checkpoint_name(step)
        return Answer(True, f"saved {path if self._store is None else self._store.root / path}")

    def save_now(self, timeout_secs: float) -> None:
        """Save the last step, after a wait of at most ``timeout_secs`` for the checkpoint that is being written.

        An error goes to ``on_error``.
        """
        checkpointer, writer = self.checkpointer, self.writer
        if checkpointer is None or writer is None or self._options is None or not self._options.saves_last_step:
            return
        try:
            if writer.drain(timeout_secs):
                checkpointer()
        except Exception as error:  # noqa: BLE001 - a thread's edge
            self._on_error(error)

    def note_end(self) -> None:
        """Note that the program ends the run, so that no save waits for it to begin another step."""
        engine: object = self._engine
        if self._session is not None and isinstance(engine, RestsBetweenLoops):
            engine.come_back(self._session)

    def is_outside_steps(self, error: BaseException) -> bool:
        """Whether ``error`` came from the data between two steps, so that the last step can be saved after it."""
        return self.checkpointer is not None and self.checkpointer.is_outside_steps(error)

    def save_last(self, deadline: float, *, is_finished: bool, was_told: bool = False) -> None:
        """Save the last step, if the options ask for it, and wait until it is durable, at most until ``deadline``
        (monotonic clock). The others are as in :meth:`stepguard.saving.checkpointer.Checkpointer.save_last`.

        Raises:
            SaveFailedError: writing took longer.
        """
        engine: object = self._engine
        if self._session is not None and isinstance(engine, KeepsOnRequest):
            engine.hand_over(self._session)
        if self.checkpointer is not None and self._options is not None and self._options.saves_last_step:
            self.checkpointer.save_last(
                max(0.0, deadline - time.monotonic()), is_finished=is_finished, was_told=was_told
            )

    def stop(self, deadline: float) -> bool:
        """Take no more snapshots, end the writer, and wait for the mirror; ``False`` if the writer is still writing at
        ``deadline`` (monotonic clock).
        """
        self._step_trigger = self.keeper = self._session = None
        checkpointer, self.checkpointer = self.checkpointer, None
        if checkpointer is not None:
            checkpointer.close()
        writer, self.writer = self.writer, None
        # Let the writer finish: its snapshot holds a good step, whatever else went wrong.
        is_idle = writer is None or writer.close(max(0.0, deadline - time.monotonic()))
        if is_idle:
            self._forget_removed()
        if self._mirror is not None:
            self._mirror.finish(deadline)
        return is_idle

    def _forget_removed(self) -> None:
        """Remove the manifests of checkpoints that the program's own saver has removed since the last commit."""
        if self._store is None or not self.holds_logdir or not self.one_save.acquire(blocking=False):
            return  # The program's saver is writing: the next start does this.
        try:
            self._store.forget_removed()
        except OSError as error:
            _log.warning("%s: cannot be put in order: %s", self._store.root, error)
        finally:
            self.one_save.release()
