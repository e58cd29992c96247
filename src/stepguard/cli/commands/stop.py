"""``stepguard stop``: have a run stop."""

from __future__ import annotations

from pathlib import Path

import click

from stepguard.cli.arguments import LOGDIR, SECONDS, STEP
from stepguard.cli.logdir.asking import asked
from stepguard.cli.text import output
from stepguard.watching import requests


@click.command(
    short_help="Have a run stop, now or after a step.",
    epilog="""\b
Examples:
  stepguard stop runs/digits
  stepguard stop runs/digits --at 50000
""",
)
@click.argument("logdir", type=LOGDIR)
@click.option("--at", "step", type=STEP, metavar="STEP", help="Stop after this step, and not before.")
@click.option("--timeout", "timeout_secs", type=SECONDS, default=10.0, show_default=True, help="Seconds to wait.")
@output.json_option
def command(logdir: Path, step: int | None, timeout_secs: float, as_json: bool) -> None:
    """Have the run that trains in LOGDIR stop at its next step boundary, as `sv.request_stop()` does, or after a step.

    It sees the request within two seconds, and its answer is waited for, not its end. It saves its last step as at any
    end; the reason in its ledger is `command`. With --at, the run has one process.

    Exit code 1: no run is alive there, the step is over, or it has not answered in time.
    """
    asked(logdir, requests.STOP, step=step, within_secs=timeout_secs, as_json=as_json)
