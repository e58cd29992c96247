"""``stepguard verify``: read checkpoints to their end, and say which are good."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import click

from stepguard.cli.arguments import Target, target_argument
from stepguard.cli.exits import FINDING
from stepguard.cli.logdir.contents import DAMAGED, INCOMPLETE, Surveyed, survey, survey_one
from stepguard.cli.logdir.full_read import Proof, prove
from stepguard.cli.text import output
from stepguard.cli.text.progress_bar import reading
from stepguard.cli.text.table import STATE, Column, print_table

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
  stepguard verify runs/digits --json | jq -r '.checkpoints[].damage[].file'
""",
)
@target_argument("target", "LOGDIR|CHECKPOINT")
@output.json_option
@click.pass_context
def command(ctx: click.Context, target: Target, as_json: bool) -> None:
    """Read every byte of the checkpoints of a logdir, or of one checkpoint, and compare it with the manifest.

    A checkpoint without a manifest, written by TensorFlow's own tools, stays "unverified": TensorFlow reads all of it,
    and its own checksums are what is known then. One that is just being written, "incomplete", is passed over, unless
    it was asked for by name.

    One of which only the meta graph is missing or damaged stays good: a restore does not read that.

    Exit code 1: a file is damaged or cannot be read, or there is nothing to verify.
    """
    proofs, missing, unreadable = _verified(target)
    if as_json:
        checkpoints = [_json(one) for one in proofs]
        output.print_json({"checkpoints": checkpoints, "missing": list(missing), "unreadable": list(unreadable)})
    else:
        _print(target, proofs, missing)
        for reason in unreadable:
            click.echo(output.printable(reason))
    bad = [one for one in proofs if one.damages or one.state in (DAMAGED, INCOMPLETE)]
    if bad or missing or unreadable or not proofs:
        ctx.exit(FINDING)


def _verified(target: Target) -> tuple[list[Proof], tuple[str, ...], tuple[str, ...]]:
    """The proofs, the names of what is gone, and what else could not be read."""
    if target.name is not None:
        return _proofs([survey_one(target.root, target.name)]), (), ()
    deadline = time.monotonic() + _LOOK_SECS
    while True:
        found = survey(target.root)
        candidates = [one for one in found.found if one.is_candidate]
        proofs = _proofs(candidates)
        # A training may have pruned them all while they were read: there are newer ones then.
        if proofs or not candidates or time.monotonic() >= deadline:
            return proofs, found.missing, found.unreadable


def _proofs(found: list[Surveyed]) -> list[Proof]:
    proofs = []
    with reading("verifying", sum(one.size for one in found)) as on_block:
        for one in found:
            proof = prove(one, on_block=on_block) if one.is_candidate else Proof(one)
            if proof is not None:
                proofs.append(proof)
    return proofs


def _json(proof: Proof) -> dict[str, Any]:
    one = proof.surveyed
    return {
        "name": one.checkpoint.name,
        "path": str(one.checkpoint.path),
        "step": one.checkpoint.step,
        "bytes": one.size,
        "engine": one.engine,
        "state": one.state,
        "reasons": list(one.reasons),
        "damage": [{"file": None if path is None else str(path), "reason": reason} for path, reason in proof.damages],
        "readable": proof.is_readable,
    }


def _print(target: Target, proofs: list[Proof], missing: tuple[str, ...]) -> None:
    if not proofs and not missing:
        click.echo(f"{output.printable(str(target.path))}: expected checkpoints, found none")
        return
    if proofs:
        print_table(_COLUMNS, [_row(one) for one in proofs])
    for proof in proofs:
        for reason in proof.surveyed.reasons:
            click.echo(f"{output.printable(proof.surveyed.checkpoint.name)}: {output.printable(reason)}")
    for name in missing:
        click.echo(output.missing_newest(name))
    states = Counter(one.state for one in proofs)
    click.echo(", ".join(f"{count} {state}" for state, count in states.items()))


def _row(proof: Proof) -> tuple[str, ...]:
    one = proof.surveyed
    manifest = one.checkpoint.manifest
    return (
        one.state,
        "-" if one.checkpoint.step is None else str(one.checkpoint.step),
        "-" if manifest is None else str(len(manifest.files)),
        output.size(one.size),
        output.printable(one.engine),
        output.printable(one.checkpoint.name),
    )
