"""The way back: find the newest good checkpoint, and put what is damaged out of the way."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stepguard import files
from stepguard.errors import CheckpointCorruptError, CheckpointError, NoGoodCheckpointError
from stepguard.store import statefile, verification
from stepguard.store.checkpoint import Checkpoint, Damage, PassedOver, split_name
from stepguard.store.layout import Layout
from stepguard.words import listed

_log = logging.getLogger(__name__)

QUARANTINE = "quarantine"
REASON_FILE = "reason.txt"

StepHeld = Callable[[Path], int | None]
"""Reads the step that the checkpoint at a path holds; None where that cannot be told."""


@dataclass(frozen=True, slots=True)
class Search:
    """What a search found: the good one, those that were not, and the first error of a disk that cannot read."""

    good: Checkpoint | None
    damaged: tuple[Damage, ...]
    unreadable: OSError | None
    passed_over: tuple[PassedOver, ...] = ()


def newest_first(layout: Layout, step_held: StepHeld | None = None) -> list[Checkpoint]:
    """Return what may be a checkpoint, newest first: by step, then time.

    A name is no proof where there is no manifest, since files may be copied: such a checkpoint is ranked by the step
    that it holds, as far as ``step_held`` can tell, and comes after all committed ones unless the state file names it.

    A program that went back to an older step, and has saved since, goes on from there: its checkpoint is the one that
    was committed last, and the state file says so too. Either alone proves nothing: state files are left behind, and
    clocks are set back.
    """
    found = [_as_held(one, step_held) for one in layout.candidates()]
    state = statefile.read(layout.root) if len(found) > 1 else None
    if any(one.is_committed for one in found):
        known = {one.name for one in found if one.is_committed} | set(
            () if state is None else (state.newest, *state.names)
        )
    else:
        known = {one.name for one in found}
    found.sort(key=lambda one: (one.name in known, *_rank(one)), reverse=True)
    if state is None or state.newest == found[0].name:
        return found
    named = next((one for one in found if one.name == state.newest), None)
    if named is None or _committed_at(layout, named) <= _committed_at(layout, found[0]):
        return found
    return [named, *(one for one in found if one is not named)]


def _rank(one: Checkpoint) -> tuple[int, bool, float]:
    # Of two that hold the same step one may be a copy: the other has it in its name.
    return -1 if one.step is None else one.step, one.step == split_name(one.name)[1], one.time


def _as_held(one: Checkpoint, step_held: StepHeld | None) -> Checkpoint:
    step = None if one.is_committed or step_held is None else step_held(one.path)
    return one if step is None else replace(one, step=step)


def _committed_at(layout: Layout, checkpoint: Checkpoint) -> float:
    try:
        manifest = verification.read_manifest(layout.within(checkpoint.root), checkpoint.name)
    except (CheckpointError, OSError):
        manifest = None  # Whether it is good is not asked here.
    return checkpoint.time if manifest is None else manifest.time


def search(layout: Layout, attempt: Callable[[Checkpoint], None] | None, step_held: StepHeld | None = None) -> Search:
    """Try the candidates from newest to oldest; move nothing. Raises as `CheckpointStore.newest_good` says."""
    damaged: list[Damage] = []
    unreadable: OSError | None = None
    tried: set[tuple[Path, str]] = set()
    # Listed again after a round without success: a damaged one may hide the previous one of its name.
    while left := [one for one in _candidates(layout, step_held) if (one.root, one.name) not in tried]:
        for candidate in left:
            tried.add((candidate.root, candidate.name))
            try:
                good = _prove(layout.within(candidate.root), candidate)
                _attempt(attempt, good)
            except CheckpointCorruptError as error:
                if isinstance(error, verification.CheckpointUnreadableError):
                    unreadable = unreadable or error.error
                place = layout.within(candidate.root)
                # Else it was pruned while we read it.
                if place.is_candidate(candidate.name, place.present(candidate.name)):
                    damaged.append(Damage(candidate, str(error)))
            else:
                return Search(good, tuple(damaged), unreadable, _passed_over(good, left, tried))
    return Search(None, tuple(damaged), unreadable)


def _attempt(attempt: Callable[[Checkpoint], None] | None, good: Checkpoint) -> None:
    try:
        if attempt is not None:
            attempt(good)
    except OSError as error:
        if not verification.is_of_files(error, good.path):
            raise
        raise verification.CheckpointUnreadableError(good.path, error) from error


def _passed_over(
    good: Checkpoint, listed: Sequence[Checkpoint], tried: Collection[tuple[Path, str]]
) -> tuple[PassedOver, ...]:
    """What would have come before ``good`` by its name, or by the step that it holds, and was not tried."""
    found = []
    for one in listed:
        in_name = split_name(one.name)[1]
        steps = [step for step in (one.step, in_name) if step is not None]
        if one.is_committed or (one.root, one.name) in tried or good.step is None or max(steps, default=0) <= good.step:
            continue
        held = f"holds step {one.step}" if one.step != in_name else "the state file does not name it"
        found.append(PassedOver(one, f"it has no manifest, and {held}"))
    return tuple(found)


def missing_by_state(layout: Layout, found: Search) -> Damage | None:
    """Return what the state file calls the newest, if it is newer than the one found, and not to be found."""
    state = statefile.read(layout.root)
    if state is None or not layout.is_name(state.newest):
        return None
    name, step, good = state.newest, layout.step_of(state.newest), found.good
    if name in {one.checkpoint.name for one in found.damaged} or (good is not None and good.name == name):
        return None
    if good is not None and good.step is not None and (step is None or step <= good.step):
        return None
    present = layout.present(name)
    if layout.is_candidate(name, present):
        return None
    there = f"only {', '.join(present)}" if present else "no file of it"
    reason = f"the file {statefile.FILE_NAME!r} names it as the newest, and there is {there}"
    return Damage(Checkpoint(layout.root, name, step, 0.0, False), reason, is_gone=not present)


def no_good_error(layout: Layout, damaged: Sequence[Damage]) -> NoGoodCheckpointError:
    """Return the error for a logdir in which every checkpoint is damaged."""
    reasons = listed((f"{one.checkpoint.path}: {one.reason}" for one in damaged), separator="; ")
    return NoGoodCheckpointError(
        f"{layout.root}: expected a good checkpoint, found {len(damaged)}, all of them damaged ({reasons}). "
        f"Nothing was changed. Put a good copy back; or, to start over from step 0, use another logdir, pass restoring="
        f"Restoring(start_over_when_all_damaged=True), or move these and the file {statefile.FILE_NAME!r} away",
        path=layout.root,
    )


def quarantine(layout: Layout, checkpoint: Checkpoint, reason: str) -> Damage:
    """Move a damaged checkpoint out of the way. See `CheckpointStore.quarantine`."""
    if checkpoint.root not in (layout.root, layout.replaced(checkpoint.name)):
        return Damage(checkpoint, reason)  # The directory of somebody else: see _candidates.
    target = None
    try:
        target = _quarantine_dir(layout.root, checkpoint.name)
        files.write(target / REASON_FILE, f"{checkpoint.path}\n{reason}\n".encode("utf-8", "replace"))
        layout.within(checkpoint.root).quarantine(checkpoint.name, target)
    except OSError as error:
        _log.warning("%s: could not be moved to %s: %s", checkpoint.path, layout.root / QUARANTINE, error)
        if target is not None:
            # Else each start leaves another one.
            files.remove_quietly(target)
        return Damage(checkpoint, reason)
    if checkpoint.root != layout.root:
        files.remove_quietly(checkpoint.root)
    return Damage(checkpoint, reason, target)


def finish_quarantine(layout: Layout) -> list[Path]:
    """Move what a kill has left in the logdir of checkpoints whose manifest lies in quarantine already; say what.

    Only for the chief, when nothing is being written.
    """
    try:
        files.check_own_dir(layout.root / QUARANTINE)
        places = sorted((layout.root / QUARANTINE).iterdir())
    except OSError:
        return []
    moved = []
    for place in places:
        name = place.name if layout.is_name(place.name) else place.name.rpartition(".")[0]
        if not layout.is_name(name) or not os.path.lexists(place / layout.manifest(name).name):
            continue
        left = layout.present(name)
        if left and not layout.is_candidate(name, left):
            for one in left:
                # What is there already was moved, and this one is of a later save.
                if not os.path.lexists(place / one):
                    files.move(layout.root / one, place / one)
                    moved.append(layout.root / one)
    return moved


def _candidates(layout: Layout, step_held: StepHeld | None) -> list[Checkpoint]:
    """What lies in the directory; only if that is nothing, what the state file lists in another one, newest first.

    A state file that points elsewhere is how a TensorFlow program is made to start from the end of another run.
    """
    found = newest_first(layout, step_held)
    state = statefile.read(layout.root) if not found else None
    if state is None or state.path.parent in (Path(), layout.root):
        return found
    place = layout.within(layout.root / state.path.parent)
    try:
        return [
            _as_held(
                Checkpoint(place.root, name, split_name(name)[1], 0.0, os.path.lexists(place.manifest(name))), step_held
            )
            for name in dict.fromkeys([state.newest, *reversed(state.names)])
            if place.is_candidate(name, place.present(name))
        ]
    except OSError as error:
        _log.warning("%s, which the file %r names, cannot be read: %s", state.path, statefile.FILE_NAME, error)
        return []


def _prove(place: Layout, candidate: Checkpoint) -> Checkpoint:
    try:
        return verification.verify(place, candidate)
    except CheckpointCorruptError:
        # The chief may just have replaced it under our eyes. What is damaged stays so.
        return verification.verify(place, candidate)


def _quarantine_dir(root: Path, name: str) -> Path:
    parent = root / QUARANTINE
    files.make_own_dir(parent)
    number = 0
    while True:
        target = parent / (f"{name}.{number}" if number else name)
        try:
            files.make_dir(target)
        except FileExistsError:
            number += 1
        else:
            return target
