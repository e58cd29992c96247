"""``stepguard verify``: read checkpoints to their end, and say which are good."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import click

from stepguard.cli.arguments import Target, target_argument
from stepguard.cli.exits import FINDING
from stepguard.cli.logdir import runs
from stepguard.cli.logdir.contents import DAMAGED, INCOMPLETE, ListedCheckpoint, list_contents, list_one
from stepguard.cli.logdir.full_read import FullRead, read_fully
from stepguard.cli.logdir.remote_image import filled
from stepguard.cli.text import output
from stepguard.cli.text.progress_bar import reading
from stepguard.cli.text.table import STATE, Column, print_table
from stepguard.words import printable

_LOOK_SECS = 10.0

_COLUMNS = (
    STATE,
    Column("STEP", align_right=True),
    Column("FILES", align_right=True),
    Column("SIZE", align_right=True),
    Column("ENGINE"),
    Column("NAME", shrink=True),
)


@click.command(
    short_help="Read checkpoints to their end, and say which are good.",
    epilog="""\b
Examples:
  stepguard verify runs/digits
  stepguard verify runs/digits/model.ckpt-1200
  stepguard verify s3://bucket/runs/digits
  stepguard verify runs/digits --json | jq -r '.checkpoints[].damage[].file'
""",
)
@target_argument("target", "LOGDIR|CHECKPOINT")
@output.json_option
@click.pass_context
def command(ctx: click.Context, target: Target, as_json: bool) -> None:
    """Read every byte of the checkpoints of a logdir, or of one checkpoint, and compare it with the manifest.

    A checkpoint without a manifest, written by TensorFlow's own tools, stays "unverified": TensorFlow reads it and
    checks its own checksums. An "incomplete" checkpoint, which is being written, is skipped unless you name it.

    A checkpoint whose meta graph alone is missing or damaged stays good: a restore does not read the meta graph.

    Exit code 1: a file is damaged or cannot be read, or there is nothing to verify.
    """
    reads, missing, unreadable = _verified(target)
    if as_json:
        checkpoints = [_json(one) for one in reads]
        output.print_json({"checkpoints": checkpoints, "missing": list(missing), "unreadable": list(unreadable)})
    else:
        _print(target, reads, missing)
        for reason in unreadable:
            click.echo(printable(reason))
    bad = [one for one in reads if one.damages or one.state in (DAMAGED, INCOMPLETE)]
    if bad or missing or unreadable or not reads:
        ctx.exit(FINDING)


def _verified(target: Target) -> tuple[list[FullRead], tuple[str, ...], tuple[str, ...]]:
    """The reads, the names of what is gone, and what else could not be read."""
    if target.name is not None:
        return _read_all([list_one(target.root, target.name)]), (), ()
    deadline = time.monotonic() + _LOOK_SECS
    while True:
        found = list_contents(target.root)
        candidates = [one for one in found.found if one.is_candidate]
        reads = _read_all(candidates)
        # A training may have pruned them all while they were read: there are newer ones then.
        if reads or not candidates or time.monotonic() >= deadline:
            return reads, found.missing, found.unreadable


def _read_all(found: list[ListedCheckpoint]) -> list[FullRead]:
    reads = []
    with reading("verifying", sum(one.size for one in found)) as on_block:
        for one in found:
            with filled(one.checkpoint.root, one.checkpoint.name):
                read = read_fully(one, on_block=on_block) if one.is_candidate else FullRead(one)
            if read is not None:
                reads.append(read)
    return reads


def _json(read: FullRead) -> dict[str, Any]:
    one = read.listed
    return {
        "name": one.checkpoint.name,
        "path": str(one.checkpoint.path),
        "step": one.checkpoint.step,
        "bytes": one.size,
        "engine": one.engine,
        "state": one.state,
        "reasons": list(one.reasons),
        "damage": [{"file": None if path is None else str(path), "reason": reason} for path, reason in read.damages],
        "readable": read.is_readable,
    }


def _print(target: Target, reads: list[FullRead], missing: tuple[str, ...]) -> None:
    if not reads and not missing:
        hint = runs.elsewhere(target.path) if target.name is None and target.path.is_dir() else ""
        click.echo(f"{printable(str(target.path))}: expected checkpoints, found none{hint}")
        return
    if reads:
        print_table(_COLUMNS, [_row(one) for one in reads])
    for read in reads:
        for reason in read.listed.reasons:
            click.echo(f"{printable(read.listed.checkpoint.name)}: {printable(reason)}")
    for name in missing:
        click.echo(output.missing_newest(name))
    states = Counter(one.state for one in reads)
    click.echo(", ".join(f"{count} {state}" for state, count in states.items()))


def _row(read: FullRead) -> tuple[str, ...]:
    one = read.listed
    manifest = one.checkpoint.manifest
    return (
        one.state,
        "-" if one.checkpoint.step is None else str(one.checkpoint.step),
        "-" if manifest is None else str(len(manifest.files)),
        output.size(one.size),
        printable(one.engine),
        printable(one.checkpoint.name),
    )
