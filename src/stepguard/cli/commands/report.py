"""``stepguard report``: a page about a run, as one file that opens anywhere."""

from __future__ import annotations

from pathlib import Path

import click

from stepguard.cli.arguments import LOGDIR
from stepguard.cli.exits import FINDING
from stepguard.cli.logdir import runs
from stepguard.cli.reporting import charts, page
from stepguard.cli.reporting.gathering import gather
from stepguard.cli.text import output
from stepguard.disk import files
from stepguard.words import printable

_OUT = click.Path(dir_okay=False, writable=True, path_type=Path, allow_dash=True)


@click.command(
    short_help="Write a page about a run, as one HTML file.",
    epilog="""\b
Examples:
  stepguard report runs/digits -o report.html
  stepguard report runs/digits -o report.html --tag 'loss*' --tag accuracy
""",
)
@click.argument("logdir", type=LOGDIR)
@click.option("-o", "--output", "path", type=_OUT, required=True, metavar="FILE|-", help="The file to write.")
@click.option(
    "--tag", "tags", multiple=True, metavar="PATTERN", help="Only these curves, e.g. 'loss*'; may be repeated."
)
@click.pass_context
def command(context: click.Context, logdir: Path, path: Path, tags: tuple[str, ...]) -> None:
    """Write a page about the run in LOGDIR: its starts, stops and crashes, the curves of its numbers, its checkpoints,
    what saving and restarts have cost, whether steps that were done again are the same, its configuration.

    The page is one HTML file, about 5 MB large, that needs no network and no server. The secrets in the command of the
    program are left out, as far as their names tell them. Drawn by Plotly: pip install 'stepguard[report]'.

    Exit code 1: nothing has run there, or the system could not read something, which the page names.
    """
    charts.load()  # First of all, so that a missing package costs no time.
    facts = gather(logdir, tags)
    if facts.is_empty:
        reason = f"nothing has run here: there is nothing to report{runs.elsewhere(logdir)}"
        click.echo(f"{printable(str(logdir))}: {reason}", err=True)
        context.exit(FINDING)
    content = page.written(facts).encode("utf-8", "backslashreplace")
    if path == Path("-"):
        click.echo(content, nl=False)
    else:
        files.write_named(path, content)
        starts = output.counted(len(facts.history.attempts), "start")
        there = output.counted(len(facts.checkpoints), "checkpoint")
        click.echo(
            f"{printable(str(path))}: {output.size(len(content))}, {starts}, {there}, "
            f"{output.counted(len(facts.curves), 'curve')}"
        )
    for reason in facts.unreadable:
        click.echo(printable(reason), err=True)
    if facts.unreadable:
        context.exit(FINDING)
