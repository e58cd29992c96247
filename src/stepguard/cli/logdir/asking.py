"""Asking the run that trains in a logdir for something, and printing its answer."""

from __future__ import annotations

from pathlib import Path

import click

from stepguard.cli.exits import FINDING, CommandError
from stepguard.cli.text import output
from stepguard.watching import heartbeat, history, requests
from stepguard.words import printable


def asked(
    logdir: Path, verb: str, *, within_secs: float, as_json: bool, name: str | None = None, step: int | None = None
) -> None:
    """Ask the chief, and print what it answers.

    Raises CommandError if no chief is alive, if it refuses, or if it does not answer in time.
    """
    chief = heartbeat.read_one(logdir, history.CHIEF)
    state = None if chief is None else heartbeat.state(chief)
    if chief is None or state != "alive":
        found = "no heartbeat of one" if state is None else f"its chief {state}"
        raise CommandError(f"{logdir}: expected a run that is alive, found {found}: nothing was asked", FINDING)
    answer = requests.ask(logdir, chief, verb, name=name, step=step, within_secs=within_secs)
    if answer is None:
        raise CommandError(
            f"{logdir}: process {chief.pid} on {chief.host} has not answered in {within_secs:g} s; the request is "
            f"taken back, unless the run is just doing it",
            FINDING,
        )
    if not answer.is_done:
        raise CommandError(f"{logdir}: {answer.text}", FINDING)
    if as_json:
        output.print_json({"logdir": str(logdir), "pid": chief.pid, "host": chief.host, "answer": answer.text})
    else:
        click.echo(printable(answer.text))
