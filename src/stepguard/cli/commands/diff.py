"""``stepguard diff``: what differs between two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click

from stepguard.cli.arguments import Target, target_argument
from stepguard.cli.exits import FINDING
from stepguard.cli.logdir import tensor_readers
from stepguard.cli.logdir.contents import ListedCheckpoint
from stepguard.cli.logdir.tensor_statistics import Difference, compare
from stepguard.cli.text import output
from stepguard.cli.text.progress_bar import reading
from stepguard.cli.text.table import Column, print_table
from stepguard.store.saved_tensor import SavedTensor
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


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. ``kind`` is "only in A", "only in B", "shape", "dtype", "values" or "not comparable"."""

    name: str
    kind: str
    a: str | None = None
    b: str | None = None
    difference: Difference | None = None


@click.command(
    short_help="Compare two checkpoints.",
    epilog="""\b
Examples:
  stepguard diff runs/digits/model.ckpt-1200 runs/digits/model.ckpt-1300
  stepguard diff runs/a runs/b                (those that a restart would take)
  stepguard diff runs/a runs/b --json | jq '.changes[] | select(.kind == "shape")'
""",
)
@target_argument("a", "A")
@target_argument("b", "B")
@output.json_option
@click.pass_context
def command(ctx: click.Context, a: Target, b: Target, as_json: bool) -> None:
    """Say what differs between the checkpoints A and B: tensors, and the numbers and strings saved beside them.

    CHANGED is how many values differ, MAX ABS the largest difference, and MAX REL the largest one divided by the larger
    of the two magnitudes. A NaN equals a NaN in the same place.

    Exit code 0: equal. 1: different.
    """
    one, other = a.checkpoint(), b.checkpoint()
    changes, equal = _compared(one, other)
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


def _compared(one: ListedCheckpoint, other: ListedCheckpoint) -> tuple[list[Change], int]:
    """The differences, and how many are equal."""
    left = {tensor.name: tensor for tensor in tensor_readers.read_tensors(one)}
    right = {tensor.name: tensor for tensor in tensor_readers.read_tensors(other)}
    changes = []
    equal = 0
    with reading("comparing", one.size) as on_block:
        for name, tensor in left.items():
            change = Change(name, "only in A", _form(tensor)) if name not in right else _change(tensor, right[name])
            if change is None:
                equal += 1
            else:
                changes.append(change)
            on_block(tensor.nbytes or 0)
    changes += [Change(name, "only in B", None, _form(tensor)) for name, tensor in right.items() if name not in left]
    return changes, equal


def _change(one: SavedTensor, other: SavedTensor) -> Change | None:
    name = one.name
    if one.shape != other.shape:
        return Change(name, "shape", output.shape(one.shape), output.shape(other.shape))
    if one.dtype != other.dtype:
        return Change(name, "dtype", one.dtype, other.dtype)
    if one.read is None or other.read is None:
        return Change(name, "not comparable", one.dtype, other.dtype)
    left, right = one.read(), other.read()
    difference = compare(left, right)
    if not difference.changed:
        return None
    if one.shape:
        return Change(name, "values", difference=difference)
    return Change(name, "values", _value(left), _value(right), difference)


def _value(array: Any) -> str:
    value = array.item()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _form(tensor: SavedTensor) -> str:
    return f"{tensor.dtype} {output.shape(tensor.shape)}" if tensor.shape else tensor.dtype


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
