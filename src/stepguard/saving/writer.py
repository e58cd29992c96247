"""The writer thread: makes snapshots durable while training goes on, and tries again when the disk fails."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stepguard.engine import Engine, EventLog, Snapshot
from stepguard.errors import NoBoundaryError, SaveFailedError
from stepguard.saving.nan_guard import NanGuard
from stepguard.store import Checkpoint, CheckpointStore, NameTakenError
from stepguard.watching.observer import Observer

_log = logging.getLogger(__name__)

_FIRST_RETRY_SECS = 1.0
_LONGEST_RETRY_SECS = 60.0
# Besides the tensors: index, meta graph, manifest.
_SPARE_BYTES = 1 << 20
# A generator of our own: to draw from the program's would change what it draws next.
_jitter = random.Random()

# Takes a snapshot at a step boundary; with the seconds that training waited for it.
Take = Callable[[], tuple[Snapshot, float]]


@dataclass(slots=True)
class _Order:
    """One snapshot to be made durable; ``None`` when it has to be taken, after taking it has failed with ``error``."""

    snapshot: Snapshot | None
    stall_secs: float = 0.0
    take: Take | None = None
    error: BaseException | None = None

    @property
    def what(self) -> str:
        """Its name in messages."""
        return "a checkpoint" if self.snapshot is None else f"step {self.snapshot.step}"


class CheckpointWriter:
    """Writes, commits and records one snapshot at a time.

    ``one_save`` is held during each try: others that write checkpoints to the same place hold it too.

    A save that the disk fails is tried again, ever less often, while training goes on; after ``max_unprotected_secs``
    without success it is an error of the run. Where the framework writes the snapshot itself, a new one is taken then.

    ``store`` is ``None`` where checkpoints lie on a file system that only the framework can reach; the framework has
    then written the snapshot itself, and there is nothing left to commit. What ``guard`` does not admit is not
    committed; where the framework has written it already, it is put into quarantine.

    Threads: :meth:`submit`, :meth:`retake`, :meth:`drain` and :meth:`close` from any thread, one at a time; everything
    else happens on the writer's own thread. ``on_error`` is called there with the error of a save that is given up.
    """

    def __init__(
        self,
        engine: Engine[Any],
        store: CheckpointStore | None,
        events: EventLog | None,
        on_error: Callable[[BaseException], None],
        *,
        one_save: threading.Lock | None = None,
        max_unprotected_secs: float,
        first_retry_secs: float = _FIRST_RETRY_SECS,
        observer: Observer | None = None,
        guard: NanGuard | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._events = events
        self.storage_errors: tuple[type[BaseException], ...] = (OSError, *engine.storage_error_types)
        self._on_error = on_error
        self._one_save = threading.Lock() if one_save is None else one_save
        self._max_unprotected_secs = max_unprotected_secs
        self._first_retry_secs = first_retry_secs
        self._observer = observer
        self._guard = guard
        self._mark: int | None = None
        self._wake = threading.Condition(threading.Lock())
        self._waiting: _Order | None = None
        self._busy = False
        self._retrying = False
        self._closing = False
        self._gives_up_at: float | None = None
        self._thread: threading.Thread | None = None
        self._last_bytes = 0
        self._taken_at = 0.0
        self.skipped = 0
        # Why the last try to write the snapshot at hand has failed.
        self.last_error: BaseException | None = None

    def submit(self, snapshot: Snapshot, stall_secs: float = 0.0, take: Take | None = None) -> bool:
        """Have ``snapshot`` written, for which training waited ``stall_secs``; ``False`` while another one is.

        ``take`` takes another one in its place, should what its framework has written not last.
        """
        return self._accept(_Order(snapshot, stall_secs, take))

    def retake(self, take: Take, error: BaseException) -> bool:
        """The framework could not write a snapshot for ``error``, one of the `storage_errors`: have it taken again."""
        return self._accept(_Order(None, take=take, error=error))

    def _accept(self, order: _Order) -> bool:
        with self._wake:
            if self._busy:
                return False
            self._waiting = order
            self._note_moment()
            self._busy = True
            # The deadline of an earlier drain was for an earlier snapshot.
            self._gives_up_at = None
            self._wake.notify_all()
            if self._thread is None:
                self._closing = False
                self._thread = threading.Thread(target=self._run, name="stepguard-writer", daemon=True)
                self._thread.start()
            return True

    def _note_moment(self) -> None:
        """A snapshot was just taken."""
        self._taken_at = time.time()
        self._mark = None if self._guard is None else self._guard.mark()

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written, or waits to be tried again."""
        return self._busy

    @property
    def retrying(self) -> bool:
        """Whether the last try to write the snapshot at hand has failed."""
        return self._retrying

    def warn(self, message: str) -> None:
        """Log what the user should know of the saving of this run, and have it kept. Any thread."""
        _log.warning("%s", message)
        if self._observer is not None:
            self._observer.warn(message)

    def drain(self, timeout_secs: float) -> bool:
        """Wait until nothing is being written; ``False`` if that takes longer than ``timeout_secs``.

        A save that fails is not tried again after that time, but given up with its error.
        """
        with self._wake:
            self._gives_up_at = time.monotonic() + timeout_secs
            self._wake.notify_all()
            return self._wake.wait_for(lambda: not self._busy, min(timeout_secs, threading.TIMEOUT_MAX))

    def close(self, timeout_secs: float) -> bool:
        """Drain, and end the thread; ``False`` if it is still writing after ``timeout_secs``."""
        is_idle = self.drain(timeout_secs)
        with self._wake:
            self._closing = True
            self._wake.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None and is_idle:
            thread.join()
        return is_idle

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting is not None or self._closing)
                order, self._waiting = self._waiting, None
            if order is None:
                return
            try:
                self._write_with_retries(order)
            except NoBoundaryError as error:
                self.warn(f"checkpoint skipped: {error}")
            except Exception as error:  # noqa: BLE001 - a thread's edge: the coordinator carries it on
                self._on_error(error)
            finally:
                del order
                self._retrying = False
                self.last_error = None
                with self._wake:
                    self._busy = False
                    self._wake.notify_all()

    def _write_with_retries(self, order: _Order) -> None:
        began = time.monotonic()
        delay_secs = self._first_retry_secs
        while True:
            gives_up_at = self._gives_up_at
            tried_at = time.monotonic()
            try:
                snapshot = self._taken(order)
                with self._one_save:
                    if self._guard is not None and not self._guard.admits(snapshot, self._mark):
                        self._reject(snapshot)
                        return
                    path = self._make_durable(snapshot)
                break
            except self.storage_errors as error:
                what = order.what
                is_written = order.snapshot is not None and order.snapshot.written is not None
                if order.take is not None and (is_written or isinstance(error, NameTakenError)):
                    # What the framework has written is not to be relied upon, and a name that cannot be had is that of
                    # one step.
                    order.snapshot = None
                self._retrying = True
                self.last_error = error
                unprotected_secs = time.monotonic() - began
                # Jitter: many runs on one failing file system must not all come back at the same moment.
                wait_secs = delay_secs * _jitter.uniform(0.75, 1.25)
                if not self._may_wait(wait_secs, unprotected_secs, gives_up_at):
                    raise SaveFailedError(
                        f"saving {what} has failed for {unprotected_secs:.1f} s: {error}. The "
                        f"checkpoints before it are as they were; make room or repair the disk, and start again",
                        path=None if self._store is None else self._store.root,
                    ) from error
                message = (
                    f"saving {what} failed ({error}); training goes on unprotected since "
                    f"{unprotected_secs:.1f} s, next try in {wait_secs:.1f} s"
                )
                _log.warning("%s", message)
                if self._observer is not None:
                    self._observer.save_failed(message)
            delay_secs = min(2 * delay_secs, _LONGEST_RETRY_SECS)
        self._record(snapshot, path, time.monotonic() - tried_at, order.stall_secs)
        if self._store is not None and snapshot.written is None:
            self._prune(self._store)

    def _taken(self, order: _Order) -> Snapshot:
        """The snapshot, taken now if need be. Raises what taking it has met, at first what it had met already."""
        error, order.error = order.error, None
        if error is not None:
            raise error
        if order.snapshot is None:
            assert order.take is not None
            order.snapshot, order.stall_secs = order.take()
            self._note_moment()
        return order.snapshot

    def _may_wait(self, wait_secs: float, unprotected_secs: float, gave_up_at: float | None) -> bool:
        """Wait until the next try; ``False`` when there is to be none.

        A stop that was requested since the last try began (when the deadline was ``gave_up_at``) ends the wait.
        """
        if unprotected_secs >= self._max_unprotected_secs:
            return False
        with self._wake:
            self._wake.wait_for(lambda: self._gives_up_at != gave_up_at, wait_secs)
            # A stop does not shorten the retries to none: the disk has until its deadline to come back.
            return self._gives_up_at is None or time.monotonic() < self._gives_up_at

    def _record(self, snapshot: Snapshot, path: str, seconds: float, stall_secs: float) -> None:
        """The step is durable: nothing that fails in here has it written again."""
        if self._events is not None:
            self._events.checkpointed(snapshot.step, path)
        _log.info("saved step %s to %s in %.2f s", snapshot.step, path, seconds)
        if self._observer is not None:
            nbytes = self._last_bytes or snapshot.nbytes
            self._observer.checkpointed(os.path.basename(path), snapshot.step, nbytes, seconds, stall_secs)

    def _prune(self, store: CheckpointStore) -> None:
        try:
            store.prune()
        except OSError as error:
            # The step is saved all the same; the next save tries again.
            self.warn(f"an old checkpoint could not be removed: {error}")

    def _make_durable(self, snapshot: Snapshot) -> str:
        store, written = self._store, snapshot.written
        if written is None:
            if store is None:
                raise ValueError(f"the snapshot of step {snapshot.step} is not written, and there is no store for it")
            return str(self._commit(store, snapshot).path)
        if store is not None:
            if store.holds(written):
                name = os.path.basename(written)
                self._adopt(store)
                store.commit_in_place(name, store.step_of(name))
                # Its saver prunes by itself, and knows nothing of manifests.
                store.forget_removed()
            else:
                _log.info(
                    "%s was saved by the program's own saver, in files of its own: no manifest is written", written
                )
        return written

    def _reject(self, snapshot: Snapshot) -> None:
        """Keep a later start from a checkpoint that was written already, and is not to be."""
        store, written = self._store, snapshot.written
        if written is None or store is None or not store.holds(written):
            return
        name = os.path.basename(written)
        for one in store.candidates():
            if one.name == name:
                store.quarantine(one, "the NaN guard was on, and this step or one shortly before it was not finite")
        good = next((one for one in store.candidates() if one.is_committed), None)
        if good is not None:
            store.point_to(good)

    def _commit(self, store: CheckpointStore, snapshot: Snapshot) -> Checkpoint:
        name = self._engine.checkpoint_name(snapshot.step)
        self._adopt(store)
        stage = store.stage(name)
        try:
            self._check_space(store, snapshot)
            digests = self._engine.write(snapshot, stage, name)
            checkpoint = store.commit(name, snapshot.step, digests=digests, taken_at=self._taken_at)
        except BaseException:
            # A full disk stays full when every failed save leaves its files behind.
            with contextlib.suppress(OSError):  # The error that is on its way says more.
                store.discard(stage)
            raise
        if checkpoint.manifest is not None:
            self._last_bytes = checkpoint.manifest.size
        self._engine.committed([(str(one.path), one.time) for one in store.owned])
        return checkpoint

    def _check_space(self, store: CheckpointStore, snapshot: Snapshot) -> None:
        """Not to fill the disk for others with a checkpoint that will not fit."""
        needed = (self._last_bytes or snapshot.nbytes) + _SPARE_BYTES
        usage = shutil.disk_usage(store.root)
        free = usage.free
        # A file system that says it has 0 blocks does not tell: FUSE ones and some network ones.
        if usage.total and free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: a checkpoint needs about {needed} bytes, {free} are free",
                str(store.root),
            )

    def _adopt(self, store: CheckpointStore) -> None:
        """Take over what the program has saved through its framework since, and forget what that has removed."""
        kept = self._engine.kept_checkpoints()
        if kept and set(kept) != {one.name for one in store.owned}:
            found = {one.name: one for one in store.candidates()}
            store.adopt([found[name] for name in kept if name in found])
