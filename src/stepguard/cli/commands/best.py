"""``stepguard best``: the path of the best checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from stepguard.cli.arguments import LOGDIR
from stepguard.cli.exits import FINDING, CommandError
from stepguard.cli.logdir import standings
from stepguard.cli.logdir.contents import DAMAGED
from stepguard.cli.text import output
from stepguard.store.marks import BEST
from stepguard.words import listed


@click.command(
    short_help="Print the path of the best checkpoint.",
    epilog="""\b
Examples:
  stepguard best runs/digits
  stepguard show "$(stepguard best runs/digits)"
  python evaluate.py --checkpoint "$(stepguard best runs/digits)"
""",
)
@click.argument("logdir", type=LOGDIR)
@output.json_option
def command(logdir: Path, as_json: bool) -> None:
    """Print the path of the best checkpoint of LOGDIR, by the metric and the rule of the run that saved it last.

    Its data are not read: `stepguard verify` does that.

    Exit code 1: no checkpoint has the metric, no run had `keep_best`, or the best one may be damaged.
    """
    one = standings.chosen(logdir, BEST)
    if one.state == DAMAGED:
        raise CommandError(f"{one.checkpoint.path}: is the best, and damaged: {listed(one.reasons)}", FINDING)
    if as_json:
        found = {"checkpoint": str(one.checkpoint.path), "step": one.checkpoint.step}
        output.print_json({**found, "metrics": dict(standings.marks_of(one).metrics)})
    else:
        # As it is, for a shell: bytes that a terminal obeys are of the user's own choice of LOGDIR.
        click.echo(str(one.checkpoint.path))
