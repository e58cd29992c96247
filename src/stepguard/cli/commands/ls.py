"""``stepguard ls``: the checkpoints of a logdir."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from stepguard.cli.arguments import LOGDIR
from stepguard.cli.exits import FINDING
from stepguard.cli.logdir.contents import ListedCheckpoint, LogdirContents, list_contents
from stepguard.cli.logdir.standings import marks_of, standings, why_kept
from stepguard.cli.text import output
from stepguard.cli.text.table import STATE, Column, print_table
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
# Only where a checkpoint has any.
_KEPT, _METRICS = Column("KEPT", shrink=True), Column("METRICS", shrink=True)


@click.command(
    short_help="List the checkpoints of a logdir.",
    epilog="""\b
Examples:
  stepguard ls runs/digits
  stepguard ls runs/digits --json | jq '.checkpoints[] | select(.state != "good")'
""",
)
@click.argument("logdir", type=LOGDIR)
@output.json_option
@click.pass_context
def command(ctx: click.Context, logdir: Path, as_json: bool) -> None:
    """List the checkpoints of LOGDIR, from newest to oldest; the one that a restart would take is marked with >.

    \b
    good        the manifest is valid, and every file that a restore needs has the right size
    unverified  complete, but without a manifest: TensorFlow's own tools wrote it
    damaged     a file is missing or of a wrong size, or the manifest is damaged
    incomplete  being written or removed, or cut short by a kill (marked with > if a restart would finish its commit)

    Of those that the retention rules leave alone, KEPT says why: one of the best by the metric of the program, its
    names, or `stepguard keep`. METRICS are what the program has measured at that step.

    The data are not read for this: a bit that has flipped is found by `stepguard verify`.

    Exit code 1: the system could not read something, which is named and passed over.
    """
    found = list_contents(logdir)
    if as_json:
        output.print_json(_document(found))
    else:
        _print(found)
    if found.is_unreadable:
        ctx.exit(FINDING)


def _document(found: LogdirContents) -> dict[str, Any]:
    now = time.time()
    known = standings(found.found)
    return {
        "logdir": str(found.root),
        "checkpoints": [_json(one, now, known[one.basename]) for one in found.found],
        "missing": list(found.missing),
        "quarantined": found.quarantined,
        "unreadable": list(found.unreadable),
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


def _print(found: LogdirContents) -> None:
    if found.found:
        _print_table(found.found)
    else:
        click.echo(f"{printable(str(found.root))}: no checkpoints")
    for name in found.missing:
        click.echo(output.missing_newest(name))
    for one in found.found:
        if one.is_unreadable:
            for reason in one.reasons:
                click.echo(printable(reason))
    for reason in found.unreadable:
        click.echo(printable(reason))
    if found.quarantined:
        click.echo(f"{output.counted(found.quarantined, 'damaged checkpoint')} in quarantine/")


def _print_table(found: Sequence[ListedCheckpoint]) -> None:
    now, known = time.time(), standings(found)
    columns, rows = list(_COLUMNS), [list(_row(one, now)) for one in found]
    kept = [why_kept(one, known[one.basename]) for one in found]
    metrics = [_metrics(one) for one in found]
    for column, cells in ((_KEPT, kept), (_METRICS, metrics)):
        if any(cells):
            columns.insert(-1, column)
            for row, cell in zip(rows, cells, strict=True):
                row.insert(-1, cell or "-")
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
