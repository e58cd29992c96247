"""A table as text: aligned, complete when it is piped, fitted to the width of a terminal.

Not rich's own: that one needs more than three seconds for the 10,000 checkpoints that `ls` has to list in two.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import click
from rich.cells import cell_len, set_cell_size

from stepguard.words import printable

_GAP = "  "
_NOTHING = ("0", "-")
_SHORTEST = 12


@dataclass(frozen=True, slots=True)
class Column:
    """``style`` returns the click name of a cell's colour. Of columns that may ``shrink``, the widest shrinks first.

    ``hide`` leaves out a column without information in a terminal, where room is short, but not in a pipe.
    """

    title: str
    align_right: bool = False
    shrink: bool = False
    hide: bool = False
    style: Callable[[str], str | None] = field(default=lambda _: None)


def warning(count: str) -> str | None:
    """The colour of a count that should be 0."""
    return None if count in _NOTHING else "red"


_COLOURS = {"good": "green", "damaged": "red"}

STATE = Column("STATE", style=lambda state: _COLOURS.get(state, "yellow"))
"""The state of a checkpoint."""


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under the titles of their columns. What a terminal would obey is shown as escapes."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    # One write: thousands of small ones take longer than all the rest. Click takes the colours out where it is piped.
    click.echo("\n".join(table_lines(columns, rows, width)))


def table_lines(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """The lines of a table, coloured; fitted to a terminal of ``width`` columns, and complete with None."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if width is not None:
        shown = [n for n, one in enumerate(columns) if not (one.hide and all(row[n] in _NOTHING for row in rows))]
        columns, rows = [columns[n] for n in shown], [[row[n] for n in shown] for row in rows]
    widths = [max(map(cell_len, cells)) for cells in zip([one.title for one in columns], *rows, strict=True)]
    if width is not None:
        _fit(widths, columns, width)
    lines = [_line(columns, widths, [one.title for one in columns], is_title=True)]
    return lines + [_line(columns, widths, row, is_title=False) for row in rows]


def _fit(widths: list[int], columns: Sequence[Column], width: int) -> None:
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    while excess > 0:
        shrinking = [n for n, one in enumerate(columns) if one.shrink and widths[n] > _SHORTEST]
        if not shrinking:
            return
        widths[max(shrinking, key=lambda n: widths[n])] -= 1
        excess -= 1


def _line(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[str], *, is_title: bool) -> str:
    parts = []
    for column, width, cell in zip(columns, widths, cells, strict=True):
        text = _fitted(cell, width)
        padding = " " * (width - cell_len(text))
        if is_title:
            text = click.style(text, bold=True)
        elif (colour := column.style(cell)) is not None:
            text = click.style(text, fg=colour)
        parts.append(padding + text if column.align_right else text + padding)
    return _GAP.join(parts).rstrip()


def _fitted(cell: str, width: int) -> str:
    """Shorten a cell in its middle: the beginning and the end of a name tell most."""
    if cell_len(cell) <= width:
        return cell
    head = (width - 1) // 3
    tail = width - 1 - head
    return set_cell_size(cell, head) + "…" + cell[len(cell) - tail :]
