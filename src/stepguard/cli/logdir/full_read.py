"""Reading a checkpoint to its end, to prove it good or to name each file that is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from stepguard.cli.exits import CommandError
from stepguard.cli.logdir import tensor_readers
from stepguard.cli.logdir.contents import DAMAGED, GOOD, UNVERIFIED, ListedCheckpoint, commit_id, inspect
from stepguard.store import tensorflow_files, verification
from stepguard.store.layout import Layout

_LOOKS = 3


@dataclass(frozen=True, slots=True)
class FullRead:
    """The outcome of a full read: the checkpoint with its state, and each damaged file with the reason.

    ``is_readable`` says, for a checkpoint without a manifest, whether its framework could read it and its checksums
    were right; None if that was not tried.
    """

    listed: ListedCheckpoint
    damages: tuple[tuple[Path | None, str], ...] = ()
    is_readable: bool | None = None

    @property
    def state(self) -> str:
        """As in `list_contents`; here "good" means that every byte that a restore reads is the one committed."""
        return self.listed.state


def read_fully(one: ListedCheckpoint, *, on_block: Callable[[int], None] | None = None) -> FullRead | None:
    """Read all of a checkpoint. None if it was pruned meanwhile; a newer one of its name is read instead.

    Raises OSError for what is no proof of damage: too many open files, for one.
    """
    place = Layout(one.checkpoint.root, one.basename, tensorflow_files)
    name = one.checkpoint.name
    read = None
    for _ in range(_LOOKS):
        before = commit_id(place, name)
        if before is None:
            return None
        found = inspect(place, one.checkpoint, lambda: place.present(name))
        if found is None:
            return None
        try:
            read = _compared_with_manifest(place, found, on_block)
        except FileNotFoundError:
            continue  # Pruned or replaced during the read: inspect it again.
        if read.state != DAMAGED or commit_id(place, name) == before:
            return read
    return read


def _compared_with_manifest(place: Layout, found: ListedCheckpoint, on_block: Callable[[int], None] | None) -> FullRead:
    manifest = found.checkpoint.manifest
    if manifest is None:
        return _unmanifested(found)
    damages: list[tuple[Path | None, str]] = []
    is_damaged = False
    is_unreadable = False
    for one in verification.damages(place, manifest, on_block=on_block):
        damages.append((one.path, str(one)))
        is_damaged |= verification.prevents_restore(place, manifest.name, one)
        is_unreadable |= isinstance(one, verification.CheckpointUnreadableError)
    if not damages:
        return FullRead(replace(found, state=GOOD, reasons=()))
    if verification.was_written_over(place, manifest):
        over = replace(found, checkpoint=replace(found.checkpoint, manifest=None), state=UNVERIFIED)
        return _unmanifested(replace(over, reasons=("TensorFlow's own tools have written over it",)))
    state = DAMAGED if is_damaged else GOOD
    reasons = tuple(reason for _, reason in damages)
    return FullRead(replace(found, state=state, reasons=reasons, is_unreadable=is_unreadable), tuple(damages))


def _unmanifested(found: ListedCheckpoint) -> FullRead:
    if found.state == DAMAGED:
        return FullRead(found, tuple((None, reason) for reason in found.reasons))
    if found.engine != "tensorflow" or found.checkpoint.is_committed:
        return FullRead(found)  # The manifest is of a newer Stepguard, or could not be read: the state stays unknown.
    try:
        reason = tensor_readers.tensorflow_damage(found)
    except CommandError as error:
        return FullRead(replace(found, reasons=(*found.reasons, error.message)))
    if reason is None:
        readable = "TensorFlow can read every tensor of it"
        return FullRead(replace(found, reasons=(*found.reasons, readable)), is_readable=True)
    path = found.checkpoint.path
    reason = f"{path}: {reason}"
    return FullRead(replace(found, state=DAMAGED, reasons=(reason,)), ((path, reason),), is_readable=False)
