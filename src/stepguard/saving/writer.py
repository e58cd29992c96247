"""The writer thread: one snapshot at a time is made durable while training goes on, again if the disk fails.

The protocol: whoever has taken a snapshot leaves it as the writer's order and goes on at once; while there is an order
no other is accepted, so nobody ever waits to hand one over. The writer's thread takes the order, and removes it when it
is done or given up. It waits for nobody but, between two tries, for the clock. :meth:`CheckpointWriter.drain` waits for
the order to be gone, for a time that it is given, and wakes a writer that waits for its next try: from then on a try
that fails after the deadline is the last. During a try ``one_save`` is held; whoever else holds it (the program that
saves by itself, the NaN guard that puts the session back) waits for no order, so that neither waits for the other in a
circle. A kill at any point leaves a stage that the next chief sweeps, or a committed checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from stepguard.engine import Snapshot
from stepguard.errors import NoBoundaryError, SaveFailedError
from stepguard.saving.commit import Committer
from stepguard.saving.nan_guard import NanGuard
from stepguard.saving.retry import Retry

# Takes a snapshot at a step boundary; with the seconds that training waited for it.
Take = Callable[[], tuple[Snapshot, float]]


@dataclass(slots=True)
class _Order:
    """One snapshot to be made durable; ``None`` when it has to be taken, after taking it has failed with ``error``."""

    snapshot: Snapshot | None
    stall_secs: float = 0.0
    take: Take | None = None
    error: BaseException | None = None
    # When the snapshot was taken (Unix time), and what the guard knew then.
    taken_at: float = field(default_factory=time.time)
    mark: int | None = None
    failed_tries: int = 0

    @property
    def what(self) -> str:
        """Its name in messages."""
        return "a checkpoint" if self.snapshot is None else f"step {self.snapshot.step}"


class CheckpointWriter:
    """Writes, commits and records one snapshot at a time.

    A save that the disk fails is tried again while training goes on, as often as ``retry`` wants; then it is an error
    of the run. Where the framework writes the snapshot itself, a new one is taken for each try. What ``guard`` does not
    admit is not committed; where the framework has written it already, it is put into quarantine.

    ``one_save`` is held during each try: others that write checkpoints to the same place hold it too.

    Threads: :meth:`submit`, :meth:`retake`, :meth:`drain` and :meth:`close` from any thread, one at a time; everything
    else happens on the writer's own thread. ``on_error`` is called there with the error of a save that is given up.
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
        # The one that is not done yet, and the same until the thread takes it.
        self._order: _Order | None = None
        self._waiting: _Order | None = None
        self._closing = False
        self._gives_up_at: float | None = None
        self._thread: threading.Thread | None = None

    @property
    def storage_errors(self) -> tuple[type[BaseException], ...]:
        """What is raised when the disk fails."""
        return self._committer.storage_errors

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
            if self._order is not None:
                return False
            order.mark = self._mark()
            self._order = self._waiting = order
            # The deadline of an earlier drain was for an earlier snapshot.
            self._gives_up_at = None
            self._wake.notify_all()
            if self._thread is None:
                self._closing = False
                self._thread = threading.Thread(target=self._run, name="stepguard-writer", daemon=True)
                self._thread.start()
            return True

    def _mark(self) -> int | None:
        return None if self._guard is None else self._guard.mark()

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written, or waits to be tried again."""
        return self._order is not None

    @property
    def retrying(self) -> bool:
        """Whether the last try to write the snapshot at hand has failed."""
        order = self._order
        return order is not None and order.failed_tries > 0

    def warn(self, message: str) -> None:
        """Log what the user should know of the saving of this run, and have it kept. Any thread."""
        self._committer.warn(message)

    def drain(self, timeout_secs: float) -> bool:
        """Wait until nothing is being written; ``False`` if that takes longer than ``timeout_secs``.

        A save that fails is not tried again after that time, but given up with its error.
        """
        with self._wake:
            self._gives_up_at = time.monotonic() + timeout_secs
            self._wake.notify_all()
            return self._wake.wait_for(lambda: self._order is None, min(timeout_secs, threading.TIMEOUT_MAX))

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

    # --- the writer's thread ---

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
                with self._wake:
                    self._order = None
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
                self._wait_after(error, order, time.monotonic() - began, gives_up_at)
        if saved is not None:
            self._committer.record(*saved, time.monotonic() - tried_at, order.stall_secs)

    def _try(self, order: _Order) -> tuple[Snapshot, str] | None:
        """The snapshot, and where it is durable; ``None`` if it is not finite, and so not saved."""
        snapshot = self._taken(order)
        with self._one_save:
            if self._guard is not None and not self._guard.admits(snapshot, order.mark):
                self._committer.reject(snapshot)
                return None
            return snapshot, self._committer.commit(snapshot, order.taken_at)

    def _taken(self, order: _Order) -> Snapshot:
        """The snapshot, taken now if need be. Re-raises the earlier error of taking it once, as the first try's."""
        error, order.error = order.error, None
        if error is not None:
            raise error
        if order.snapshot is None:
            assert order.take is not None
            order.snapshot, order.stall_secs = order.take()
            order.taken_at, order.mark = time.time(), self._mark()
        return order.snapshot

    def _wait_after(self, error: BaseException, order: _Order, failing_secs: float, gave_up_at: float | None) -> None:
        """A try has failed with ``error``: wait for the next one, or raise SaveFailedError if there is to be none."""
        what = order.what
        if order.take is not None and order.snapshot is not None and order.snapshot.written is not None:
            # What the framework has written is not to be relied upon.
            order.snapshot = None
        order.failed_tries += 1
        wait_secs = self._retry(order.failed_tries, failing_secs)
        if wait_secs is None or not self._may_wait(wait_secs, gave_up_at):
            raise SaveFailedError(
                f"saving {what} has failed for {failing_secs:.1f} s: {error}. The "
                f"checkpoints before it are as they were; make room or repair the disk, and start again",
                path=self._committer.root,
            ) from error
        self._committer.warn_of_failure(
            f"saving {what} failed ({error}); training goes on unprotected since "
            f"{failing_secs:.1f} s, next try in {wait_secs:.1f} s"
        )

    def _may_wait(self, wait_secs: float, gave_up_at: float | None) -> bool:
        """Wait until the next try; ``False`` when there is to be none.

        A stop that was requested since the last try began (when the deadline was ``gave_up_at``) ends the wait.
        """
        with self._wake:
            self._wake.wait_for(lambda: self._gives_up_at != gave_up_at, wait_secs)
            # A stop does not shorten the retries to none: the disk has until its deadline to come back.
            return self._gives_up_at is None or time.monotonic() < self._gives_up_at
