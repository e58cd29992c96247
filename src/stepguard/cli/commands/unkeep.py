"""``stepguard unkeep``: let the retention rules count a checkpoint again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from stepguard.cli.arguments import LOGDIR
from stepguard.cli.commands.keep import mark, say
from stepguard.cli.exits import FINDING, CommandError
from stepguard.cli.logdir import standings
from stepguard.cli.text import output
from stepguard.store import CheckpointStore
from stepguard.words import printable


@click.command(
    short_help="Let the retention rules count a checkpoint again.",
    epilog="""\b
Examples:
  stepguard unkeep runs/digits before-lr-drop
  stepguard unkeep runs/digits 1200
""",
)
@click.argument("logdir", type=LOGDIR)
@standings.target_of
@output.json_option
def command(logdir: Path, target: str, as_json: bool) -> None:
    """Take back what keeps a checkpoint of LOGDIR. By a name, only that name is taken away; else all names are, and
    what `stepguard keep` has said.

    Nothing is removed now: the next run in LOGDIR counts the checkpoint among the `max_to_keep` newest, and `stepguard
    prune` no longer leaves it alone. One that is among the best stays as long as it is.

    Exit code 1: there is no such checkpoint, nothing keeps it, or another process trains or prunes in LOGDIR.
    """
    with CheckpointStore(logdir).acquire():
        one = standings.chosen(logdir, target)
        before = standings.marks_of(one)
        if target in before.names:
            after = replace(before, names=tuple(name for name in before.names if name != target))
        else:
            after = replace(before, names=(), is_kept=False)
        if after == before:
            raise CommandError(f"{printable(str(one.checkpoint.path))}: nothing keeps it", FINDING)
        mark(logdir, one, after).count_again(one.checkpoint.name)
    say(one, "no longer kept" if not (after.names or after.is_kept) else "name taken away", as_json=as_json)
