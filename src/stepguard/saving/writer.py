"""The writer thread: makes one snapshot at a time durable while training goes on, and retries when the disk fails.

The protocol: a thread that has taken a snapshot submits it as the writer's order and goes on at once. The writer
accepts no second order before the first is done or given up, so no thread waits to submit one. The writer's thread
waits on the condition ``_wake`` for an order, and between two tries for the time of the next; a retake also waits for a
step boundary, whose wait has a limit. :meth:`CheckpointWriter.drain` waits on the same condition until the order is
gone, at most for its timeout. It wakes a writer that waits for its next try, and sets the deadline after which a failed
try is the last. The lock of the condition is never held during a write.

A step is marked between two orders: its checkpoint gets what the program has said of it since the commit. An order that
waits for the disk to recover delays the marks, and a drain waits for them too.

``one_save`` is held during a try, but never while the writer waits for a step boundary or for the next try. The other
holders of ``one_save`` (the program's own saves, the NaN guard) do not wait for an order, so no circle of waits exists.
A kill during the write leaves a stage, which the next chief sweeps; a kill after the manifest leaves a committed
checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from stepguard.disk.system import yield_to_others
from stepguard.engine import Snapshot
from stepguard.errors import NoBoundaryError, SaveFailedError, StepguardError
from stepguard.saving.commit import Committer
from stepguard.saving.nan_guard import NanGuard
from stepguard.saving.retry import Retry
from stepguard.store import NameTakenError

# Takes a snapshot at a step boundary; returns it with the seconds that training waited.
Take = Callable[[], tuple[Snapshot, float]]


@dataclass(slots=True)
class _Order:
    """One snapshot to be made durable. ``snapshot`` is ``None`` if it must be taken again, after ``error``."""

    snapshot: Snapshot | None
    stall_secs: float = 0.0
    take: Take | None = None
    error: BaseException | None = None
    # When the snapshot was taken (Unix time), and the NaN guard's mark at that time.
    taken_at: float = field(default_factory=time.time)
    mark: int | None = None
    failed_tries: int = 0
    last_error: BaseException | None = None

    @property
    def what(self) -> str:
        """The name of the snapshot in messages."""
        return "a checkpoint" if self.snapshot is None else f"step {self.snapshot.step}"


class CheckpointWriter:
    """Writes, commits and records one snapshot at a time.

    A save that fails because of the disk is tried again while training goes on, as long as ``retry`` allows; after that
    it is an error of the run. If the framework writes the snapshot itself, each try takes a new one. A snapshot that
    ``guard`` does not admit is not committed; if the framework has already written it, it goes to quarantine.

    ``one_save`` is held during each try. Every other writer of checkpoints in the same place holds it too.

    Threads: :meth:`submit`, :meth:`retake`, :meth:`drain` and :meth:`close` from any thread, one at a time; everything
    else happens in the writer's own thread, including the call of ``on_error`` with the error of a save given up.
    """

    def __init__(
        self,
        committer: Committer,
        on_error: Callable[[BaseException], None],
        *,
        retry: Retry,
        one_save: threading.Lock | None = None,
        guard: NanGuard | None = None,
    ) -> None:
        self._committer = committer
        self._on_error = on_error
        self._retry = retry
        self._one_save = threading.Lock() if one_save is None else one_save
        self._guard = guard
        self._wake = threading.Condition(threading.Lock())
        # `_order` is set until the order is done; `_waiting` is the same order until the thread takes it.
        self._order: _Order | None = None
        self._waiting: _Order | None = None
        # The steps whose checkpoints are to be marked, once nothing is being written.
        self._unmarked: set[int | None] = set()
        self._is_marking = False
        self._gives_up_at: float | None = None
        self._thread: threading.Thread | None = None

    @property
    def storage_errors(self) -> tuple[type[BaseException], ...]:
        """The errors that are raised when the disk fails."""
        return self._committer.storage_errors

    @property
    def root(self) -> Path | None:
        """The directory of the checkpoints; ``None`` without a store."""
        return self._committer.root

    @property
    def where(self) -> str:
        """That directory, as an error begins."""
        return "" if self.root is None else f"{self.root}: "

    def begin(self) -> None:
        """Start the thread. Without this the first order does, and some versions of Python start none at the exit of
        the process, where the last step may be the first that is saved.
        """
        with self._wake:
            self._start()

    def submit(self, snapshot: Snapshot, stall_secs: float = 0.0, take: Take | None = None) -> bool:
        """Have ``snapshot`` written, for which training waited ``stall_secs``; ``False`` if the writer is busy.

        If the files that the framework has written itself fail to commit, ``take`` takes another snapshot.
        """
        return self._accept(_Order(snapshot, stall_secs, take))

    def retake(self, take: Take, error: BaseException) -> bool:
        """Have a snapshot taken again by ``take``, after the framework failed to write one with ``error``, one of the
        `storage_errors`; ``False`` if the writer is busy.
        """
        return self._accept(_Order(None, take=take, error=error))

    def _accept(self, order: _Order) -> bool:
        with self._wake:
            if self._order is not None:
                return False
            order.mark = self._mark()
            self._order = self._waiting = order
            # The deadline of an earlier drain does not apply to this snapshot.
            self._gives_up_at = None
            self._wake.notify_all()
            self._start()
            return True

    def _start(self) -> None:
        """Start the thread, unless it runs; with the lock."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="stepguard-writer", daemon=True)
            self._thread.start()

    def mark(self, step: int | None) -> None:
        """Have the checkpoint of ``step`` marked with what the program has said of it, once it is committed."""
        with self._wake:
            self._unmarked.add(step)
            self._wake.notify_all()
            self._start()

    def wait_until_idle(self) -> bool:
        """Wait for the end of the write at hand; ``False`` at once if it has failed and waits for its next try."""
        with self._wake:
            return self._wake.wait_for(lambda: self._order is None or self.retrying) and self._order is None

    def wait_until_marked(self) -> None:
        """Wait until everything that was committed has its marks."""
        with self._wake:
            self._wake.wait_for(lambda: self._is_done() or self.retrying)

    def _mark(self) -> int | None:
        return None if self._guard is None else self._guard.mark()

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written or waits for its next try."""
        return self._order is not None

    @property
    def retrying(self) -> bool:
        """Whether a try to write the current snapshot has failed."""
        order = self._order
        return order is not None and order.failed_tries > 0

    @property
    def last_error(self) -> BaseException | None:
        """Why the last try to write the snapshot at hand has failed."""
        order = self._order
        return None if order is None else order.last_error

    def warn(self, message: str) -> None:
        """Log a warning about saving, and keep it in the run's record. Any thread."""
        self._committer.warn(message)

    def drain(self, timeout_secs: float) -> bool:
        """Wait until nothing is being written; ``False`` if that takes longer than ``timeout_secs``.

        A save that fails after that time is not tried again, but given up with its error.
        """
        with self._wake:
            self._gives_up_at = time.monotonic() + timeout_secs
            self._wake.notify_all()
            return self._wake.wait_for(self._is_done, min(timeout_secs, threading.TIMEOUT_MAX))

    def _is_done(self) -> bool:
        return self._order is None and not self._unmarked and not self._is_marking

    def close(self, timeout_secs: float) -> bool:
        """Drain, and end the thread; ``False`` if the thread is still writing after ``timeout_secs``."""
        began = time.monotonic()
        is_idle = self.drain(timeout_secs)
        with self._wake:
            # It ends when it is not this any more, although another thread of the program may have the next one begin.
            thread, self._thread = self._thread, None
            self._wake.notify_all()
        if thread is not None and is_idle:
            thread.join()
        self._committer.close(began + timeout_secs)
        return is_idle

    # --- the writer's thread ---

    def _run(self) -> None:
        yield_to_others()
        me = threading.current_thread()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting is not None or self._unmarked or self._thread is not me)
                order, self._waiting = self._waiting, None
            if order is None:
                if not self._unmarked:
                    return
                self._mark_next()
                continue
            try:
                self._write_with_retries(order)
            except NoBoundaryError as error:
                self.warn(f"checkpoint skipped: {error}")
            except Exception as error:  # noqa: BLE001 - a thread's edge: the coordinator raises it
                self._on_error(error)
            finally:
                del order
                with self._wake:
                    self._order = None
                    self._wake.notify_all()

    def _mark_next(self) -> None:
        """Mark one checkpoint. What cannot be noted costs a warning: the checkpoint itself is as good as before."""
        with self._wake:
            # Before the marks are read: what is said from now on is marked once more.
            step, self._is_marking = self._unmarked.pop(), True
        try:
            with self._one_save:
                self._committer.mark(step)
        except (StepguardError, OSError) as error:
            self.warn(f"what the program said of step {step} could not be noted in its checkpoint: {error}")
        except Exception as error:  # noqa: BLE001 - a thread's edge: the coordinator raises it
            self._on_error(error)
        finally:
            with self._wake:
                self._is_marking = False
                self._wake.notify_all()

    def _write_with_retries(self, order: _Order) -> None:
        began = time.monotonic()
        while True:
            gives_up_at = self._gives_up_at
            tried_at = time.monotonic()
            try:
                saved = self._try(order)
                break
            except self.storage_errors as error:
                with self._wake:
                    order.failed_tries += 1
                    # Who waits for the end of this write is not to wait for the disk's recovery.
                    self._wake.notify_all()
                self._wait_after(error, order, time.monotonic() - began, gives_up_at)
        if saved is not None:
            self._committer.record(*saved, time.monotonic() - tried_at, order.stall_secs)

    def _try(self, order: _Order) -> tuple[Snapshot, str] | None:
        """Return the snapshot and the path at which it is durable; ``None`` if the guard did not admit it."""
        snapshot = self._taken(order)
        with self._one_save:
            if self._guard is not None and not self._guard.admits(snapshot, order.mark):
                self._committer.reject(snapshot)
                return None
            return snapshot, self._committer.commit(snapshot, order.taken_at)

    def _taken(self, order: _Order) -> Snapshot:
        """Return the snapshot, taken now if it is missing. Raise the earlier error once, as that of the first try."""
        error, order.error = order.error, None
        if error is not None:
            raise error
        if order.snapshot is None:
            assert order.take is not None
            order.snapshot, order.stall_secs = order.take()
            order.taken_at, order.mark = time.time(), self._mark()
        return order.snapshot

    def _wait_after(self, error: BaseException, order: _Order, failing_secs: float, gave_up_at: float | None) -> None:
        """After a try failed with ``error``, wait for the next one, or raise SaveFailedError if that was the last."""
        what = order.what
        is_written = order.snapshot is not None and order.snapshot.written is not None
        if order.take is not None and (is_written or isinstance(error, NameTakenError)):
            # What the framework has written is not to be relied upon; a name that cannot be had is that of one step.
            order.snapshot = None
        order.last_error = error
        wait_secs = self._retry(order.failed_tries, failing_secs)
        if wait_secs is None or not self._may_wait(wait_secs, gave_up_at):
            raise SaveFailedError(
                f"{self.where}saving {what} has failed for {failing_secs:.1f} s: {error}. The "
                f"checkpoints before it are as they were; make room or repair the disk, and start again",
                path=self.root,
            ) from error
        self._committer.warn_of_failure(
            f"{self.where}saving {what} failed ({error}); training goes on, unprotected for {failing_secs:.1f} s so "
            f"far; next try in {wait_secs:.1f} s"
        )

    def _may_wait(self, wait_secs: float, gave_up_at: float | None) -> bool:
        """Wait until the next try; ``False`` if there is no next try.

        ``gave_up_at`` is the deadline at the start of the last try. A drain since then has changed it: that ends the
        wait.
        """
        with self._wake:
            self._wake.wait_for(lambda: self._gives_up_at != gave_up_at, wait_secs)
            # A drain does not end the retries at once: the disk has until the deadline to recover.
            return self._gives_up_at is None or time.monotonic() < self._gives_up_at
