"""Finds the newest good checkpoint, and moves damaged ones out of the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError, CheckpointError, NoGoodCheckpointError, add_note
from stepguard.store import manifest, statefile, verification
from stepguard.store.checkpoint import Checkpoint, Damage, PassedOver, Recovery, split_name
from stepguard.store.layout import Layout
from stepguard.words import listed, logger

_log = logger(__name__)

QUARANTINE = "quarantine"
REASON_FILE = "reason.txt"

StepHeld = Callable[[Path], int | None]
"""A function that reads the step in the checkpoint at a path; None if it cannot be read."""


class Spare(Protocol):
    """A second copy of the checkpoints, from which a search repairs what is damaged here. Only for the chief."""

    def mend(self, damaged: Checkpoint) -> bool:
        """Replace the damaged files of a checkpoint by good ones; return whether it is worth another look."""

    def bring(self, than: Checkpoint | None) -> bool:
        """Commit the newest checkpoint of the second copy that is newer than this one; return whether one was."""

    def bring_asked(self, asked: int | str) -> None:
        """Commit the checkpoint of a step, the best, or one by its name, if that is only in the second copy."""


@dataclass(frozen=True, slots=True)
class _Search:
    """The result of a search: the good checkpoint, the damaged ones, and the first error of an unreadable disk."""

    good: Checkpoint | None
    damaged: tuple[Damage, ...]
    unreadable: OSError | None
    passed_over: tuple[PassedOver, ...] = ()


def newest_first(layout: Layout, step_held: StepHeld | None = None) -> list[Checkpoint]:
    """Return the possible checkpoints, newest first: by step, then by time.

    Without a manifest a name proves nothing, because files may be copied. Such a checkpoint is ranked by the step that
    it contains, if ``step_held`` can read it, and comes after all committed ones unless the state file names it.

    If a program went back to an older step and has saved since, the run continues from that save. It is recognised
    because it was committed last and the state file names it. One of the two alone proves nothing: a state file may be
    out of date, and a clock may have been set back.
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
    # If two checkpoints contain the same step, one may be a copy; the original has the step in its name.
    return -1 if one.step is None else one.step, one.step == split_name(one.name)[1], one.time


def _as_held(one: Checkpoint, step_held: StepHeld | None) -> Checkpoint:
    step = None if one.is_committed or step_held is None else step_held(one.path)
    return one if step is None else replace(one, step=step)


def _committed_at(layout: Layout, checkpoint: Checkpoint) -> float:
    try:
        manifest = verification.read_manifest(layout.within(checkpoint.root), checkpoint.name)
    except (CheckpointError, OSError):
        manifest = None  # Damage does not matter here.
    return checkpoint.time if manifest is None else manifest.time


def newest_good(
    layout: Layout,
    attempt: Callable[[Checkpoint], None] | None,
    step_held: StepHeld | None,
    spare: Spare | None,
    *,
    moves_damaged: bool,
) -> Recovery:
    """Find the newest good checkpoint, and move the damaged newer ones away. See `CheckpointStore.newest_good`."""
    found = _search(layout, attempt, step_held, spare)
    missing = _missing_by_state(layout, found)
    lost = [] if missing is None else [missing]
    if found.good is None:
        if found.unreadable is not None:
            add_note(found.unreadable, "; ".join(f"{one.checkpoint.path}: {one.reason}" for one in found.damaged))
            raise found.unreadable
        if found.damaged or (missing is not None and layout.present(missing.checkpoint.name)):
            raise _no_good_error(layout, [*lost, *found.damaged])
        return Recovery(None, tuple(lost))
    damaged = found.damaged
    if moves_damaged:
        damaged = tuple(replace(quarantine(layout, one.checkpoint, one.reason), is_gone=one.is_gone) for one in damaged)
    return Recovery(found.good, (*lost, *damaged), found.passed_over)


def _search(
    layout: Layout, attempt: Callable[[Checkpoint], None] | None, step_held: StepHeld | None, spare: Spare | None
) -> _Search:
    """Try the candidates from newest to oldest, and move nothing.

    A damaged one is mended from ``spare`` and tried again; before an older one is tried, ``spare`` brings what it has
    in between.
    """
    damaged: list[Damage] = []
    unreadable: OSError | None = None
    tried: set[tuple[Path, str]] = set()
    # Listed again after a round without success, because a damaged checkpoint may hide the previous one of its name.
    while left := [one for one in _candidates(layout, step_held) if (one.root, one.name) not in tried]:
        for number, candidate in enumerate(left):
            tried.add((candidate.root, candidate.name))
            try:
                good = _proven(layout, candidate, attempt, spare)
            except CheckpointCorruptError as error:
                if isinstance(error, verification.CheckpointUnreadableError):
                    unreadable = unreadable or error.error
                place = layout.within(candidate.root)
                # Otherwise it was pruned while it was read.
                present = place.present(candidate.name)
                if place.is_candidate(candidate.name, present):
                    damaged.append(_damage(candidate, error, present))
                if spare is not None and spare.bring(left[number + 1] if number + 1 < len(left) else None):
                    break
            else:
                return _Search(good, tuple(damaged), unreadable, _passed_over(good, left, tried))
    return _Search(None, tuple(damaged), unreadable)


def _proven(
    layout: Layout, candidate: Checkpoint, attempt: Callable[[Checkpoint], None] | None, spare: Spare | None
) -> Checkpoint:
    """Verify and restore a candidate, once more after ``spare`` has mended it."""
    try:
        good = _prove(layout.within(candidate.root), candidate)
        _attempt(attempt, good)
    except CheckpointCorruptError:
        if spare is None or candidate.root != layout.root or not spare.mend(candidate):
            raise
        good = _prove(layout, candidate)
        _attempt(attempt, good)
    return good


def _damage(candidate: Checkpoint, error: CheckpointCorruptError, present: Sequence[str]) -> Damage:
    if list(present) == [candidate.name + manifest.SUFFIX]:
        return Damage(candidate, "its manifest is there, and none of its files", is_gone=True)
    return Damage(candidate, str(error))


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
    """The untried checkpoints that would come before ``good`` by their names or by the steps that they contain."""
    found = []
    for one in listed:
        in_name = split_name(one.name)[1]
        steps = [step for step in (one.step, in_name) if step is not None]
        if one.is_committed or (one.root, one.name) in tried or good.step is None or max(steps, default=0) <= good.step:
            continue
        held = f"holds step {one.step}" if one.step != in_name else "the state file does not name it"
        found.append(PassedOver(one, f"it has no manifest, and {held}"))
    return tuple(found)


def _missing_by_state(layout: Layout, found: _Search) -> Damage | None:
    """Return the checkpoint that the state file names as the newest, if it is missing and newer than the one found."""
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


def _no_good_error(layout: Layout, damaged: Sequence[Damage]) -> NoGoodCheckpointError:
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
        return Damage(checkpoint, reason)  # The directory is not this store's own: see _candidates.
    target = None
    try:
        target = _quarantine_dir(layout.root, checkpoint.name)
        files.write(target / REASON_FILE, f"{checkpoint.path}\n{reason}\n".encode("utf-8", "replace"))
        layout.within(checkpoint.root).quarantine(checkpoint.name, target)
    except OSError as error:
        _log.warning("%s: could not be moved to %s: %s", checkpoint.path, layout.root / QUARANTINE, error)
        if target is not None:
            # Otherwise each start would leave another empty directory.
            files.remove_quietly(target)
        return Damage(checkpoint, reason)
    if checkpoint.root != layout.root:
        files.remove_quietly(checkpoint.root)
    return Damage(checkpoint, reason, target)


def finish_quarantine(layout: Layout) -> list[Path]:
    """Finish moves to quarantine that a kill has interrupted, after the manifest was moved; return the moved paths.

    Only for the chief, while nothing is being written.
    """
    try:
        files.check_own_dir(layout.root / QUARANTINE)
        places = sorted((layout.root / QUARANTINE).iterdir())
    except OSError:
        return []
    moved = []
    for place in places:
        name = place.name if layout.is_name(place.name) else place.name.rpartition(".")[0]
        is_own = layout.is_name(name) and not os.path.islink(place)
        if not is_own or not os.path.lexists(place / layout.manifest(name).name):
            continue
        left = layout.present(name)
        if left and not layout.is_candidate(name, left):
            for one in left:
                # A file that is already there was moved before; the one here then belongs to a later save.
                if not os.path.lexists(place / one):
                    files.move(layout.root / one, place / one)
                    moved.append(layout.root / one)
    return moved


def _candidates(layout: Layout, step_held: StepHeld | None) -> list[Checkpoint]:
    """The checkpoints in the directory, newest first; if there are none, those that the state file lists elsewhere.

    A state file that points elsewhere makes a TensorFlow program start from the end of another run.
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
        # Verified a second time, because the chief may just have replaced it. Real damage stays.
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
