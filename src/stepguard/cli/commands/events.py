"""``stepguard events``: the scalars in the event files of a logdir."""

from __future__ import annotations

import csv
import io
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from stepguard.cli import interrupts
from stepguard.cli.arguments import LOGDIR
from stepguard.cli.exits import FINDING, NOT_DONE, CommandError
from stepguard.cli.logdir.event_files import Curve, EventFiles, event_files, read_curves
from stepguard.cli.text import output
from stepguard.cli.text.plot import plotted
from stepguard.cli.text.table import Column, print_table, warning
from stepguard.disk import files
from stepguard.words import printable

_MOST_DRAWN = 100  # below each other: a picture has a largest height
_BEGIN_A_FORMULA = frozenset("=+-@")
_PLOT_LINES = 10
_PLOT_COLUMNS = 80

_COLUMNS = (
    Column("TAG", shrink=True),
    Column("COUNT", align_right=True),
    Column("FIRST", align_right=True),
    Column("LAST", align_right=True),
    Column("VALUE", align_right=True),
    Column("MIN", align_right=True),
    Column("MAX", align_right=True),
    Column("NOT FINITE", align_right=True, hide=True, style=warning),
)

_OUT = click.Path(dir_okay=False, writable=True, path_type=Path, allow_dash=True)


@click.command(
    short_help="Show the scalars in the event files of a logdir.",
    epilog="""\b
Examples:
  stepguard events runs/digits
  stepguard events runs/digits --tag 'loss*' --plot | less
  stepguard events runs/digits --csv scalars.csv --png scalars.png
  stepguard events runs/digits --csv - | head
""",
)
@click.argument("logdir", type=LOGDIR)
@click.option("--tag", "tags", multiple=True, metavar="PATTERN", help="Only these, e.g. 'loss*'; may be repeated.")
@click.option("--plot/--no-plot", default=None, help="Plot the curves below the table.  [default: in a terminal]")
@click.option("--csv", "csv_path", type=_OUT, metavar="FILE|-", help="Write all values: tag, step, wall_time, value.")
@click.option("--png", "png_path", type=_OUT, metavar="FILE|-", help="Draw the curves; needs stepguard[plots].")
@output.json_option
@click.pass_context
def command(
    ctx: click.Context,
    logdir: Path,
    tags: tuple[str, ...],
    plot: bool | None,
    csv_path: Path | None,
    png_path: Path | None,
    as_json: bool,
) -> None:
    """Show the scalars in the event files of LOGDIR: how many, from which step to which, the last value, the extremes.

    The scalars are those that TensorBoard shows: values of a killed run for steps that were done again are left out.
    With `--csv -` or `--png -` nothing else is printed; only one of these and `--json` may be given.

    Exit code 1: an event file, or a record in one, could not be read; it is named on stderr, and passed over.
    """
    _check_stdout(csv_path, png_path, as_json=as_json)
    found = event_files(logdir)
    curves, lost = read_curves(found.paths, tags)
    if lost:
        told = f"{logdir}: {output.counted(lost, 'record')} of its event files cannot be read, and are passed over"
        found = replace(found, unreadable=(*found.unreadable, told))
    for reason in found.unreadable:
        click.echo(printable(reason), err=True)
    if csv_path is not None:
        _write(csv_path, _csv(curves))
    if png_path is not None:
        if not curves:
            raise CommandError(f"{logdir}: expected scalars to draw, found none", NOT_DONE)
        _write(png_path, _png(logdir, curves))
    if Path("-") not in (csv_path, png_path):
        if as_json:
            output.print_json(_document(logdir, found, curves))
        else:
            _print(logdir, found, curves, has_plots=sys.stdout.isatty() if plot is None else plot)
    if found.unreadable:
        ctx.exit(FINDING)


def _check_stdout(csv_path: Path | None, png_path: Path | None, *, as_json: bool) -> None:
    """Raise UsageError if more than one of the options writes to stdout."""
    wanted = [name for name, path in (("--csv -", csv_path), ("--png -", png_path)) if path == Path("-")]
    wanted += ["--json"] if as_json else []
    if len(wanted) > 1:
        raise click.UsageError(
            f"{' and '.join(wanted)}: expected one of them, since each writes to stdout; give a FILE instead of -"
        )


def _document(logdir: Path, found: EventFiles, curves: Sequence[Curve]) -> dict[str, Any]:
    return {
        "logdir": str(logdir),
        "scalars": [_json(one) for one in curves],
        "unreadable": list(found.unreadable),
    }


def _json(curve: Curve) -> dict[str, Any]:
    finite = curve.finite
    return {
        "tag": curve.tag,
        "count": len(curve.values),
        "first_step": curve.steps[0],
        "last_step": curve.steps[-1],
        "first_time": curve.times[0],
        "last_time": curve.times[-1],
        "last": curve.values[-1],
        "min": min(finite, default=None),
        "max": max(finite, default=None),
        "not_finite": len(curve.values) - len(finite),
    }


def _print(logdir: Path, found: EventFiles, curves: Sequence[Curve], *, has_plots: bool) -> None:
    if not curves:
        click.echo(f"{printable(str(logdir))}: {_nothing(logdir, found)}")
        return
    print_table(_COLUMNS, [_row(one) for one in curves])
    if has_plots:
        width = min(_PLOT_COLUMNS, shutil.get_terminal_size().columns)
        for one in curves:
            if len(one.values) < 2:
                continue
            picture = plotted(printable(one.tag), one.steps, one.values, width=width, height=_PLOT_LINES)
            click.echo(f"\n{picture}")


def _nothing(logdir: Path, found: EventFiles) -> str:
    if found.paths:
        return "no scalars in its event files that were asked for"
    below = sorted({str(path.parent) for path in logdir.glob("*/*tfevents*")})
    return "no event files" + (f"; there are some in {', '.join(map(printable, below))}" if below else "")


def _row(curve: Curve) -> tuple[str, ...]:
    finite = curve.finite
    return (
        printable(curve.tag),
        str(len(curve.values)),
        str(curve.steps[0]),
        str(curve.steps[-1]),
        output.number(curve.values[-1]),
        output.number(min(finite, default=None)),
        output.number(max(finite, default=None)),
        str(len(curve.values) - len(finite)),
    )


def _write(path: Path, content: bytes) -> None:
    if path == Path("-"):
        click.echo(content, nl=False)
    else:
        files.write_named(path, content)


def _csv(curves: Sequence[Curve]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("tag", "step", "wall_time", "value"))
    for curve in curves:
        writer.writerows(
            (_defused(curve.tag), *point) for point in zip(curve.steps, curve.times, curve.values, strict=True)
        )
    return text.getvalue().encode("utf-8", "surrogateescape")


def _defused(tag: str) -> str:
    """A cell that no spreadsheet takes for a formula, also where full-width characters count, and no terminal obeys."""
    first = unicodedata.normalize("NFKC", tag.lstrip()[:1])
    return printable(f"'{tag}" if first in _BEGIN_A_FORMULA else tag)


def _png(logdir: Path, curves: Sequence[Curve]) -> bytes:
    if len(curves) > _MOST_DRAWN:
        raise CommandError(
            f"--png: expected at most {_MOST_DRAWN} curves, found {len(curves)}: choose with --tag", NOT_DONE
        )
    try:
        with interrupts.held():
            from matplotlib.figure import Figure
    except ImportError as error:
        raise CommandError(
            f"--png cannot be drawn without matplotlib ({error}): pip install 'stepguard[plots]'", NOT_DONE
        ) from error
    figure = Figure(figsize=(8, 2.5 * len(curves)), layout="constrained")
    figure.suptitle(printable(str(logdir)), parse_math=False)
    for curve, axes in zip(curves, figure.subplots(len(curves), squeeze=False)[:, 0], strict=True):
        axes.plot(curve.steps, curve.values, marker="." if len(curve.steps) < 50 else None, linewidth=1)
        axes.set_title(printable(curve.tag), fontsize="medium", parse_math=False)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
