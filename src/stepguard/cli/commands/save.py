"""``stepguard save``: have a run save now."""

from __future__ import annotations

from pathlib import Path

import click

from stepguard.cli.arguments import LOGDIR, SECONDS
from stepguard.cli.commands.keep import checked_name
from stepguard.cli.logdir.asking import asked
from stepguard.cli.text import output
from stepguard.watching import requests


@click.command(
    short_help="Have a run save now.",
    epilog="""\b
Examples:
  stepguard save runs/digits
  stepguard save runs/digits --name before-maintenance
""",
)
@click.argument("logdir", type=LOGDIR)
@click.option("--name", callback=checked_name, metavar="NAME", help="Keep it under this name.")
@click.option("--timeout", "timeout_secs", type=SECONDS, default=60.0, show_default=True, help="Seconds to wait.")
@output.json_option
def command(logdir: Path, name: str | None, timeout_secs: float, as_json: bool) -> None:
    """Have the run that trains in LOGDIR save its last step now, and wait until that is committed.

    The run sees the request within two seconds. A step that runs is finished first.

    Exit code 1: no run is alive there, it could not save, or it has not answered in time.
    """
    asked(logdir, requests.SAVE, name=name, within_secs=timeout_secs, as_json=as_json)
