"""``stepguard diff``: what differs between two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import click

from stepguard.cli.arguments import Target, target_argument
from stepguard.cli.exits import FINDING
from stepguard.cli.logdir.checkpoint_changes import Change, compared
from stepguard.cli.text import output
from stepguard.cli.text.progress_bar import reading
from stepguard.cli.text.table import Column, print_table
from stepguard.words import printable

_COLUMNS = (
    Column("CHANGE"),
    Column("NAME", shrink=True),
    Column("A", align_right=True, shrink=True),
    Column("B", align_right=True, shrink=True),
    Column("CHANGED", align_right=True),
    Column("MAX ABS", align_right=True),
    Column("MAX REL", align_right=True),
)


@click.command(
    short_help="Compare two checkpoints.",
    epilog="""\b
Examples:
  stepguard diff runs/digits/model.ckpt-1200 runs/digits/model.ckpt-1300
  stepguard diff runs/a runs/b                (those that a restart would take)
  stepguard diff runs/a runs/b --json | jq '.changes[] | select(.kind == "shape")'
""",
)
@target_argument("a", "A", takes_urls=False)
@target_argument("b", "B", takes_urls=False)
@output.json_option
@click.pass_context
def command(ctx: click.Context, a: Target, b: Target, as_json: bool) -> None:
    """Say what differs between the checkpoints A and B: tensors, and the numbers and strings saved beside them.

    CHANGED is how many values differ, MAX ABS the largest difference, and MAX REL the largest one divided by the larger
    of the two magnitudes. A NaN equals a NaN in the same place.

    Exit code 0: equal. 1: different.
    """
    one, other = a.checkpoint(), b.checkpoint()
    with reading("comparing", one.size) as on_tensor:
        changes, equal = compared(one, other, on_tensor)
    if as_json:
        output.print_json(
            {
                "a": str(one.checkpoint.path),
                "b": str(other.checkpoint.path),
                "equal": equal,
                "changes": [asdict(change) for change in changes],
            }
        )
    else:
        _print(changes, equal)
    if changes:
        ctx.exit(FINDING)


def _print(changes: list[Change], equal: int) -> None:
    if changes:
        print_table(_COLUMNS, list(_rows(changes)))
        click.echo(f"{output.counted(len(changes), 'difference')}, {equal:,} equal")
    else:
        click.echo(f"equal: {equal:,} tensors and values")


def _rows(changes: list[Change]) -> Iterator[tuple[str, ...]]:
    for one in changes:
        numbers = ("-", "-", "-")
        if one.difference is not None:
            found = one.difference
            numbers = (f"{found.changed}/{found.count}", output.number(found.absolute), output.number(found.relative))
        yield (
            one.kind,
            printable(one.name),
            *(printable(form or "-") for form in (one.a, one.b)),
            *numbers,
        )
