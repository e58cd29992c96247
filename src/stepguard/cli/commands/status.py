"""``stepguard status``: whether a run lives, how far it is, and what went wrong."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stepguard.cli.arguments import LOGDIR_OR_URL
from stepguard.cli.exits import FINDING, NOTHING_YET
from stepguard.cli.logdir.addresses import is_image
from stepguard.cli.text import output

if TYPE_CHECKING:
    from stepguard.cli.logdir.run_state import RunState
    from stepguard.cli.logdir.run_views import Many, One

_LOOK_SECS = 1.0
# Polling a large logdir must not keep a slow disk busy.
_MOST_SHARE = 0.2


@click.command(
    short_help="Say whether a run lives, how far it is, and what went wrong.",
    epilog="""\b
Examples:
  stepguard status runs/digits
  stepguard status runs/digits --follow
  stepguard status runs/
  stepguard status s3://bucket/runs/digits
  stepguard status runs/a runs/b --json | jq '.runs[] | select(.well | not) | .logdir'
  stepguard status runs/digits --json | jq '.processes[] | {role, state, step}'

\b
Exit codes, besides those of every command:
  0    every process lives, or stopped without an error
  1    one is dead, silent, hangs, or stopped with an error, the launcher gave up, something could not be read, or
       nothing has run there; with --follow always 0, at Ctrl-C
  4    with --probe: there is no heartbeat yet
""",
)
@click.argument("logdirs", type=LOGDIR_OR_URL, nargs=-1, required=True, metavar="LOGDIR...")
@click.option(
    "--follow",
    "-f",
    is_flag=True,
    help="Go on: in place in a terminal, else with a line for each change. Ctrl-C ends it.",
)
@click.option(
    "--probe",
    is_flag=True,
    help="Only say by the exit code whether the run on this host lives, quickly: for a probe of Kubernetes.",
)
@output.json_option
@click.pass_context
def command(context: click.Context, logdirs: tuple[Path, ...], follow: bool, probe: bool, as_json: bool) -> None:
    """Show the state of the run in LOGDIR, from its heartbeats, its ledger and its checkpoints. Of several, and of a
    directory with runs below it, each gets a line.

    \b
    alive    a heartbeat came within the last seconds
    silent   no heartbeat came, and the process runs or is on another host: it hangs, was suspended, or is unreachable
    dead     the process no longer exists, and has not reported a stop
    stopped  the process has reported a stop and its reason

    "at risk" are the steps that a crash now would lose. Time is productive, replayed (its steps were lost and done
    again) or down (between a crash and the next start that trained). A mirror tells what was so when the last
    checkpoint was copied.
    """
    if (follow or probe) and any(map(is_image, logdirs)):
        option = "--follow" if follow else "--probe"
        raise click.UsageError(f"{option}: expected logdirs of this machine, found an address; ask again for its state")
    if probe:
        _probe(context, logdirs, is_shown_otherwise=follow or as_json)
    # A probe is called every few seconds, and does without what reads checkpoints and ledgers.
    from stepguard.cli.logdir.run_views import view_of

    view = view_of(logdirs)
    if follow:
        try:
            _follow(view, as_json=as_json)
        except KeyboardInterrupt:
            return
    found = view.read()
    if as_json:
        output.print_json(view.document(found))
    else:
        click.echo(view.text(found, _width()))
    if not all(one.is_well for one in found):
        context.exit(FINDING)


def _probe(context: click.Context, logdirs: tuple[Path, ...], *, is_shown_otherwise: bool) -> None:
    if len(logdirs) != 1 or is_shown_otherwise:
        raise click.UsageError("--probe takes one LOGDIR, and neither --follow nor --json")
    from stepguard.cli.logdir.probe import probed

    found = probed(logdirs[0])
    click.echo(found.text)
    context.exit(NOTHING_YET if found.is_well is None else 0 if found.is_well else FINDING)


# --- going on ---


def _follow(view: One | Many, *, as_json: bool) -> None:
    if as_json:
        for found, _ in _changes(view):
            output.print_json_line(view.document(found))
    elif sys.stdout.isatty():
        _refresh(view)
    else:
        for found, changed in _changes(view):
            for line in changed:
                click.echo(f"{time.strftime('%H:%M:%S', time.localtime(found[0].now))} {line}")


def _states(view: One | Many) -> Iterator[list[RunState]]:
    while True:
        began = time.monotonic()
        yield view.read()
        time.sleep(max(_LOOK_SECS, (time.monotonic() - began) / _MOST_SHARE))


def _refresh(view: One | Many) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for found in _states(view):
            live.update(Text.from_ansi(view.text(found, console.width)), refresh=True)


def _changes(view: One | Many) -> Iterator[tuple[list[RunState], list[str]]]:
    """Yield the state whenever more than the step has changed, with one line for each change."""
    seen: dict[str, object] = {}
    for found in _states(view):
        lines = []
        for key, value, line in view.watched(found):
            if key not in seen or seen[key] != value:
                lines.append(line)
            seen[key] = value
        if lines:
            yield found, lines


def _width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None
