"""The restore policy, the same for every engine: which checkpoint a start continues from, and what happens to the rest.

Checkpoints are tried newest first. Each is verified (sizes and digests), refused if another engine wrote it, and then
restored by the engine. A damaged checkpoint costs a step back: once an older one is found good, the damaged ones move
to quarantine, and the state file names the good one. If none is good, the start is refused, or starts over if the user
asked for that. The checkpoints that the previous run kept are adopted, so that retention continues. With a mirror, a
damaged one is repaired from it, and what only the mirror has counts too.

Nothing is moved while another process is the chief of the logdir: a reader never touches files that a chief may be
writing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, NoGoodCheckpointError
from stepguard.options import Restoring
from stepguard.store import Checkpoint, CheckpointStore, Recovery, rollback, statefile
from stepguard.store.recovery import QUARANTINE
from stepguard.words import listed, logger

_log = logger(__name__)

Restore = Callable[[Checkpoint], None]
"""Loads a verified checkpoint into the session.

Raises CheckpointMismatchError, with nothing changed, if the checkpoint does not fit the program; and
CheckpointCorruptError if it is damaged after all, so that the next older one is tried.
"""


def restore_newest(
    store: CheckpointStore,
    restore: Restore,
    options: Restoring,
    *,
    step_held: Callable[[Path], int | None] | None = None,
    refuses_missing: bool = True,
) -> Recovery:
    """Restore the newest good checkpoint of the run's own store; log one warning that says what was lost.

    ``step_held`` reads the step of a checkpoint that has no manifest, for engines whose framework writes such
    checkpoints. With ``refuses_missing``, a start is refused if the state file names checkpoints that do not exist.

    Returns the result of the search. If it holds no checkpoint, initialise the session.

    Raises:
        NoGoodCheckpointError: checkpoints exist, or are named by the state file, and none is good. Nothing was changed.
        CheckpointMismatchError: a good checkpoint does not fit the program, or another engine wrote it.
        CheckpointError: ``options.step`` asks for a checkpoint that does not exist.
    """
    if options.step is not None and _is_due(store, options.step):
        return restore_asked(store, restore, options.step)
    try:
        found = find_newest(store, restore, step_held=step_held, refuses_missing=refuses_missing)
    except NoGoodCheckpointError as error:
        if not options.start_over_when_all_damaged:
            raise
        start_over(store, error)
        return Recovery(None)
    if found.checkpoint is None:
        return found
    if found.damaged:
        found = _put_aside(store, found)
    report(found)
    store.adopt_earlier()
    return _with_rollback(store, found, is_asked_for=options.step is not None)


def _is_due(store: CheckpointStore, asked: int | str) -> bool:
    """Whether the program is still to be put back: a run does so once, and its later starts go on with the newest."""
    record = rollback.read(store.root)
    is_done = record is not None and record.by_program and record.asked == str(asked)
    # Who only reads gets what it asks for, each time.
    return not (store.is_chief and is_done)


def restore_asked(store: CheckpointStore, restore: Restore, asked: int | str) -> Recovery:
    """Restore the checkpoint of a step, the best, or one by its name; a run that saves puts the newer ones aside.

    With a mirror, the one that is meant may be only there.

    Raises:
        CheckpointError: there is none.
        RemoteError: the mirror has it, and it could not be fetched; or the mirror cannot be reached, and may have it.
        CheckpointCorruptError: it is damaged, or a manifest is that could name it. Nothing was moved, and no other is
            tried in its place.
        CheckpointMismatchError: it does not fit the program, or another engine wrote it.
    """
    if isinstance(asked, str):
        _mend_manifests(store, asked)
    if store.spare is not None:
        store.spare.bring_asked(asked)
    meant = store.find(asked)
    try:
        good = restore_one(store, restore, meant)
    except CheckpointCorruptError:
        if store.spare is None or not store.spare.mend(meant):
            raise
        good = restore_one(store, restore, meant)
    found = Recovery(good)
    if store.is_chief:
        record = store.roll_back(good, asked, by_program=True)
        found = _with_rollback(store, found, is_asked_for=True)
        _log.warning(
            "rolled back to %s, as the program asks; newer checkpoints that are now in %s: %s. Later starts go on "
            "with the newest again",
            good.path,
            store.root / rollback.ASIDE / record.place,
            listed(record.names) or "none",
        )
    report(found)
    store.adopt_earlier()
    return found


def _mend_manifests(store: CheckpointStore, asked: str) -> None:
    """Check that the marks of each checkpoint are known: one with a damaged manifest may be the one that is meant.

    Raises CheckpointCorruptError if a manifest is damaged, and the mirror does not have the checkpoint.
    """
    found = store.candidates()
    has_mended = False
    for one in found:
        try:
            store.read_manifest(one)
        except CheckpointError as error:
            if store.spare is None or not store.spare.mend(one):
                raise CheckpointCorruptError(
                    f"{one.path}: its manifest cannot be read ({error}), and it may be the checkpoint {asked!r} that "
                    f"the program asks for. Nothing was changed. Put a good copy back, ask for a step, or move this "
                    f"checkpoint away",
                    path=one.path,
                ) from error
            has_mended = True
    if has_mended:
        # A kill before the rollback must not leave the run at this step.
        store.point_to(found[0])


def _with_rollback(store: CheckpointStore, found: Recovery, *, is_asked_for: bool) -> Recovery:
    """Note that a run begins where the last rollback has led, and say so once."""
    record = rollback.read(store.root) if store.is_chief else None
    if record is None or found.checkpoint is None:
        return found
    try:
        if record.is_new:
            rollback.note_start(store.root, record)
        elif record.by_program and not is_asked_for:
            # The program asks for it no longer: when it asks again, it means a new one.
            rollback.forget(store.root)
    except OSError as error:
        _log.warning("%s: could not be written: %s", store.root / rollback.FILE_NAME, error)
    return replace(found, rolled_back=record.is_new and record.to == found.checkpoint.name)


def find_newest(
    store: CheckpointStore,
    restore: Restore,
    *,
    step_held: Callable[[Path], int | None] | None = None,
    refuses_missing: bool = True,
) -> Recovery:
    """Restore the newest good checkpoint of any store, without moving files or logging.

    Raises the same errors as `restore_newest`.
    """
    found = store.newest_good(
        attempt=lambda checkpoint: _attempt(store, restore, checkpoint),
        quarantine=False,
        step_held=step_held,
        spare=store.spare,
    )
    if found.checkpoint is None and found.damaged and refuses_missing:
        reasons = "; ".join(f"{one.checkpoint.path}: {one.reason}" for one in found.damaged)
        raise NoGoodCheckpointError(
            f"{store.root}: expected a checkpoint, found none ({reasons}). Nothing was changed. Put it back; or, to "
            f"start over from step 0, use another logdir, pass restoring=Restoring(start_over_when_all_damaged=True), "
            f"or move the file {statefile.FILE_NAME!r} away",
            path=store.root,
        )
    return found


def restore_one(store: CheckpointStore, restore: Restore, checkpoint: Checkpoint) -> Checkpoint:
    """Verify and restore exactly this checkpoint, and return it.

    Raises:
        CheckpointCorruptError: the checkpoint is damaged.
        CheckpointMismatchError: the checkpoint does not fit the program, or another engine wrote it.
    """
    good = store.verify(checkpoint)
    _attempt(store, restore, good)
    return good


def report(found: Recovery) -> None:
    """Log which checkpoint was restored, and one warning that says what was lost."""
    if found.checkpoint is None:
        return
    if message := found.message():
        _log.warning("%s", message)
    _log.info("restored %s", found.checkpoint.path)


def _attempt(store: CheckpointStore, restore: Restore, checkpoint: Checkpoint) -> None:
    manifest = checkpoint.manifest
    if manifest is not None and manifest.engine != store.engine:
        raise CheckpointMismatchError(
            f"{checkpoint.path}: expected a checkpoint of the engine {store.engine!r}, found one of "
            f"{manifest.engine!r}: another program saves in {checkpoint.root}. Nothing was changed. Use another "
            f"logdir for this one",
            path=checkpoint.path,
        )
    try:
        restore(checkpoint)
    except CheckpointMismatchError:
        raise  # The checkpoint is readable, and belongs to another model.
    except Exception:
        if manifest is not None:
            # Verify again: unless the checkpoint was pruned or damaged since, the error is the program's.
            store.verify(checkpoint)
        raise


def _put_aside(store: CheckpointStore, found: Recovery) -> Recovery:
    """Move the damaged checkpoints to quarantine, and make the state file name the good one."""
    with store.holding() as may_move:
        if not may_move:
            return found
        present = {(one.root, one.name) for one in store.candidates()}
        damaged = tuple(
            # A checkpoint that only the state file names does not exist and cannot be moved.
            store.quarantine(one.checkpoint, one.reason)
            if (one.checkpoint.root, one.checkpoint.name) in present
            else one
            for one in found.damaged
        )
        if found.checkpoint is not None:
            store.point_to(found.checkpoint)
    return replace(found, damaged=damaged)


def start_over(store: CheckpointStore, error: NoGoodCheckpointError) -> None:
    """Move every checkpoint to quarantine, as the user asked. Raises ``error`` if another process is the chief."""
    with store.holding() as may_move:
        if not may_move:
            raise error
        for candidate in store.candidates():
            store.quarantine(candidate, "none of the checkpoints was good, and starting over was asked for")
        with contextlib.suppress(FileNotFoundError):
            # The state file of a copied logdir may name good checkpoints elsewhere, which belong to another run.
            files.make_dirs(store.root / QUARANTINE)
            files.move(store.root / statefile.FILE_NAME, store.root / QUARANTINE / statefile.FILE_NAME)
    _log.warning(
        "none of the checkpoints in %s is good: they are in %s now, and training starts over, as asked for",
        store.root,
        store.root / QUARANTINE,
    )
