"""``stepguard ls``: the checkpoints of a logdir, or of many a line each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from stepguard.cli.arguments import LOGDIR_OR_URL
from stepguard.cli.exits import FINDING
from stepguard.cli.logdir import runs
from stepguard.cli.logdir.contents import DAMAGED, ListedCheckpoint, LogdirContents, list_contents
from stepguard.cli.logdir.standings import marks_of, standings, why_kept
from stepguard.cli.text import output
from stepguard.cli.text.table import STATE, Column, print_table, warning
from stepguard.remote import record
from stepguard.remote.record import MirroredCheckpoint, MirrorRecord
from stepguard.store.marks import Standing
from stepguard.words import duration, printable

_COLUMNS = (
    Column(" "),
    Column("STEP", align_right=True),
    Column("AGE", align_right=True),
    Column("SIZE", align_right=True),
    Column("ENGINE"),
    STATE,
    Column("NAME", shrink=True),
)
_OF_RUNS = (
    Column("RUN", shrink=True),
    Column("CHECKPOINTS", align_right=True),
    Column("DAMAGED", align_right=True, style=warning),
    Column("SIZE", align_right=True),
    Column("STEP", align_right=True),
    Column("AGE", align_right=True),
    Column("NAME", shrink=True),
)
# Only where a checkpoint has any.
_KEPT, _METRICS = Column("KEPT", shrink=True), Column("METRICS", shrink=True)


@click.command(
    short_help="List the checkpoints of a logdir.",
    epilog="""\b
Examples:
  stepguard ls runs/digits
  stepguard ls runs/
  stepguard ls s3://bucket/runs/digits
  stepguard ls runs/digits --json | jq '.checkpoints[] | select(.state != "good")'
""",
)
@click.argument("logdirs", type=LOGDIR_OR_URL, nargs=-1, required=True, metavar="LOGDIR...")
@output.json_option
@click.pass_context
def command(ctx: click.Context, logdirs: tuple[Path, ...], as_json: bool) -> None:
    """List the checkpoints of LOGDIR, from newest to oldest; the one that a restart would take is marked with >. Of
    several, and of a directory with runs below it, each gets a line, with the checkpoint that a restart would take.

    \b
    good        the manifest is valid, and every file that a restore needs has the right size
    unverified  complete, but without a manifest: TensorFlow's own tools wrote it
    damaged     a file is missing or of a wrong size, or the manifest is damaged
    incomplete  being written or removed, or cut short by a kill (marked with > if a restart would finish its commit)
    mirrored    only in the mirror of the run, as far as LOGDIR knows

    Of those that the retention rules leave alone, KEPT says why: one of the best by the metric of the program, its
    names, or `stepguard keep`. METRICS are what the program has measured at that step.

    The data are not read for this: a bit that has flipped is found by `stepguard verify`.

    Exit code 1: the system could not read something, which is named and passed over.
    """
    are_many = runs.are_many(logdirs)
    found = [(list_contents(one), record.read(one)) for one in (runs.meant(logdirs) if are_many else logdirs)]
    if as_json:
        documents = [_document(*one) for one in found]
        output.print_json({"runs": documents} if are_many else documents[0])
    elif are_many:
        print_table(_OF_RUNS, [_row_of_run(one) for one, _ in found])
        for one, _ in found:
            _print_unreadable(one)
    else:
        _print(*found[0])
    if any(one.is_unreadable for one, _ in found):
        ctx.exit(FINDING)


def _only_there(found: LogdirContents, mirror: MirrorRecord | None) -> list[MirroredCheckpoint]:
    """The checkpoints that only the mirror has, newest first, as far as the logdir knows."""
    here = {one.checkpoint.name for one in found.found}
    return [] if mirror is None else [one for one in mirror.checkpoints if one.name not in here]


def _document(found: LogdirContents, mirror: MirrorRecord | None) -> dict[str, Any]:
    now = time.time()
    known = standings(found.found)
    return {
        "logdir": str(found.root),
        "checkpoints": [_json(one, now, known[one.basename]) for one in found.found],
        "missing": list(found.missing),
        "quarantined": found.quarantined,
        "unreadable": list(found.unreadable),
        "mirror": None
        if mirror is None
        else {**mirror.document(), "only_there": [one.name for one in _only_there(found, mirror)]},
    }


def _json(one: ListedCheckpoint, now: float, known: Standing) -> dict[str, Any]:
    checkpoint, marks = one.checkpoint, marks_of(one)
    is_best = checkpoint.name in known.best
    return {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "basename": one.basename,
        "step": checkpoint.step,
        "time": checkpoint.time,
        "age_secs": max(0.0, now - checkpoint.time),
        "bytes": one.size,
        "engine": one.engine,
        "state": one.state,
        "reasons": list(one.reasons),
        "next": one.is_next,
        "metrics": dict(marks.metrics),
        "best": known.best.index(checkpoint.name) + 1 if is_best else None,
        "names": known.names_of(checkpoint.name),
        "kept": marks.is_kept,
    }


def _print(found: LogdirContents, mirror: MirrorRecord | None) -> None:
    only_there = _only_there(found, mirror)
    if found.found or only_there:
        _print_table(found.found, only_there)
    else:
        click.echo(f"{printable(str(found.root))}: no checkpoints")
    for name in found.missing:
        click.echo(output.missing_newest(name))
    _print_unreadable(found)
    if found.quarantined:
        click.echo(f"{output.counted(found.quarantined, 'damaged checkpoint')} in quarantine/")
    if mirror is not None:
        click.echo(output.mirror(mirror))


def _print_unreadable(found: LogdirContents) -> None:
    reasons = [reason for one in found.found if one.is_unreadable for reason in one.reasons]
    for reason in (*reasons, *found.unreadable):
        click.echo(printable(reason))


def _row_of_run(found: LogdirContents) -> tuple[str, ...]:
    damaged = sum(one.state == DAMAGED for one in found.found) + found.quarantined
    taken = next((one for one in found.found if one.is_next), None)
    step, age, *_, name = ("-", "-", "-") if taken is None else _row(taken, time.time())[1:]
    size = output.size(sum(one.size for one in found.found))
    count = f"{len(found.found):,}"
    return printable(str(found.root)), count, f"{damaged:,}" if damaged else "-", size, step, age, name


def _print_table(found: Sequence[ListedCheckpoint], only_there: Sequence[MirroredCheckpoint]) -> None:
    now, known = time.time(), standings(found)
    columns, rows = list(_COLUMNS), [list(_row(one, now)) for one in found]
    kept = [why_kept(one, known[one.basename]) for one in found]
    metrics = [_metrics(one) for one in found]
    for column, cells in ((_KEPT, kept), (_METRICS, metrics)):
        if any(cells):
            columns.insert(-1, column)
            for row, cell in zip(rows, cells, strict=True):
                row.insert(-1, cell or "-")
    # What only the mirror has is known by name here, not by its marks.
    unknown = ("-",) * (len(columns) - len(_COLUMNS))
    for one in only_there:
        *cells, name = _mirrored_row(one, now)
        rows.append([*cells, *unknown, name])
    print_table(columns, rows)


def _metrics(one: ListedCheckpoint) -> str:
    return ", ".join(f"{printable(name)} {value:.4g}" for name, value in sorted(marks_of(one).metrics.items()))


def _row(one: ListedCheckpoint, now: float) -> tuple[str, ...]:
    checkpoint = one.checkpoint
    return (
        ">" if one.is_next else " ",
        "-" if checkpoint.step is None else str(checkpoint.step),
        duration(now - checkpoint.time),
        output.size(one.size),
        printable(one.engine),
        one.state,
        printable(checkpoint.name),
    )


def _mirrored_row(one: MirroredCheckpoint, now: float) -> tuple[str, ...]:
    return (
        " ",
        "-" if one.step is None else str(one.step),
        duration(now - one.time),
        output.size(one.bytes),
        printable(one.engine),
        "mirrored",
        printable(one.name),
    )
