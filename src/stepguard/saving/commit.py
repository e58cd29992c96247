"""The committer: makes one snapshot durable, and records the new checkpoint."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stepguard.engine import Engine, EventLog, PartlyUnchanging, Snapshot
from stepguard.saving.adoption import Adoption
from stepguard.saving.cadence import Cadence
from stepguard.saving.commit_hook import CommitHook, Committed
from stepguard.saving.mirroring import RunMirror
from stepguard.saving.noted import Noted
from stepguard.store import CheckpointStore, FileRecord
from stepguard.watching.observer import Observer
from stepguard.words import logger

_log = logger(__name__)

# Room for the files besides the tensors: index, meta graph, manifest.
_SPARE_BYTES = 1 << 20


class Committer:
    """Commits snapshots to a store, and tells the event log, the observer and the mirror of them. Writer thread.

    ``store`` is ``None`` if checkpoints are on a file system that only the framework can reach. The framework has then
    written the snapshot itself, and nothing is left to commit.
    """

    def __init__(
        self,
        engine: Engine[Any],
        store: CheckpointStore | None,
        events: EventLog | None = None,
        observer: Observer | None = None,
        noted: Noted | None = None,
        on_commit: Callable[[Committed], object] | None = None,
        mirror: RunMirror | None = None,
        cadence: Cadence | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._events = events
        self._observer = observer
        self._noted = Noted() if noted is None else noted
        self._hook = None if on_commit is None else CommitHook(on_commit, self.warn)
        self._mirror = mirror
        self._cadence = cadence
        self._adoption = None if store is None else Adoption(engine, store)
        self._last_bytes = 0
        # Of the last checkpoint, without files that it shares with an earlier one.
        self._written_bytes = 0
        # Then the framework prunes by itself.
        self._is_written_by_framework = False
        self._has_failed = False
        self._has_warned_of_name = False
        self.storage_errors: tuple[type[BaseException], ...] = (OSError, *engine.storage_error_types)

    @property
    def root(self) -> Path | None:
        """The directory of the store, if there is one."""
        return None if self._store is None else self._store.root

    def commit(self, snapshot: Snapshot, taken_at: float) -> str:
        """Make ``snapshot`` durable and return its path. ``taken_at`` is the Unix time when it was taken."""
        if snapshot.written is not None:
            if self._adoption is not None:
                self._adoption.commit(snapshot.written, self._noted.of(snapshot.step))
            return snapshot.written
        if self._store is None or self._adoption is None:
            raise ValueError(f"the snapshot of step {snapshot.step} is not written, and there is no store for it")
        return str(self._write(self._store, self._adoption, snapshot, taken_at))

    def mark(self, step: int | None) -> None:
        """Note in the checkpoint of ``step`` what the program has said of it since, if there is such a checkpoint."""
        if self._store is None or self._adoption is None:
            return
        name = self._engine.checkpoint_name(step)
        try:
            changed = self._store.mark(name, self._store.pins.marks_of(name).joined(self._noted.of(step)))
        except FileNotFoundError:
            return  # It was not committed: the NaN guard did not admit it, or a save was given up.
        if changed:
            self._adoption.tell()
            if self._mirror is not None:
                self._mirror.marked(name)
            if not self._is_written_by_framework:
                self._prune(self._store)

    def reject(self, snapshot: Snapshot) -> None:
        """Discard ``snapshot``. If the framework has already written it, quarantine it against later starts."""
        if snapshot.written is not None and self._adoption is not None:
            self._adoption.reject(snapshot.written)

    def record(self, snapshot: Snapshot, path: str, secs: float, stall_secs: float) -> None:
        """Record that ``snapshot`` is durable at ``path``. A failure in here does not repeat the write."""
        if self._events is not None:
            self._events.checkpointed(snapshot.step, path)
        _log.info("saved step %s to %s in %.2f s", snapshot.step, path, secs)
        if self._observer is not None:
            nbytes = self._last_bytes or snapshot.nbytes
            self._observer.checkpointed(os.path.basename(path), snapshot.step, nbytes, secs, stall_secs)
        if self._cadence is not None:
            self._cadence.wrote(snapshot.nbytes if snapshot.written is not None else self._written_bytes)
        if self._mirror is not None:
            # Before the pruning, which must not be faster than the uploader.
            self._mirror.committed(os.path.basename(path))
        if self._hook is not None:
            marks = self._noted.of(snapshot.step)
            self._hook.tell(Committed(Path(path), snapshot.step, marks.metrics, marks.names))
        self._is_written_by_framework = snapshot.written is not None
        if self._store is not None and snapshot.written is None:
            self._prune(self._store)

    def close(self, deadline: float) -> None:
        """Wait for the program's own work after the commits, until ``deadline`` (monotonic clock). Any thread."""
        if self._hook is not None:
            self._hook.close(deadline)

    def warn(self, message: str) -> None:
        """Log a warning about saving, and keep it in the run's record. Any thread."""
        _log.warning("%s", message)
        if self._observer is not None:
            self._observer.warn(message)

    def warn_of_failure(self, message: str) -> None:
        """Log and record a try that has failed and will be repeated."""
        _log.warning("%s", message)
        if self._observer is not None:
            self._observer.save_failed(message)

    def _write(self, store: CheckpointStore, adoption: Adoption, snapshot: Snapshot, taken_at: float) -> Path:
        name = self._engine.checkpoint_name(snapshot.step)
        step = store.step_of(name)
        if step != snapshot.step and not self._has_warned_of_name:
            self._has_warned_of_name = True
            self.warn(f"no name can hold the step {snapshot.step}: such steps are saved as {name}, one over the other")
        adoption.adopt()
        stage = store.stage(name)
        try:
            self._check_space(store, snapshot)
            # After an error of the disk, nothing is taken from files of earlier ones: it may have lost those.
            with contextlib.nullcontext() if self._has_failed else store.repeating(name):
                digests = self._engine.write(snapshot, stage, name)
            checkpoint = store.commit(
                name, step, digests=digests, taken_at=taken_at, marks=self._noted.of(snapshot.step)
            )
        except BaseException as error:
            # A disk that is full has lost nothing that it had.
            is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            self._has_failed = self._has_failed or not is_full
            # A full disk would stay full if every failed save left its files behind.
            with contextlib.suppress(OSError):  # The original error says more.
                store.discard(stage)
            raise
        self._has_failed = False
        if checkpoint.manifest is not None:
            self._last_bytes = checkpoint.manifest.size
            self._written_bytes = _written_bytes(store.root, checkpoint.manifest.files)
        adoption.tell()
        return checkpoint.path

    def _check_space(self, store: CheckpointStore, snapshot: Snapshot) -> None:
        """Raise OSError before a checkpoint that will not fit fills the disk for everyone."""
        needed = self._bytes_to_write(store, snapshot) + _SPARE_BYTES
        usage = shutil.disk_usage(store.root)
        free = usage.free
        # A file system that says it has 0 blocks does not tell: FUSE ones and some network ones.
        if usage.total and free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: a checkpoint needs about {needed} bytes "
                f"({needed - _SPARE_BYTES} for the state, and 1 MiB to spare), {free} are free",
                str(store.root),
            )

    def _bytes_to_write(self, store: CheckpointStore, snapshot: Snapshot) -> int:
        """About the bytes that a write of ``snapshot`` takes of the disk: files that are shared take none."""
        if self._has_failed:
            return self._last_bytes or snapshot.nbytes
        found = self._written_bytes or snapshot.nbytes
        if store.newest is None or not isinstance(snapshot, PartlyUnchanging):
            return found
        # The last one may have been the first, which wrote the whole.
        return min(found, snapshot.nbytes - snapshot.unchanging_nbytes)

    def _prune(self, store: CheckpointStore) -> None:
        try:
            store.prune(protect=() if self._hook is None else self._hook.unfinished)
        except OSError as error:
            # The step is saved anyway; the next save prunes again.
            self.warn(f"an old checkpoint could not be removed: {error}")


def _written_bytes(root: Path, records: Iterable[FileRecord]) -> int:
    """The bytes of these files, without those that are also files of an earlier checkpoint: those were not written."""
    nbytes = 0
    for record in records:
        with contextlib.suppress(OSError):  # The program may remove what was committed.
            nbytes += record.size if os.stat(root / record.name).st_nlink == 1 else 0
    return nbytes
