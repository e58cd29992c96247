"""Which checkpoints of a logdir are named, kept, and the best: from the manifests alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from stepguard.cli.exits import FINDING, CommandError
from stepguard.cli.logdir.contents import DAMAGED, GOOD, ListedCheckpoint, list_contents
from stepguard.disk.schema import MOST_DIGITS
from stepguard.errors import CheckpointError
from stepguard.store import CheckpointStore
from stepguard.store.marks import BEST, Marked, Marks, Standing, standing
from stepguard.words import listed, printable

_ORDINALS = {1: "best", 2: "2nd best", 3: "3rd best"}


def marks_of(one: ListedCheckpoint) -> Marks:
    """The marks of a checkpoint; none if it has no manifest that can be read."""
    manifest = one.checkpoint.manifest
    return Marks() if manifest is None else manifest.marks


def standings(found: Iterable[ListedCheckpoint], *, with_damaged: bool = False) -> dict[str, Standing]:
    """The standing of the checkpoints of each basename; those whose data are damaged do not count by default."""
    groups: dict[str, list[Marked]] = {}
    for one in found:
        group = groups.setdefault(one.basename, [])
        if one.checkpoint.manifest is not None and (one.state == GOOD or (with_damaged and one.state == DAMAGED)):
            group.append(Marked(one.checkpoint.name, one.checkpoint.step, one.checkpoint.time, marks_of(one)))
    return {basename: standing(group) for basename, group in groups.items()}


def why_kept(one: ListedCheckpoint, found: Standing) -> str:
    """Why the retention rules leave a checkpoint alone: ``"best, before-lr-drop"``; empty if they do not."""
    name = one.checkpoint.name
    reasons = []
    if name in found.best:
        number = found.best.index(name) + 1
        reasons.append(_ORDINALS.get(number, f"{number}th best"))
    reasons += found.names_of(name)
    return ", ".join(reasons or (["kept"] if marks_of(one).is_kept else []))


def chosen(logdir: Path, target: str) -> ListedCheckpoint:
    """The checkpoint that ``target`` means: a step, ``best``, a name that was given, or the name of its files.

    It may be damaged. Raises CommandError if there is none, if there is more than one, or if a manifest cannot be read
    that may have the name.
    """
    found = [one for one in list_contents(logdir).found if one.is_candidate]
    known = standings(found, with_damaged=True)
    if not any(_is_its_own(one, target) for one in found):
        _check_readable(found, target)
    matching = [one for one in found if _is_its_own(one, target) or _is_meant(one, target, known[one.basename])]
    if len(matching) == 1:
        return matching[0]
    if matching:
        names = listed(one.checkpoint.name for one in matching)
        raise CommandError(f"{logdir}: {target!r} means one of {names}: give the name of its files", FINDING)
    if target == BEST:
        raise CommandError(
            f"{logdir}: expected a best checkpoint, found none: a program names it by "
            f"Saving(keep_best=('val_loss', 'min', 3)) and sess.metrics({{'val_loss': ...}})",
            FINDING,
        )
    there = [str(one.checkpoint.step) for one in found if one.checkpoint.step is not None]
    given = [name for standing_of in known.values() for name in standing_of.holders]
    raise CommandError(
        f"{logdir}: expected a checkpoint {printable(target)!r}, found the steps {listed(there) or 'none'}"
        f"{f' and the names {listed(given)}' if given else ''}",
        FINDING,
    )


def _is_its_own(one: ListedCheckpoint, target: str) -> bool:
    """Whether ``target`` is the step of a checkpoint, or the name of its files."""
    is_step = target.isascii() and target.isdigit() and len(target) <= MOST_DIGITS
    return one.checkpoint.name == target or (is_step and one.checkpoint.step == int(target))


def _is_meant(one: ListedCheckpoint, target: str, found: Standing) -> bool:
    name = one.checkpoint.name
    return name in found.best[:1] if target == BEST else found.holders.get(target) == name


def manifest_error(one: ListedCheckpoint) -> CheckpointError | None:
    """The error of a manifest that cannot be read: it is damaged, or of a newer Stepguard."""
    try:
        if one.checkpoint.manifest is None:
            CheckpointStore(one.checkpoint.root, basename=one.basename).read_manifest(one.checkpoint)
    except CheckpointError as error:
        return error
    return None


def _check_readable(found: Iterable[ListedCheckpoint], target: str) -> None:
    """Raise CommandError if the marks of a checkpoint are not known: it may be the one that is meant."""
    for one in found:
        error = manifest_error(one)
        if error is not None:
            raise CommandError(
                f"{one.checkpoint.path}: its manifest cannot be read ({error}), and it may be the checkpoint "
                f"{printable(target)!r}. Nothing was changed. Put a good copy back, give a step, or move this "
                f"checkpoint away",
                FINDING,
            ) from error


target_of = click.argument("target", metavar="STEP|best|NAME")
"""The argument that :func:`chosen` understands."""
