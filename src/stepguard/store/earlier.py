"""The checkpoints that an earlier run owned, which the next run in its logdir goes on to count and to prune."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from stepguard.errors import CheckpointError
from stepguard.store import statefile, verification
from stepguard.store.checkpoint import Checkpoint
from stepguard.store.layout import Layout
from stepguard.store.manifest import Manifest


def owned(
    layout: Layout,
    state: statefile.CheckpointState | None,
    found: Sequence[Checkpoint],
    *,
    pinned: Collection[str],
    most: int | None,
) -> list[Checkpoint]:
    """Return those of ``found`` that an earlier run owned, oldest first.

    They are the ones that ``state`` lists, and those that a kill kept out of it. If it lists none, they are the newest
    committed ones that are not pinned, ``most`` of them; older ones may be meant to stay for ever. None stands for all.
    """
    if state is None or not (stated := listed(state, found)):
        return [one for one in found if one.is_committed and one.name not in pinned][: most or None][::-1]
    return _with_what_a_kill_left(layout, stated, found)


def listed(state: statefile.CheckpointState, found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return those of ``found`` that ``state`` lists, in its order."""
    by_name = {one.name: one for one in found}
    return [by_name[name] for name in state.names if name in by_name]


def with_commit_time(layout: Layout, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the time of its manifest: the files of a copied logdir have the time of the copy."""
    manifest = _manifest_of(layout, checkpoint)
    return checkpoint if manifest is None else replace(checkpoint, time=manifest.time)


def _manifest_of(layout: Layout, checkpoint: Checkpoint) -> Manifest | None:
    try:
        return verification.read_manifest(layout.within(checkpoint.root), checkpoint.name)
    except (CheckpointError, OSError):
        return None  # Damage does not matter here.


def _with_what_a_kill_left(
    layout: Layout, stated: Sequence[Checkpoint], found: Sequence[Checkpoint]
) -> list[Checkpoint]:
    """The listed checkpoints, with those that a kill kept out of the state file.

    Before them come those that were no longer listed but not yet removed; after them those that were committed but
    not yet listed.
    """
    # By their names: thousands of checkpoints are compared with thousands.
    names = {one.name for one in stated}
    others = [with_commit_time(layout, one) for one in found if one.is_committed and one.name not in names]
    newest = max(with_commit_time(layout, one).time for one in stated)
    late = sorted((one for one in others if one.time > newest), key=lambda one: one.time)
    manifest = _manifest_of(layout, (late or stated)[-1])
    owned_then = set() if manifest is None else {*manifest.owned} - {one.name for one in late}
    doomed = sorted((one for one in others if one.name in owned_then), key=lambda one: one.time)
    return [*doomed, *stated, *late]
