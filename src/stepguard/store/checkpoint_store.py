"""CheckpointStore: commit, list, verify, newest good, prune.

What lies in the directory is the truth; the state file ``checkpoint`` is written for TensorFlow's tools, and read as a
hint only. Hidden names in the directory are the store's own (see `stepguard.store.layout`); a killed chief may leave
some behind, and the next one sweeps them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepguard import files
from stepguard.errors import CheckpointError, LogdirInUseError, add_note
from stepguard.store import layout as layouts
from stepguard.store import lock, recovery, statefile, verification
from stepguard.store.checkpoint import Checkpoint, Damage, Recovery
from stepguard.store.layout import Layout
from stepguard.store.manifest import FileRecord, Manifest
from stepguard.store.retention import Retention

_log = logging.getLogger(__name__)

_MOST_STAGES = 10


class NameTakenError(OSError):
    """A checkpoint cannot have its name, since files of that name are in the way and cannot be removed. One of another
    step can be saved.
    """


class CheckpointStore:
    """The checkpoints of one ``basename`` in the directory ``root``. Constructing it touches no disk.

    ``entry_suffix`` (TensorFlow: ``".index"``) is the suffix of the file by which a checkpoint without a manifest,
    written by TensorFlow's own tools, is known; None means that only committed checkpoints count. ``max_to_keep`` and
    ``keep_every_n_hours`` are for `prune`. ``clock`` gives Unix time.

    Reading (`candidates`, `read_manifest`, `verify`, and `newest_good` with ``quarantine=False``) may be done by any
    thread and process. Everything else is for one thread at a time, of the process that holds the chief's lock.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        basename: str = "model.ckpt",
        engine: str = "unknown",
        entry_suffix: str | None = None,
        relative_paths: bool = False,
        max_to_keep: int | None = None,
        keep_every_n_hours: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = Path(root)
        self.engine = engine
        self.relative_paths = relative_paths
        self._layout = Layout(self.root, basename, entry_suffix)
        self._retention = Retention(max_to_keep, keep_every_n_hours)
        # Held by whoever writes a checkpoint here: the writer, or the program by its framework's own means.
        self.one_save = threading.Lock()
        self._clock = clock
        self._opened_at = clock()
        self._newest_good: str | None = None
        self._was_acquired = False
        self._stages: dict[str, Path] = {}
        self._has_warned_of_state = False
        # What the state file names as the newest, where this run has written it.
        self._stated: str | None = None
        self._device: int | None = None
        # Weak: a hold that nobody else refers to is given back.
        self._hold: Callable[[], lock.LogdirHold | None] = lambda: None

    @property
    def basename(self) -> str:
        """What the names of the checkpoints begin with."""
        return self._layout.basename

    def step_of(self, name: str) -> int | None:
        """Return the step in a name, None if it has none. Raises ValueError if it is no name of this store."""
        return self._layout.step_of(name)

    def name(self, step: int | None) -> str:
        """Return the name of the checkpoint of a step; None: of a program that counts none."""
        return self.basename if step is None else f"{self.basename}-{step}"

    # --- commit ---

    def stage(self, name: str) -> Path:
        """Return an empty hidden directory on the filesystem of the store, for the files of the checkpoint ``name``.

        The engine writes files ``stage/NAME.<suffix>``, or a directory ``stage/NAME/``. Then comes `commit`, or
        `discard` if it failed. The logdir is created if it is missing; but if it was there when `acquire` was called,
        only where it was: on the filesystem that it was on.
        """
        self._layout.step_of(name)
        if not self._was_acquired:
            files.make_dirs(self.root)
        elif not self.root.is_dir():
            self._make_again()
        self._keep_hold()
        stage = self._stages[name] = self._vacant_stage(name)
        files.make_dir(stage)
        return stage

    def _vacant_stage(self, name: str) -> Path:
        """The staging directory, removed; another one where it cannot be, as that of another user, or one with a file
        in it that a client of NFS still has open.
        """
        for number in range(_MOST_STAGES):
            stage = self._layout.stage(name, number)
            try:
                files.remove(stage)
            except OSError as error:
                if number == _MOST_STAGES - 1:
                    raise
                _log.debug("%s: could not be removed: %s", stage, error)
            else:
                break
        return stage

    def discard(self, stage: Path) -> None:
        """Remove a staging directory and what is in it; one that is gone already is no error."""
        if stage.parent != self.root or not stage.name.startswith(layouts.STAGE):
            raise ValueError(f"expected a staging directory of {self.root}, got {stage}")
        files.remove(stage)

    def commit(
        self,
        name: str,
        step: int | None,
        *,
        extra: Mapping[str, Any] | None = None,
        digests: Mapping[str, tuple[int, str]] | None = None,
        taken_at: float | None = None,
    ) -> Checkpoint:
        """Make the staged checkpoint ``name`` durable, and the newest. When it returns, no crash can lose it.

        ``digests`` has size and digest of files, by their names in the staging directory, that were digested while
        they were written (`stepguard.files.NewFile`); the others are read for it. ``taken_at`` is the Unix time of the
        snapshot, by which checkpoints are told apart in age: a slow write does not make its step newer.

        Raises LogdirInUseError if the logdir was cleared, and has another chief since. Raises OSError as it came if the
        disk fails: then every other checkpoint is as it was, and one of the same
        name can still be restored. A retry begins with `stage`: what was fsynced in vain must be written again.
        """
        stage = self._stages.get(name, self._layout.stage(name))
        staged = self._staged(stage, name)
        for entry in staged:
            files.fsync_tree(entry)
        manifest = self._manifest(name, step, stage, [entry.name for entry in staged], extra, digests or {})
        if taken_at is not None:
            manifest = replace(manifest, time=taken_at)
        # Written here, where nobody takes it for a commit record, and moved into place as the last file.
        aside = stage / self._layout.manifest(name).name
        files.write_durable(aside, manifest.to_json())
        self._keep_hold()
        try:
            self._set_aside(name, [entry.name for entry in staged])
            self._move_in(staged)
            files.move(aside, self._layout.manifest(name))
            files.fsync_dir(self.root)
        except BaseException:
            # What cannot be removed either is no checkpoint without its manifest, and `sweep` knows of it.
            with contextlib.suppress(OSError):
                moved = [entry.name for entry in [*staged, aside] if not os.path.lexists(entry)]
                self._layout.remove(name, moved)
            raise
        return self._committed(Checkpoint(self.root, name, step, manifest.time, True, manifest))

    def commit_in_place(self, name: str, step: int | None, *, extra: Mapping[str, Any] | None = None) -> Checkpoint:
        """Commit files that a program's own saver wrote under their final names: fsync, manifest, state file.

        For those the store can promise less: before this returns, a crash may leave a part of them. Call `uncommit`
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
        files.write_atomic(self._layout.manifest(name), manifest.to_json())
        return self._committed(Checkpoint(self.root, name, step, manifest.time, True, manifest))

    def holds(self, path: str) -> bool:
        """Whether there are files of a checkpoint at ``path`` that `commit_in_place` can commit."""
        place, name = os.path.split(path)
        if not self._layout.is_name(name) or os.path.realpath(place or os.curdir) != os.path.realpath(self.root):
            return False
        return any(self._layout.may_hold(one.name, name) for one in self._layout.entries())

    def uncommit(self, name: str) -> None:
        """Remove the manifest of a checkpoint whose files are about to be written over by a program's own saver."""
        if os.path.lexists(self._layout.manifest(name)):
            files.remove(self._layout.manifest(name))
            files.fsync_dir(self.root)

    def forget_removed(self) -> None:
        """Remove the manifests of those checkpoints whose files a program's own saver has removed."""
        for name in self._layout.removed():
            self.uncommit(name)

    def _staged(self, stage: Path, name: str) -> list[Path]:
        """The staged entries in the order in which they become visible: the entry file last."""
        entries = sorted(stage.iterdir())
        for entry in entries:
            if not self._layout.may_hold(entry.name, name):
                raise ValueError(f"{entry}: expected only {name}/ or files {name}.<suffix> in the staging directory")
        if not entries:
            raise ValueError(f"{stage}: expected the files of {name}, found none; write them before commit")
        return sorted(entries, key=lambda entry: self._layout.is_entry(entry.name, name))

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
        records = []
        for path in sorted(path for entry in entries for path in _files_below(place / entry)):
            inside = path.relative_to(place).as_posix()
            size, digest = digests.get(inside) or files.digest(path)
            if size != files.size_of(path):
                raise OSError(errno.EIO, f"expected the {size} bytes that were written, found another size", str(path))
            records.append(FileRecord(inside, size, digest))
        owned = tuple(one.name for one in (*self._retention.doomed, *self._retention.owned) if one.name != name)
        return Manifest(name, self.engine, step, self._clock(), tuple(records), dict(extra or {}), owned=owned)

    def _set_aside(self, name: str, incoming: Sequence[str]) -> None:
        """Clear the way for a checkpoint whose name is taken, so that the previous one can still be restored.

        Raises NameTakenError, with nothing removed that could be restored, if something in the way cannot be read or
        removed.
        """
        present = self._layout.present(name)
        if self._layout.is_candidate(name, present):
            replaced = self._layout.replaced(name)
            files.remove(replaced)
            files.make_dir(replaced)
            for one in present:
                files.link_tree(self.root / one, replaced / one)
            files.fsync_dir(replaced)
            files.fsync_dir(self.root)
        # Leftovers of a failed save that a directory could not be renamed onto, or that another engine wrote.
        present += [one for one in incoming if one not in present and os.path.lexists(self.root / one)]
        try:
            self._layout.remove(name, present)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise NameTakenError(error.errno, f"{name} is in the way: {error.strerror}", error.filename) from error

    def _move_in(self, staged: Sequence[Path]) -> None:
        *first, last = staged
        for entry in first:
            files.move(entry, self.root / entry.name)
        if first and self._layout.entry_suffix is not None:
            # The entry file makes a checkpoint visible to readers that know no manifests: its data comes first.
            files.fsync_dir(self.root)
        files.move(last, self.root / last.name)
        # A manifest must never be there without its files.
        files.fsync_dir(self.root)

    def _committed(self, checkpoint: Checkpoint) -> Checkpoint:
        """What follows the manifest. The checkpoint is durable: what fails in here is warned of, and loses nothing."""
        self._newest_good = checkpoint.name
        self._retention.add(checkpoint)
        self._set_anchor()
        kept = [one.name for one in self._retention.owned] or [checkpoint.name]
        try:
            self._write_state(checkpoint.name, kept, self._retention.anchor)
        except OSError as error:
            if not self._has_warned_of_state:
                _log.warning(
                    "%s: could not be written (%s): TensorFlow's own tools find %s only once it can be; "
                    "a restart finds it without",
                    self.root / statefile.FILE_NAME,
                    error,
                    checkpoint.name,
                )
            self._has_warned_of_state = True
        else:
            self._has_warned_of_state = False
        files.remove_quietly(self._stages.pop(checkpoint.name, self._layout.stage(checkpoint.name)))
        files.remove_quietly(self._layout.replaced(checkpoint.name))
        return checkpoint

    def _write_state(self, newest: str, kept: Sequence[str], last_preserved: float | None) -> None:
        stated, *names = self._layout.stated([newest, *kept])
        statefile.write(self.root, stated, names, last_preserved=last_preserved, relative_paths=self.relative_paths)
        self._stated = newest

    def _set_anchor(self) -> None:
        if self._retention.keep_every_n_hours is not None and self._retention.anchor is None:
            self._retention.anchor = self._stored_anchor()

    def _stored_anchor(self) -> float:
        state = statefile.read(self.root)
        stored = state.last_preserved if state is not None else None
        # A time in the future means that the clock was set back: waiting for it could keep nothing for years.
        return stored if stored is not None and stored <= self._opened_at else self._opened_at

    def point_to(self, checkpoint: Checkpoint) -> None:
        """Have the state file name ``checkpoint`` as the newest, after those that it names were moved away."""
        if checkpoint.root != self.root:
            return
        kept = [one.name for one in self.listed_by_state() if one.name != checkpoint.name]
        state = statefile.read(self.root)
        try:
            self._write_state(
                checkpoint.name, [*kept, checkpoint.name], None if state is None else state.last_preserved
            )
        except OSError as error:
            _log.warning("%s: could not be written: %s", self.root / statefile.FILE_NAME, error)

    # --- reading ---

    def candidates(self, step_held: recovery.StepHeld | None = None) -> list[Checkpoint]:
        """Return what may be a checkpoint, newest first: by step, then time; one that a program has gone back to comes
        before later steps that it has left behind. Of one without a manifest the step is that of its name, unless
        ``step_held`` reads it; see `newest_good`.

        A missing directory has none. One that is just being replaced is found as it was before.
        """
        return recovery.newest_first(self._layout, step_held)

    def read_manifest(self, checkpoint: Checkpoint) -> Manifest | None:
        """Return the manifest of a checkpoint, None if it has none.

        Raises CheckpointCorruptError if it is damaged, CheckpointError if a newer Stepguard wrote it.
        """
        return verification.read_manifest(self._layout.within(checkpoint.root), checkpoint.name)

    def verify(self, checkpoint: Checkpoint) -> Checkpoint:
        """Prove a checkpoint good by its manifest, sizes first, then digests; return it with the manifest.

        Of one without a manifest only that its files are there and not empty: the engine's restore is the rest of the
        proof. Raises CheckpointCorruptError, whose ``path`` is the file that differs; CheckpointError if a newer
        Stepguard wrote it; OSError if something could not be read.
        """
        return verification.verify(self._layout.within(checkpoint.root), checkpoint)

    def newest_good(
        self,
        *,
        attempt: Callable[[Checkpoint], None] | None = None,
        quarantine: bool = True,
        step_held: recovery.StepHeld | None = None,
    ) -> Recovery:
        """Find the newest good checkpoint, from newest to oldest, and put the damaged newer ones into quarantine.

        ``attempt`` restores a checkpoint that was verified; if it raises CheckpointCorruptError, that one counts as
        damaged too, and the next older one is tried. Any other error of it is raised as itself. Only when a good one
        was found are the damaged moved (not with ``quarantine=False``, which is for readers that are not the chief).

        One without a manifest is never taken before a committed one, unless the state file names it: its name may be
        that of a copy. ``step_held`` reads the step that such a one holds, by which it is ranked.

        Raises NoGoodCheckpointError if checkpoints exist and none is good, with all of them left where they were, so
        that the next start refuses as well. An error that the system raises for the files of one checkpoint counts as
        damage of that one, and only once another one could be read: where none can be, it is raised as itself, since
        the disk may come back. So is what says nothing of a file, such as too many open ones.
        """
        found = recovery.search(self._layout, attempt, step_held)
        missing = recovery.missing_by_state(self._layout, found)
        lost = [] if missing is None else [missing]
        if found.good is None:
            if found.unreadable is not None:
                add_note(found.unreadable, "; ".join(f"{one.checkpoint.path}: {one.reason}" for one in found.damaged))
                raise found.unreadable
            if found.damaged or (missing is not None and self._layout.present(missing.checkpoint.name)):
                raise recovery.no_good_error(self._layout, [*lost, *found.damaged])
            return Recovery(None, tuple(lost))
        self._newest_good = found.good.name
        damaged = found.damaged
        if quarantine:
            damaged = tuple(self.quarantine(one.checkpoint, one.reason) for one in damaged)
        return Recovery(found.good, (*lost, *damaged), found.passed_over)

    def quarantine(self, checkpoint: Checkpoint, reason: str) -> Damage:
        """Move all files of a checkpoint to ``quarantine/NAME/``, with ``reason.txt``; say where it is now.

        Where the logdir cannot be written, it stays, a warning says so, and ``moved_to`` is None.
        """
        return recovery.quarantine(self._layout, checkpoint, reason)

    # --- retention ---

    def adopt(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Own these, oldest first, instead of what was owned so far: `prune` may remove them.

        For those of an earlier run, as the Saver's ``recover_last_checkpoints``: see `adopt_earlier`.
        """
        self._retention.adopt([self._with_commit_time(one) for one in checkpoints if one.root == self.root])

    def _with_commit_time(self, checkpoint: Checkpoint) -> Checkpoint:
        # The time of its files is that of the last copy, where a logdir was copied.
        manifest = self._manifest_of(checkpoint)
        return checkpoint if manifest is None else replace(checkpoint, time=manifest.time)

    def _manifest_of(self, checkpoint: Checkpoint) -> Manifest | None:
        try:
            return self.read_manifest(checkpoint)
        except (CheckpointError, OSError):
            return None  # Whether it is good is not asked here.

    @property
    def owned(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that retention counts, oldest first."""
        return self._retention.owned

    def listed_by_state(self) -> list[Checkpoint]:
        """Return those candidates that the state file lists, in its order: what an earlier run owned."""
        state = statefile.read(self.root)
        if state is None:
            return []
        return _listed(state, self.candidates())

    def adopt_earlier(self) -> list[Checkpoint]:
        """Own what an earlier run owned, and return it, oldest first: what the state file lists, and what a kill kept
        out of it; or, where it says nothing, the newest of what was committed. Older ones may be those that stay for
        ever.

        The chief removes what is too many, as the run before would have done next.
        """
        state = statefile.read(self.root)
        found = self.candidates()
        if state is None or not (owned := _listed(state, found)):
            owned = [one for one in found if one.is_committed][: self._retention.max_to_keep or None][::-1]
        else:
            owned = self._with_what_a_kill_left(owned, found)
        self.adopt(owned)
        if self._hold() is None:
            return owned
        self._set_anchor()
        self._retention.trim()
        kept = list(self._retention.owned)
        try:
            is_stale = state is not None and self._layout.is_name(state.newest)
            if state is not None and is_stale and kept and state.newest not in [one.name for one in kept]:
                # Before it is removed.
                self._write_state(kept[-1].name, [one.name for one in kept], state.last_preserved)
            self.prune()
        except OSError as error:
            _log.warning("what the run before has kept too many could not be removed: %s", error)
        return kept

    def _with_what_a_kill_left(self, listed: Sequence[Checkpoint], found: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Those that the state file lists; before them what it ceased to list and a kill kept from being removed, and
        after them what was committed when a kill came before the state file was written.
        """
        others = [self._with_commit_time(one) for one in found if one.is_committed and one not in listed]
        newest = max(self._with_commit_time(one).time for one in listed)
        late = sorted((one for one in others if one.time > newest), key=lambda one: one.time)
        last = (late or listed)[-1]
        manifest = self._manifest_of(last)
        doomed = [] if manifest is None else [one for one in others if one.name in manifest.owned and one not in late]
        return [*sorted(doomed, key=lambda one: one.time), *listed, *late]

    def prune(self, *, protect: Iterable[str] = ()) -> list[Checkpoint]:
        """Remove what retention drops, and return it. To be called after a commit.

        The rule is the Saver's: the last ``max_to_keep`` that were committed or adopted are kept (0 or None: all), and
        of those that fall out, one for each ``keep_every_n_hours`` stays for ever. Never the newest good one, and not
        those whose names are in ``protect``: they wait for a later call.
        """
        # Not what the state file names, where it could not be written anew: TensorFlow's own tools would find nothing.
        doomed = self._retention.take_doomed({*protect, self._newest_good, self._stated})
        files_of = self._layout.grouped() if doomed else {}
        for number, one in enumerate(doomed):
            try:
                self._take_away(one.name, self._layout.present(one.name, files_of.get(one.name, ())))
            except OSError:
                self._retention.put_back(doomed[number:])
                raise
        return doomed

    def remove(self, doomed: Iterable[Checkpoint], *, newest_good: Checkpoint) -> None:
        """Remove these checkpoints, after the state file has ceased to name them.

        Raises ValueError, and removes nothing, if ``newest_good``, which the caller has verified, is among them.
        """
        names = [one.name for one in doomed]
        if newest_good.name in names:
            raise ValueError(f"{newest_good.path}: the newest good checkpoint is never removed")
        self._drop_from_state(set(names), newest_good.name)
        files_of = self._layout.grouped()
        for name in names:
            self._take_away(name, self._layout.present(name, files_of.get(name, ())))

    def _drop_from_state(self, names: set[str], newest_good: str) -> None:
        state = statefile.read(self.root)
        if state is None or not names & {state.newest, *state.names}:
            return
        newest = newest_good if state.newest in names else state.newest
        kept = [one for one in state.names if one not in names]
        stated, *listed = self._layout.stated([newest, *(kept if newest in kept else [*kept, newest])])
        statefile.write(
            self.root.absolute(),
            stated,
            listed,
            last_preserved=state.last_preserved,
            relative_paths=not state.path.is_absolute(),
        )

    def _take_away(self, name: str, present: Sequence[str]) -> None:
        self._layout.remove(name, present, manifest_to=self.root / (layouts.PRUNED + name))
        # What was kept when a save of that name failed goes with it.
        files.remove(self._layout.replaced(name))

    # --- the chief ---

    def acquire(self) -> lock.LogdirHold:
        """Become the chief of this logdir, which is created if missing; see `stepguard.store.lock.acquire`.

        Raises LogdirInUseError if another process is.
        """
        files.make_dirs(self.root)
        hold = lock.acquire(self.root)
        self._was_acquired = True
        self._device = self.root.stat().st_dev
        self._hold = weakref.ref(hold)
        return hold

    def _make_again(self) -> None:
        """The logdir has vanished: by itself, or with its filesystem. What would be made then fills the disk below,
        unseen.
        """
        try:
            is_filesystem_there = self.root.parent.stat().st_dev == self._device
        except FileNotFoundError:
            return
        if is_filesystem_there:
            files.make_dirs(self.root)
            _log.warning("%s: the logdir was removed while a run trains here; it is made again, empty", self.root)

    def _keep_hold(self) -> None:
        """The logdir may have been cleared, or removed and made again, since it was locked: another process could be
        its chief by now.
        """
        hold = self._hold()
        if hold is None or not hold.renew():
            return
        _log.warning(
            "%s: the lock of this run was removed, as when it is cleared; it is locked again, and saved to", self.root
        )
        left = {one.name for one in self.candidates()}
        self._retention.adopt([one for one in self._retention.owned if one.name in left])

    @contextlib.contextmanager
    def program_saves(self, name: str) -> Iterator[None]:
        """The program writes the checkpoint ``name`` by its framework's own means, in the block: it is committed no
        longer, and nothing of ours is written meanwhile.
        """
        with self.one_save:
            self.uncommit(name)
            yield
            # Its framework removes what is too many by its own count, and knows nothing of manifests.
            self.forget_removed()

    @contextlib.contextmanager
    def holding(self) -> Iterator[bool]:
        """Whether no other process is the chief of the logdir as long as the block lasts."""
        if self._hold() is not None:
            yield True
            return
        try:
            hold = lock.acquire(self.root)
        except (LogdirInUseError, OSError) as error:
            _log.debug("not the chief of this logdir: %s", error)
            yield False
            return
        with hold:
            yield True

    def sweep(self) -> list[Path]:
        """Remove what a killed chief left half done, and return it. Only for the chief, before its first save, and
        before that of any other store of its process that saves here (`LogdirHold.is_first`).

        Only the store's own hidden names are removed, and files of which these say, with size and digest, that they
        belong to a save or a removal that did not end.
        """
        swept = []
        for one in sorted(entry.name for entry in self._layout.entries()):
            try:
                if self._sweep(one):
                    swept.append(self.root / one)
            except OSError as error:
                _log.warning("%s: left behind by a run that was killed, and could not be removed: %s", one, error)
        try:
            self.forget_removed()
            swept += recovery.finish_quarantine(self._layout)
        except OSError as error:
            _log.warning("%s: what a run that was killed has left could not be put in order: %s", self.root, error)
        return swept

    def _sweep(self, one: str) -> bool:
        """Remove, or put back, what is of the name ``one``; whether there was anything to do."""
        path = self.root / one
        if one.startswith(layouts.PRUNED):
            self._finish_removal(one[len(layouts.PRUNED) :], path)
        elif one.startswith(layouts.STAGE):
            name = layouts.staged_name(one)
            if not self._layout.is_candidate(name, self._layout.present(name)):
                self._finish_removal(name, path / self._layout.manifest(name).name)
        elif one.startswith(layouts.REPLACED):
            self._layout.put_back(one[len(layouts.REPLACED) :])
        elif not self._layout.is_aside(one):
            return False
        files.remove(path)
        return True

    def _finish_removal(self, name: str, record: Path) -> None:
        """Remove the files of a checkpoint that has no manifest, if they are those that ``record`` describes."""
        path = self._layout.manifest(name)
        if not self._layout.is_name(name) or os.path.lexists(path):
            return
        try:
            manifest = Manifest.from_json(files.read_bytes(record), path)
        except (CheckpointError, OSError):
            return
        for one in manifest.files:
            size = files.size_of(self.root / one.name)
            if size is not None and (size != one.size or files.digest(self.root / one.name)[1] != one.digest):
                return  # Somebody wrote a checkpoint of that name since.
        self._layout.remove(name, sorted({one.name.split("/", 1)[0] for one in manifest.files}))


def _listed(state: statefile.CheckpointState, found: Sequence[Checkpoint]) -> list[Checkpoint]:
    by_name = {one.name: one for one in found}
    return [by_name[name] for name in state.names if name in by_name]


def _files_below(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        return [path]
    return [Path(directory, name) for directory, _, names in os.walk(path) for name in names]
