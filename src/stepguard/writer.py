"""The writer thread: makes snapshots durable while training goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from stepguard.engine import Engine, EventLog, Snapshot
from stepguard.store import Checkpoint, CheckpointStore

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes, commits and records one snapshot at a time.

    ``store`` is ``None`` where checkpoints lie on a file system that only the framework can reach; the framework has
    then written the snapshot itself, and there is nothing left to commit.

    Threads: :meth:`submit` from any thread; everything else happens on the writer's own thread. ``on_error`` is called
    there with the error of a save that failed.
    """

    def __init__(
        self,
        engine: Engine[Any],
        store: CheckpointStore | None,
        events: EventLog | None,
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._store = store
        self._events = events
        self._on_error = on_error
        self._wake = threading.Condition(threading.Lock())
        self._waiting: Snapshot | None = None
        self._busy = False
        self._closing = False
        self._thread: threading.Thread | None = None
        self.skipped = 0

    def submit(self, snapshot: Snapshot) -> None:
        """Have ``snapshot`` written. For one caller at a time, which has found the writer not :attr:`busy`."""
        with self._wake:
            self._waiting = snapshot
            self._busy = True
            self._wake.notify_all()
            if self._thread is None:
                self._closing = False
                self._thread = threading.Thread(target=self._run, name="stepguard-writer", daemon=True)
                self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written."""
        return self._busy

    def drain(self, timeout_secs: float) -> bool:
        """Wait until nothing is being written; ``False`` when that took longer than ``timeout_secs``."""
        with self._wake:
            return self._wake.wait_for(lambda: not self._busy, timeout_secs)

    def close(self, timeout_secs: float) -> bool:
        """Drain, and end the thread. ``False`` when the thread is still writing after ``timeout_secs``."""
        deadline = time.monotonic() + timeout_secs
        with self._wake:
            self._closing = True
            self._wake.notify_all()
            thread, self._thread = self._thread, None
        if thread is None:
            return True
        thread.join(max(0.0, deadline - time.monotonic()))
        return not thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting is not None or self._closing)
                snapshot, self._waiting = self._waiting, None
            if snapshot is None:
                return
            try:
                self._write(snapshot)
            except Exception as error:  # noqa: BLE001 - a thread's edge: the coordinator carries it to the training thread
                self._on_error(error)
            finally:
                del snapshot
                with self._wake:
                    self._busy = False
                    self._wake.notify_all()

    def _write(self, snapshot: Snapshot) -> None:
        began = time.monotonic()
        path = snapshot.written if self._store is None else str(self._commit(self._store, snapshot).path)
        if path is None:
            raise ValueError(
                f"the snapshot of step {snapshot.step} is not written, and there is no store to write it to"
            )
        if self._events is not None:
            self._events.checkpointed(snapshot.step, path)
        _log.info("saved step %s to %s in %.2f s", snapshot.step, path, time.monotonic() - began)
        if self._store is not None and snapshot.written is None:
            self._store.prune()

    def _commit(self, store: CheckpointStore, snapshot: Snapshot) -> Checkpoint:
        name = self._engine.checkpoint_name(snapshot.step)
        if snapshot.written is not None:
            return store.commit_in_place(name, snapshot.step)
        self._adopt(store)
        stage = store.stage(name)
        try:
            self._engine.write(snapshot, stage, name)
            checkpoint = store.commit(name, snapshot.step)
        except BaseException:
            # A full disk stays full when every failed save leaves its files behind.
            store.discard(stage)
            raise
        self._engine.committed([(str(one.path), one.time) for one in store.owned])
        return checkpoint

    def _adopt(self, store: CheckpointStore) -> None:
        """Take over what the program has saved through its framework since, and forget what that has removed."""
        kept = self._engine.kept_checkpoints()
        if kept and set(kept) != {one.name for one in store.owned}:
            found = {one.name: one for one in store.candidates()}
            store.adopt([found[name] for name in kept if name in found])
