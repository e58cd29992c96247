"""``stepguard pull``: fetch checkpoints and history from a mirror into a logdir."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from stepguard.cli.arguments import NEW_LOGDIR, mirror_at
from stepguard.cli.exits import FINDING, CommandError
from stepguard.cli.text import output
from stepguard.errors import CheckpointCorruptError
from stepguard.remote.copies import Copied, Copies
from stepguard.remote.history import History
from stepguard.remote.opening import open_remote
from stepguard.store import CheckpointStore
from stepguard.store.checkpoint import split_name
from stepguard.words import printable


@click.command(
    short_help="Fetch a run from its mirror into a logdir.",
    epilog="""\b
Examples:
  stepguard pull s3://bucket/runs/digits runs/digits
  stepguard pull s3://bucket/runs/digits runs/digits --all
""",
)
@click.argument("mirror", callback=mirror_at, metavar="URL")
@click.argument("logdir", type=NEW_LOGDIR)
@click.option("--all", "wants_all", is_flag=True, help="Every checkpoint, and not only the newest good one.")
@output.json_option
@click.pass_context
def command(ctx: click.Context, mirror: str, logdir: Path, wants_all: bool, as_json: bool) -> None:
    """Fetch the newest good checkpoint of the mirror at URL into LOGDIR, and the ledger and event files with it.

    Each file is compared with the manifest before the checkpoint is committed. What LOGDIR has already stays as it is.
    A start of the program with the mirror does the same by itself.

    Exit code 1: a checkpoint is damaged in the mirror, or there is none, or another process trains in LOGDIR.
    """
    copies = Copies(open_remote(mirror))
    found = copies.listed()
    if not found:
        raise CommandError(f"{mirror}: expected checkpoints, found none", FINDING)
    taken: list[str] = []
    damaged: dict[str, str] = {}
    with CheckpointStore(logdir).acquire():
        # The newest is committed last, so that the state file names it.
        for one in reversed(found) if wants_all else found:
            try:
                if _pull(copies, one, logdir):
                    taken.append(one.name)
            except (CheckpointCorruptError, FileNotFoundError) as error:
                damaged[one.name] = str(error)
            else:
                if not wants_all:
                    break
        if taken:
            _name_newest(logdir, split_name(taken[-1])[0])
        history = History(logdir, copies.remote, copies.pace).fetch()
    if as_json:
        output.print_json({"pulled": taken, "damaged": damaged, "history": history})
    else:
        _print(taken, damaged, history)
    if damaged:
        ctx.exit(FINDING)


def _pull(copies: Copies, one: Copied, logdir: Path) -> bool:
    """Fetch and commit one checkpoint; ``False`` if it is there already."""
    manifest = copies.manifest(one.name)
    store = CheckpointStore(logdir, basename=split_name(one.name)[0], engine=manifest.engine)
    for here in store.candidates():
        if here.name == one.name:
            with contextlib.suppress(CheckpointCorruptError):
                mine = store.verify(here).manifest
                if mine is not None and mine.files == manifest.files:
                    return False
    stage = store.stage(one.name)
    try:
        digests = copies.fetch(manifest, stage)
        store.commit(
            one.name,
            manifest.step,
            extra=manifest.extra,
            digests=digests,
            taken_at=manifest.time,
            marks=manifest.marks,
        )
    finally:
        store.discard(stage)
    return True


def _name_newest(logdir: Path, basename: str) -> None:
    """Have the state file name the newest checkpoint, whatever was fetched last."""
    store = CheckpointStore(logdir, basename=basename)
    for one in store.candidates()[:1]:
        store.point_to(one)


def _print(taken: list[str], damaged: dict[str, Any], history: list[str]) -> None:
    for name in taken:
        click.echo(f"pulled  {printable(name)}")
    for name, reason in damaged.items():
        click.echo(f"damaged in the mirror: {printable(name)}: {printable(reason)}")
    click.echo(f"{output.counted(len(taken), 'checkpoint')} pulled, and {output.counted(len(history), 'file')} beside")
