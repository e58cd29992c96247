"""``stepguard keep``: keep a checkpoint until it is taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stepguard.cli.arguments import LOGDIR
from stepguard.cli.logdir import standings
from stepguard.cli.logdir.contents import ListedCheckpoint
from stepguard.cli.text import output
from stepguard.store import CheckpointStore, tensorflow_files
from stepguard.store.marks import Marks, check_name
from stepguard.words import printable


def checked_name(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """The value of an option `--name`; a mistake in the arguments if no checkpoint may have it."""
    try:
        if value is not None:
            check_name(value)
    except ValueError as error:
        raise click.BadParameter(printable(str(error))) from error
    return value


@click.command(
    short_help="Keep a checkpoint until `unkeep`.",
    epilog="""\b
Examples:
  stepguard keep runs/digits 1200
  stepguard keep runs/digits best --name released
""",
)
@click.argument("logdir", type=LOGDIR)
@standings.target_of
@click.option(
    "--name", callback=checked_name, metavar="NAME", help="A name for it; it moves here from another checkpoint."
)
@output.json_option
def command(logdir: Path, target: str, name: str | None, as_json: bool) -> None:
    """Keep the checkpoint of LOGDIR at a step, the best one, or one by its name: the retention rules of a run and
    `stepguard prune` leave it alone.

    That stands in its manifest, which is replaced as a whole. A run in LOGDIR counts its checkpoints in memory, so this
    is done while none trains there; a program keeps by `sess.save(name=...)`.

    Exit code 1: there is no such checkpoint, or another process trains or prunes in LOGDIR.
    """
    with CheckpointStore(logdir).acquire():
        one = standings.chosen(logdir, target)
        marks = standings.marks_of(one)
        said = Marks(is_kept=True) if name is None else Marks(names=(name,))
        mark(logdir, one, marks.joined(said))
    say(one, "kept", as_json=as_json)


def mark(logdir: Path, one: ListedCheckpoint, marks: Marks) -> CheckpointStore:
    """Replace the marks of a checkpoint, as the chief of the logdir; return its store."""
    store = CheckpointStore(logdir, basename=one.basename, engine=one.engine, saver_files=tensorflow_files)
    store.mark(one.checkpoint.name, marks)
    return store


def say(one: ListedCheckpoint, done: str, *, as_json: bool) -> None:
    """Say what was done with a checkpoint."""
    document: dict[str, Any] = {"checkpoint": str(one.checkpoint.path), "step": one.checkpoint.step, done: True}
    if as_json:
        output.print_json(document)
    else:
        click.echo(f"{done}  {printable(str(one.checkpoint.path))}")
