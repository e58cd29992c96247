"""CheckpointStore: commit, list, verify, newest good, prune.

The files in the directory are the truth. The state file ``checkpoint`` is written for TensorFlow's tools, and read only
as a hint. Hidden names in the directory are the store's own (see `stepguard.store.layout`); a killed chief may leave
some behind, which the next chief sweeps.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepguard.disk import files
from stepguard.errors import CheckpointError
from stepguard.options.checks import check_local
from stepguard.store import (
    earlier,
    leftovers,
    lock,
    mending,
    recovery,
    rollback,
    staging,
    stated,
    statefile,
    verification,
)
from stepguard.store import layout as layouts
from stepguard.store.checkpoint import Checkpoint, Damage, Recovery
from stepguard.store.held_logdir import HeldLogdir
from stepguard.store.layout import Layout, SaverFiles
from stepguard.store.manifest import FileRecord, Manifest
from stepguard.store.marks import BestRule, Marks
from stepguard.store.pins import Pins
from stepguard.store.retention import Retention
from stepguard.store.rollback import Rollback
from stepguard.store.staging import Staging
from stepguard.store.stated import Stated
from stepguard.words import listed, logger

_log = logger(__name__)


class CheckpointStore:
    """The checkpoints of one ``basename`` in the directory ``root``. Constructing it touches no disk.

    Raises ValueError if ``root`` is an address such as ``s3://bucket/run``.

    ``saver_files`` are the names of checkpoints without a manifest, which the framework's own tools wrote, such as
    `stepguard.store.tensorflow_files`. None means that only committed checkpoints count. ``max_to_keep`` and
    ``keep_every_n_hours`` are for `prune`, and so is ``keep_best``: the best checkpoints by one metric, which are kept
    beside them. ``clock`` returns Unix time.

    Any thread and process may read (`candidates`, `read_manifest`, `verify`, and `newest_good` with
    ``quarantine=False``). Everything else is for one thread at a time, in the process that holds the chief's lock.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        basename: str = "model.ckpt",
        engine: str = "unknown",
        saver_files: SaverFiles | None = None,
        relative_paths: bool = False,
        max_to_keep: int | None = None,
        keep_every_n_hours: float | None = None,
        keep_best: tuple[str, str, int] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_local("the directory of a store", root)
        self.root = Path(root)
        """The directory."""
        self.engine = engine
        """The name of the engine that writes here, for manifests."""
        self._layout = Layout(self.root, basename, saver_files)
        self._retention = Retention(max_to_keep, keep_every_n_hours)
        self.pins = Pins(self._layout, BestRule.of(keep_best))
        """The checkpoints that are kept for their names or their metrics."""
        self.spare: recovery.Spare | None = None
        """What repairs a search of the chief's from a second copy; ``None`` if there is none."""
        self.one_save = threading.Lock()
        """Held during each write of a checkpoint here, by the writer or by the program's own saver."""
        self._clock = clock
        self._newest_good: str | None = None
        self._staging = Staging(self._layout)
        self._stated = Stated(self._layout, relative_paths=relative_paths, opened_at=clock())
        self._logdir = HeldLogdir(self.root)

    @property
    def newest(self) -> str | None:
        """The name of the newest good checkpoint, as far as this process has committed one or searched for it."""
        return self._newest_good

    @property
    def basename(self) -> str:
        """The beginning of the names of the checkpoints."""
        return self._layout.basename

    def step_of(self, name: str) -> int | None:
        """Return the step in a name; None if it has none. Raises ValueError if the name is not of this store."""
        return self._layout.step_of(name)

    def name(self, step: int | None) -> str:
        """Return the name of the checkpoint of a step; None stands for a program that counts no steps."""
        return self.basename if step is None else f"{self.basename}-{step}"

    # --- commit ---

    def stage(self, name: str) -> Path:
        """Return an empty hidden directory on the filesystem of the store, for the files of the checkpoint ``name``.

        The engine writes files ``stage/NAME.<suffix>``, or a directory ``stage/NAME/``. Call `commit` after that, or
        `discard` if it failed. A missing logdir is created; if it existed when `acquire` was called, then only on the
        same file system.
        """
        self._layout.step_of(name)
        self._logdir.make()
        self._keep_hold()
        return self._staging.begin(name)

    def repeating(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A block in which the files of the staged checkpoint ``name`` share their bytes with the newest good one.

        Only those do that are equal, byte for byte: see `stepguard.disk.new_file.repeating`.
        """
        return self._staging.repeating(name, self._newest_good)

    def discard(self, stage: Path) -> None:
        """Remove a staging directory and its contents. It is no error if it is already gone."""
        self._staging.discard(stage)

    def commit(
        self,
        name: str,
        step: int | None,
        *,
        extra: Mapping[str, Any] | None = None,
        digests: Mapping[str, tuple[int, str]] | None = None,
        taken_at: float | None = None,
        marks: Marks | None = None,
    ) -> Checkpoint:
        """Make the staged checkpoint ``name`` durable, and the newest. When it returns, no crash can lose it.

        ``digests`` has the sizes and digests of files that were digested during their write
        (`stepguard.disk.new_file.NewFile`), by their names in the staging directory; other files are read for that.
        ``taken_at`` is the Unix time of the snapshot, which counts as the age of the checkpoint: a slow write does not
        make its step newer. ``marks`` are noted of it; a checkpoint that it replaces hands its names on.

        Raises LogdirInUseError if the logdir was cleared, and has another chief since. Raises OSError as it came if the
        disk fails: then every other checkpoint is as it was, and one of the same
        name can still be restored. A retry begins with `stage`: what was fsynced in vain must be written again.
        """
        stage = self._staging.of(name)
        staged = self._layout.staged(name, list(stage.iterdir()))
        if not staged:
            raise ValueError(f"{stage}: expected the files of {name}, found none; write them before commit")
        for entry in staged:
            files.fsync_tree(entry)
        manifest = self._manifest(name, step, stage, [entry.name for entry in staged], extra, digests or {})
        manifest = replace(manifest, marks=self.pins.handed_on(name, marks))
        if taken_at is not None:
            manifest = replace(manifest, time=taken_at)
        # Written here, where it cannot be taken for a commit record, and moved into place as the last file.
        aside = stage / self._layout.manifest(name).name
        files.write_durable(aside, manifest.to_json())
        self._keep_hold()
        try:
            staging.set_aside(self._layout, name, [entry.name for entry in staged])
            self._layout.move_in(staged)
            files.move(aside, self._layout.manifest(name))
            files.fsync_dir(self.root)
        except BaseException:
            # If a file cannot be removed either: without its manifest it is no checkpoint, and `sweep` finds it.
            with contextlib.suppress(OSError):
                moved = [entry.name for entry in [*staged, aside] if not os.path.lexists(entry)]
                self._layout.remove(name, moved)
            raise
        return self._committed(Checkpoint(self.root, name, step, manifest.time, True, manifest))

    def commit_in_place(
        self, name: str, step: int | None, *, extra: Mapping[str, Any] | None = None, marks: Marks | None = None
    ) -> Checkpoint:
        """Commit files that a program's own saver wrote under their final names: fsync, manifest, state file.

        The store promises less for these: before this returns, a crash may leave only some of them. Call `uncommit`
        before a saver writes to a name again.
        """
        self._layout.step_of(name)
        present = sorted(one.name for one in self._layout.entries() if self._layout.may_hold(one.name, name))
        if not present:
            raise ValueError(f"{self.root / name}: expected the files of a checkpoint, found none")
        self._keep_hold()
        for one in present:
            files.fsync_tree(self.root / one)
        files.fsync_dir(self.root)
        manifest = self._manifest(name, step, self.root, present, extra, {})
        manifest = replace(manifest, marks=self.pins.handed_on(name, marks))
        files.write_atomic(self._layout.manifest(name), manifest.to_json())
        return self._committed(Checkpoint(self.root, name, step, manifest.time, True, manifest))

    def holds(self, path: str) -> bool:
        """Whether `commit_in_place` could commit a checkpoint at ``path``."""
        place, name = os.path.split(path)
        if not self._layout.is_name(name) or os.path.realpath(place or os.curdir) != os.path.realpath(self.root):
            return False
        return any(self._layout.may_hold(one.name, name) for one in self._layout.entries())

    def uncommit(self, name: str) -> None:
        """Remove the manifest of a checkpoint whose files a program's own saver is about to overwrite."""
        if os.path.lexists(self._layout.manifest(name)):
            files.remove(self._layout.manifest(name))
            files.fsync_dir(self.root)

    def forget_removed(self) -> None:
        """Remove the manifests of checkpoints whose files a program's own saver has removed."""
        for name in self._layout.removed():
            self.uncommit(name)

    def _manifest(
        self,
        name: str,
        step: int | None,
        place: Path,
        entries: Sequence[str],
        extra: Mapping[str, Any] | None,
        digests: Mapping[str, tuple[int, str]],
    ) -> Manifest:
        step_in_name = self._layout.step_of(name)
        if step_in_name is not None and step_in_name != step:
            raise ValueError(f"{name}: expected step {step_in_name}, got {step}")
        records = staging.records(place, entries, digests)
        counted = (*self._retention.aside, *self._retention.doomed, *self._retention.owned)
        owned = tuple(one.name for one in counted if one.name != name)
        return Manifest(name, self.engine, step, self._clock(), records, dict(extra or {}), owned=owned)

    def _committed(self, checkpoint: Checkpoint) -> Checkpoint:
        """Do the work after the manifest. The checkpoint is durable, so a failure here only gives a warning."""
        self._newest_good = checkpoint.name
        if checkpoint.manifest is not None:
            self.pins.note(checkpoint.manifest)
        self._retention.add(checkpoint, self.pins.pinned)
        self._set_anchor()
        kept = [one.name for one in self._retention.owned if one.name != checkpoint.name] + [checkpoint.name]
        self._stated.write_after_commit(checkpoint.name, kept, self._retention.anchor)
        self._staging.end(checkpoint.name)
        return checkpoint

    def mark(self, name: str, marks: Marks) -> bool:
        """Replace the marks of the committed checkpoint ``name``, durably; return whether that changed any.

        The manifest is replaced in one rename: a kill leaves the old marks or the new ones. Raises FileNotFoundError
        if there is no such checkpoint, CheckpointError if its manifest cannot be read, OSError if the disk fails.
        """
        path = self._layout.manifest(name)
        manifest = verification.read_manifest(self._layout, name)
        if manifest is None:
            raise FileNotFoundError(errno.ENOENT, "expected the manifest of a checkpoint, found none", str(path))
        if manifest.marks == marks:
            return False
        self._keep_hold()
        changed = replace(manifest, marks=marks)
        files.write_atomic(path, changed.to_json())
        self.pins.note(changed)
        self._retention.pin(self.pins.pinned)
        return True

    def count_again(self, name: str) -> None:
        """Have the next start count ``name``, which is no longer pinned, among those that retention may remove.

        For a process that is the chief for a moment, and trains nothing.
        """
        stated.insert(self._layout, name, self.pins.pinned)

    def _set_anchor(self) -> None:
        if self._retention.keep_every_n_hours is not None and self._retention.anchor is None:
            self._retention.anchor = self._stated.anchor()

    def point_to(self, checkpoint: Checkpoint) -> None:
        """Have the state file name ``checkpoint`` as the newest, after the ones that it names were moved away."""
        if checkpoint.root != self.root:
            return
        kept = [one.name for one in self.listed_by_state() if one.name != checkpoint.name]
        self._stated.point_to(checkpoint.name, kept)

    # --- reading ---

    def candidates(self, step_held: recovery.StepHeld | None = None) -> list[Checkpoint]:
        """Return the possible checkpoints, newest first: by step, then by time.

        If a program went back to an earlier step, that checkpoint comes before the later steps that it has left. The
        step of a checkpoint without a manifest is the one in its name, unless ``step_held`` reads it; see
        `newest_good`.

        A missing directory has no checkpoints. A checkpoint that is just being replaced is found as it was before.
        """
        return recovery.newest_first(self._layout, step_held)

    def read_manifest(self, checkpoint: Checkpoint) -> Manifest | None:
        """Return the manifest of a checkpoint; None if it has none.

        Raises CheckpointCorruptError if the manifest is damaged, CheckpointError if a newer Stepguard wrote it.
        """
        return verification.read_manifest(self._layout.within(checkpoint.root), checkpoint.name)

    def find(self, asked: int | str) -> Checkpoint:
        """Return the checkpoint of a step, the ``"best"`` one, or the one that has this name.

        Raises CheckpointError, which names what there is, if there is none.
        """
        found = self.candidates()
        self.pins.load(found)
        meant = self.pins.meant(asked, found)
        if meant is not None:
            return meant
        steps = listed(str(one.step) for one in found if one.step is not None)
        names = listed(self.pins.standing.holders)
        raise CheckpointError(
            f"{self.root}: expected a checkpoint {asked!r}, found the steps {steps or 'none'}"
            f"{f' and the names {names}' if names else ''}",
            path=self.root,
        )

    def verify(self, checkpoint: Checkpoint) -> Checkpoint:
        """Verify a checkpoint by its manifest, first all sizes, then the digests; return it with the manifest.

        Without a manifest, this checks only that the files exist and are not empty; the engine's restore is the rest of
        the proof. Raises CheckpointCorruptError, whose ``path`` is the file that differs; CheckpointError if a newer
        Stepguard wrote it; OSError if something could not be read.
        """
        return verification.verify(self._layout.within(checkpoint.root), checkpoint)

    def newest_good(
        self,
        *,
        attempt: Callable[[Checkpoint], None] | None = None,
        quarantine: bool = True,
        step_held: recovery.StepHeld | None = None,
        spare: recovery.Spare | None = None,
    ) -> Recovery:
        """Search from newest to oldest for the newest good checkpoint, and move the damaged newer ones to quarantine.

        ``attempt`` restores a verified checkpoint. If it raises CheckpointCorruptError, that checkpoint counts as
        damaged too, and the next older one is tried; any other error is raised. The damaged ones are moved only if a
        good one was found, and never with ``quarantine=False``, which is for readers other than the chief.

        A checkpoint without a manifest never comes before a committed one, unless the state file names it, because it
        may be a copy. ``step_held`` reads the step that it contains, by which it is ranked.

        Raises NoGoodCheckpointError if checkpoints exist and none is good. All of them then stay where they are, so
        that the next start refuses too. A system error in reading the files of one checkpoint counts as damage of that
        checkpoint, but only if another one could be read. Otherwise it is raised, because the disk may recover. An
        error that is not about a file, such as too many open files, is raised too.
        """
        found = recovery.newest_good(self._layout, attempt, step_held, spare, moves_damaged=quarantine)
        if found.checkpoint is not None:
            self._newest_good = found.checkpoint.name
        return found

    def mend(self, checkpoint: Checkpoint, fetch: Callable[[FileRecord, Path], None]) -> list[str]:
        """Replace the files of a checkpoint that differ from its manifest, and return their names.

        ``fetch`` writes a file as the record says to a path, or raises; then that file and those after it stay. Raises
        as `read_manifest` does, and whatever ``fetch`` raises.
        """
        return mending.mend(self._layout, checkpoint.name, fetch)

    def quarantine(self, checkpoint: Checkpoint, reason: str) -> Damage:
        """Move all files of a checkpoint to ``quarantine/NAME/``, with ``reason.txt``; return where they are now.

        If the logdir cannot be written, the files stay, a warning says so, and ``moved_to`` is None.
        """
        return recovery.quarantine(self._layout, checkpoint, reason)

    def roll_back(self, to: Checkpoint, asked: int | str, *, by_program: bool) -> Rollback:
        """Put the checkpoints of later steps than ``to`` aside; return what was done. See `stepguard.store.rollback`.

        Only for the chief. Raises OSError if the disk fails; the next start then does the rest.
        """
        done = rollback.roll_back(self._layout, to, str(asked), by_program=by_program)
        self._newest_good = self._stated.newest = to.name
        return done

    @property
    def is_chief(self) -> bool:
        """Whether this store holds the chief's lock, because its run saves here."""
        return self._logdir.is_held

    # --- retention ---

    def adopt(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Own these checkpoints, oldest first, in place of those owned so far. `prune` may remove what is owned.

        This is for an earlier run's checkpoints, as the Saver's ``recover_last_checkpoints``: see `adopt_earlier`.
        """
        found = [earlier.with_commit_time(self._layout, one) for one in checkpoints if one.root == self.root]
        self._retention.adopt(found, self.pins.pinned)

    @property
    def owned(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that the retention rules count, oldest first."""
        return self._retention.owned

    def listed_by_state(self) -> list[Checkpoint]:
        """Return the candidates that the state file lists, in its order: those that an earlier run owned."""
        state = statefile.read(self.root)
        if state is None:
            return []
        return earlier.listed(state, self.candidates())

    def adopt_earlier(self) -> list[Checkpoint]:
        """Own the checkpoints that an earlier run owned, and return them, oldest first.

        They are the ones that the state file lists, and those that a kill kept out of it. If it lists none, they are
        the newest committed ones; older ones may be meant to stay for ever. The chief then removes the surplus, as the
        earlier run would have done next.
        """
        state = statefile.read(self.root)
        found = self.candidates()
        self.pins.load(found)
        most = self._retention.max_to_keep
        owned = earlier.owned(self._layout, state, found, pinned=self.pins.pinned, most=most)
        names = {one.name for one in owned}
        pinned = [one for one in reversed(found) if one.name in self.pins.pinned and one.name not in names]
        self.adopt([*pinned, *owned])
        if not self._logdir.is_held:
            return owned
        self._set_anchor()
        self._retention.trim()
        kept = list(self._retention.owned)
        try:
            is_stale = state is not None and self._layout.is_name(state.newest)
            is_there = state is not None and state.newest in {*(one.name for one in kept), *self.pins.pinned}
            if state is not None and is_stale and kept and not is_there:
                # Before it is removed.
                self._stated.write(kept[-1].name, [one.name for one in kept], state.last_preserved)
            self.prune()
        except OSError as error:
            _log.warning("what the run before has kept too many could not be removed: %s", error)
        return kept

    def prune(self, *, protect: Iterable[str] = ()) -> list[Checkpoint]:
        """Remove the checkpoints that the retention rules drop, and return them. Call this after a commit.

        The rules are the Saver's: the last ``max_to_keep`` committed or adopted checkpoints are kept (0 or None keeps
        all), and of the others one for each ``keep_every_n_hours`` stays for ever. The newest good one is never
        removed, nor one that is pinned: a best one, a named one, one that is to be kept. Those whose
        names are in ``protect`` wait for a later call.
        """
        if self.pins.forget_missing():
            self._retention.pin(self.pins.pinned)
        # If the state file could not be rewritten, keep what it names; else TensorFlow's own tools would find nothing.
        doomed = self._retention.take_doomed({*protect, self._newest_good, self._stated.newest})
        files_of = self._layout.grouped() if doomed else {}
        for number, one in enumerate(doomed):
            try:
                self._take_away(one.name, self._layout.present(one.name, files_of.get(one.name, ())))
            except OSError:
                self._retention.put_back(doomed[number:])
                raise
        return doomed

    def remove(self, doomed: Iterable[Checkpoint], *, newest_good: Checkpoint) -> None:
        """Take these checkpoints off the state file, and then remove them.

        Raises ValueError, and removes nothing, if ``newest_good``, which the caller has verified, is among them.
        """
        names = [one.name for one in doomed]
        if newest_good.name in names:
            raise ValueError(f"{newest_good.path}: the newest good checkpoint is never removed")
        stated.drop(self._layout, set(names), newest_good.name)
        files_of = self._layout.grouped()
        for name in names:
            self._take_away(name, self._layout.present(name, files_of.get(name, ())))

    def _take_away(self, name: str, present: Sequence[str]) -> None:
        self._layout.remove(name, present, manifest_to=self.root / (layouts.PRUNED + name))
        # Also remove the previous checkpoint that was kept when a save of that name failed.
        files.remove(self._layout.replaced(name))

    # --- the chief ---

    def acquire(self) -> lock.LogdirHold:
        """Become the chief of this logdir, which is created if missing; see `stepguard.store.lock.acquire`.

        Raises LogdirInUseError if another process is the chief.
        """
        return self._logdir.acquire()

    def _keep_hold(self) -> None:
        """Renew the lock: the logdir may have been cleared or made again, and another process may be its chief now."""
        if not self._logdir.renew():
            return
        left = {one.name for one in self.candidates()}
        self._retention.adopt([one for one in self._retention.owned if one.name in left])

    @contextlib.contextmanager
    def program_saves(self, name: str) -> Iterator[None]:
        """A block in which the program's own saver writes the checkpoint ``name``.

        The checkpoint loses its commit, and Stepguard saves nothing in the same place meanwhile.
        """
        with self.one_save:
            self.uncommit(name)
            yield
            # The saver prunes by its own count, and leaves the manifests of what it has removed.
            self.forget_removed()

    def holding(self) -> contextlib.AbstractContextManager[bool]:
        """A block that gets whether this process is the only possible chief of the logdir while the block lasts."""
        return self._logdir.holding()

    def sweep(self) -> list[Path]:
        """Finish or remove the unfinished saves and removals of a killed chief, and return the paths that are gone.

        A save is finished if it was complete but for its last renames. Only for the chief, before its first save and
        before the first save of any other store of its process here (`LogdirHold.is_first`). Only two kinds of files
        are removed: the store's own hidden names, and files that these name, with size and digest, as parts of an
        unfinished save or removal.
        """
        swept = leftovers.put_in_order(self._layout)
        try:
            self.forget_removed()
            swept += recovery.finish_quarantine(self._layout)
            unfinished = rollback.read(self.root)
            if unfinished is not None and unfinished.is_pending:
                rollback.finish(self._layout, unfinished)
        except OSError as error:
            _log.warning("%s: what a run that was killed has left could not be put in order: %s", self.root, error)
        return swept
