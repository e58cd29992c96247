"""``stepguard log``: what happened to a run, as a story."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from stepguard.cli.arguments import LOGDIR
from stepguard.cli.exits import FINDING
from stepguard.cli.logdir import runs, story
from stepguard.cli.logdir.run_state import read_run_state
from stepguard.cli.logdir.story import Entry
from stepguard.cli.text import output
from stepguard.watching import ledger
from stepguard.words import printable

_ROLE_WIDTH = 9
_SECS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


def _age(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """The seconds of a duration such as ``90s``, ``30min``, ``2h`` or ``3d``."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|min|m|h|d)", value.strip())
    if match is None:
        raise click.BadParameter(f"expected a duration such as 90s, 30min, 2h or 3d, found {printable(value)!r}")
    return float(match.group(1)) * _SECS[match.group(2)]


@click.command(
    short_help="Tell what happened to a run.",
    epilog="""\b
Examples:
  stepguard log runs/digits
  stepguard log runs/digits --since 12h --trouble
  stepguard log runs/digits --json | jq 'select(.event == "restore") | .lost_steps'
""",
)
@click.argument("logdir", type=LOGDIR)
@click.option("--since", callback=_age, metavar="DURATION", help="Only the last 90s, 30min, 2h or 3d.")
@click.option("--role", "roles", multiple=True, metavar="ROLE", help="Only this process (chief, worker-1, launcher).")
@click.option("--trouble", is_flag=True, help="Only what went wrong.")
@click.option(
    "--every", is_flag=True, help="Each checkpoint on a line of its own, and not one line for those in a row."
)
@click.option("--json", "as_json", is_flag=True, help="Print the events behind it, one JSON document on each line.")
@click.pass_context
def command(
    context: click.Context,
    logdir: Path,
    since: float | None,
    roles: tuple[str, ...],
    trouble: bool,
    every: bool,
    as_json: bool,
) -> None:
    """Tell what happened to the run in LOGDIR: starts, what they restored and what was lost, saves, warnings, hangs,
    stops and their reasons, ends without a word.

    It is read from the ledger, run.jsonl, and those that were put aside, run.1.jsonl and so on. Times are of this
    machine's time zone, by the clocks of the machines that have written them.

    Exit code 1: nothing has run there, or the system could not read something, which is named and passed over.
    """
    unreadable: list[str] = []
    events = ledger.read_whole(
        logdir, lambda path, error: unreadable.append(f"{path}: could not be read: {error.strerror or error}")
    )
    entries = (*story.told(events, folds=not (every or as_json)), *_ends(logdir))
    from_time = None if since is None else time.time() - since
    shown = [
        one
        for one in entries
        if (from_time is None or one.time >= from_time)
        and (not roles or one.role in roles)
        and (one.is_trouble or not trouble)
    ]
    if as_json:
        # Two entries may have the same event: a start, and that it ended without a word.
        events_of = {id(event): event for one in shown for event in one.events}
        for event in events_of.values():
            output.print_json_line(event)
    else:
        _print(shown)
    for reason in unreadable:
        click.echo(printable(reason), err=as_json)
    if not entries:
        click.echo(f"{printable(str(logdir))}: no ledger tells of a run{runs.elsewhere(logdir)}", err=True)
    if unreadable or not entries:
        context.exit(FINDING)


def _ends(logdir: Path) -> Iterator[Entry]:
    """The ends of which no line tells: processes of the present start that are gone."""
    for one in read_run_state(logdir).processes:
        if one.state == "dead" and not one.is_left_behind:
            yield story.dead(one.beat)


def _print(entries: Iterable[Entry]) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    day = None
    for one in entries:
        when = time.localtime(one.time)
        if (today := time.strftime("%Y-%m-%d", when)) != day:
            click.echo(click.style(today, bold=True))
            day = today
        head = f"{time.strftime('%H:%M:%S', when)}  {printable(one.role):<{_ROLE_WIDTH}} "
        lines = [one.text] if width is None else textwrap.wrap(one.text, max(20, width - len(head))) or [""]
        for number, line in enumerate(lines):
            text = line if one.colour is None else click.style(line, fg=one.colour)
            click.echo((head if number == 0 else " " * len(head)) + text)
