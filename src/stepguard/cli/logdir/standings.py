"""Which checkpoints of a logdir are named, kept, and the best: from the manifests alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from stepguard.cli.exits import FINDING, CommandError
from stepguard.cli.logdir.contents import DAMAGED, INCOMPLETE, ListedCheckpoint, list_contents
from stepguard.store.marks import BEST, Marked, Marks, Standing, standing
from stepguard.words import listed, printable

_ORDINALS = {1: "best", 2: "2nd best", 3: "3rd best"}


def marks_of(one: ListedCheckpoint) -> Marks:
    """The marks of a checkpoint; none if it has no manifest that can be read."""
    manifest = one.checkpoint.manifest
    return Marks() if manifest is None else manifest.marks


def standings(found: Iterable[ListedCheckpoint]) -> dict[str, Standing]:
    """The standing of the checkpoints of each basename."""
    groups: dict[str, list[Marked]] = {}
    for one in found:
        group = groups.setdefault(one.basename, [])
        if one.checkpoint.manifest is not None and one.state not in (DAMAGED, INCOMPLETE):
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

    Raises CommandError if there is none, or more than one.
    """
    found = [one for one in list_contents(logdir).found if one.is_candidate]
    known = standings(found)
    matching = [one for one in found if _is_meant(one, target, known[one.basename])]
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


def _is_meant(one: ListedCheckpoint, target: str, found: Standing) -> bool:
    checkpoint = one.checkpoint
    if target == BEST:
        return checkpoint.name in found.best[:1]
    is_step = target.isascii() and target.isdigit() and len(target) <= 18 and checkpoint.step == int(target)
    return is_step or checkpoint.name == target or found.holders.get(target) == checkpoint.name


target_of = click.argument("target", metavar="STEP|best|NAME")
"""The argument that :func:`chosen` understands."""
