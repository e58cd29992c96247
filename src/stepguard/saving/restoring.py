"""The restore policy, the same for every engine: which checkpoint a start goes on from, and what becomes of the others.

Newest first, a checkpoint is proven (sizes and digests), refused if another engine wrote it, and given to the engine to
be restored. Damage costs a step back: what was damaged goes to quarantine once a good one is found, and the state file
points to that. Where none is good the start is refused, or starts over if that was asked for. What the run before has
kept is adopted, so that retention goes on where it stopped.

Nothing is moved while another process is the chief of the logdir: a reader never touches what a chief may be writing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from stepguard import files
from stepguard.errors import CheckpointMismatchError, NoGoodCheckpointError
from stepguard.options import Restoring
from stepguard.store import Checkpoint, CheckpointStore, Recovery, statefile
from stepguard.store.recovery import QUARANTINE

_log = logging.getLogger(__name__)

Restore = Callable[[Checkpoint], None]
"""Puts a proven checkpoint into the session.

Raises CheckpointMismatchError if it does not fit the program, with nothing changed, and CheckpointCorruptError if it is
damaged after all: then the next older one is tried.
"""


def restore_newest(
    store: CheckpointStore,
    restore: Restore,
    options: Restoring,
    *,
    step_held: Callable[[Path], int | None] | None = None,
    refuses_missing: bool = True,
) -> Recovery:
    """Restore the newest good checkpoint of the run's own store; say in one warning what was lost.

    ``step_held`` reads the step that a checkpoint without a manifest holds, for an engine whose framework writes such.
    With ``refuses_missing`` a state file that names checkpoints of which no file is there is no fresh start.

    Returns what was found: without a checkpoint, the session is to be initialised.

    Raises:
        NoGoodCheckpointError: checkpoints exist, or are named by the state file, and none is good. Nothing was changed.
        CheckpointMismatchError: a good checkpoint does not fit the program, or is another engine's.
    """
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
    return found


def find_newest(
    store: CheckpointStore,
    restore: Restore,
    *,
    step_held: Callable[[Path], int | None] | None = None,
    refuses_missing: bool = True,
) -> Recovery:
    """Restore the newest good checkpoint of any store; move nothing, and say nothing yet.

    Raises as `restore_newest` does.
    """
    found = store.newest_good(
        attempt=lambda checkpoint: _attempt(store, restore, checkpoint), quarantine=False, step_held=step_held
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
    """Restore this checkpoint and no other, and return it, proven.

    Raises:
        CheckpointCorruptError: it is damaged.
        CheckpointMismatchError: it does not fit the program, or is another engine's.
    """
    good = store.verify(checkpoint)
    _attempt(store, restore, good)
    return good


def report(found: Recovery) -> None:
    """Log what was restored, and in one warning what that has cost."""
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
        raise  # It could be read, and is for another model.
    except Exception:
        if manifest is not None:
            # It was proven good: unless it was pruned since, or has just been damaged, the error is the program's.
            store.verify(checkpoint)
        raise


def _put_aside(store: CheckpointStore, found: Recovery) -> Recovery:
    """Move what was damaged to quarantine, and have the state file name the good one."""
    with store.holding() as may_move:
        if not may_move:
            return found
        present = {(one.root, one.name) for one in store.candidates()}
        damaged = tuple(
            # What only the state file names is not there to be moved.
            store.quarantine(one.checkpoint, one.reason)
            if (one.checkpoint.root, one.checkpoint.name) in present
            else one
            for one in found.damaged
        )
        if found.checkpoint is not None:
            store.point_to(found.checkpoint)
    return replace(found, damaged=damaged)


def start_over(store: CheckpointStore, error: NoGoodCheckpointError) -> None:
    """Move all that is there to quarantine, as asked for. Raises ``error`` if another process is the chief."""
    with store.holding() as may_move:
        if not may_move:
            raise error
        for candidate in store.candidates():
            store.quarantine(candidate, "none of the checkpoints was good, and starting over was asked for")
        with contextlib.suppress(FileNotFoundError):
            # In a copied logdir it may still name good ones elsewhere, which are not this run's.
            files.make_dirs(store.root / QUARANTINE)
            files.move(store.root / statefile.FILE_NAME, store.root / QUARANTINE / statefile.FILE_NAME)
    _log.warning(
        "none of the checkpoints in %s is good: they are in %s now, and training starts over, as asked for",
        store.root,
        store.root / QUARANTINE,
    )
