"""``stepguard show``: what a checkpoint holds."""

from __future__ import annotations

from typing import Any

import click

from stepguard.cli.arguments import Target, target_argument
from stepguard.cli.logdir import tensor_readers
from stepguard.cli.logdir.contents import DAMAGED, INCOMPLETE, ListedCheckpoint
from stepguard.cli.logdir.remote_image import filled
from stepguard.cli.logdir.tensor_statistics import Statistics, describe
from stepguard.cli.text import output
from stepguard.cli.text.progress_bar import reading
from stepguard.cli.text.table import Column, print_table, warning
from stepguard.store.saved_tensor import SavedTensor
from stepguard.words import printable

# Of a list with more numbers than this, only the length is shown.
_SHORT = 8

_COLUMNS = (
    Column("NAME", shrink=True),
    Column("DTYPE"),
    Column("SHAPE"),
    Column("SIZE", align_right=True),
    Column("MIN", align_right=True),
    Column("MAX", align_right=True),
    Column("MEAN", align_right=True),
    Column("NAN", align_right=True, hide=True, style=warning),
    Column("INF", align_right=True, hide=True, style=warning),
)


@click.command(
    short_help="Show the tensors of a checkpoint.",
    epilog="""\b
Examples:
  stepguard show runs/digits/model.ckpt-1200
  stepguard show runs/digits                  (the one that a restart would take)
  stepguard show runs/digits --json | jq -r '.tensors[] | select(.nan > 0).name'
""",
)
@target_argument("target", "CHECKPOINT")
@click.option("--all", "with_values", is_flag=True, help="Also numbers and strings that are saved beside the tensors.")
@output.json_option
def command(target: Target, with_values: bool, as_json: bool) -> None:
    """Show the tensors of a checkpoint of TensorFlow, PyTorch or JAX, with statistics of their values.

    CHECKPOINT is a TensorFlow prefix, or a directory of PyTorch or JAX, such as runs/digits/model.ckpt-1200, or a
    logdir. MIN, MAX and MEAN leave NaN out; for complex numbers they are those of the magnitudes. Digests are not
    compared: use `stepguard verify` for that.
    """
    one = target.checkpoint()
    # A single file is not a checkpoint and has no state.
    state = one.state if target.file is None else None
    rows = []
    with filled(one.checkpoint.root, one.checkpoint.name), reading("reading", one.size) as on_block:
        for tensor in tensor_readers.read_tensors(one):
            if with_values or not tensor.is_plain:
                rows.append(_read(tensor))
            else:
                rows.append((tensor, None, None))
            on_block(tensor.nbytes or 0)
    if as_json:
        output.print_json(_document(one, state, rows, with_values=with_values))
    else:
        _print(one, state, rows, with_values=with_values)


_Row = tuple[SavedTensor, Any, Statistics | None]


def _document(one: ListedCheckpoint, state: str | None, rows: list[_Row], *, with_values: bool) -> dict[str, Any]:
    document = {
        "checkpoint": str(one.checkpoint.path),
        "step": one.checkpoint.step,
        "engine": one.engine,
        "state": state,
        "tensors": [_json(tensor, found) for tensor, _, found in rows if not tensor.is_plain],
    }
    if with_values:
        document["values"] = [
            {"name": tensor.name, "type": tensor.dtype, "value": _value(array)}
            for tensor, array, _ in rows
            if tensor.is_plain
        ]
    return document


def _json(tensor: SavedTensor, found: Statistics | None) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "min": None if found is None else found.minimum,
        "max": None if found is None else found.maximum,
        "mean": None if found is None else found.mean,
        "nan": None if found is None else found.nan,
        "inf": None if found is None else found.inf,
    }


def _print(one: ListedCheckpoint, state: str | None, rows: list[_Row], *, with_values: bool) -> None:
    checkpoint = one.checkpoint
    step = "no step" if checkpoint.step is None else f"step {checkpoint.step}"
    click.echo(f"{printable(str(checkpoint.path))}: {', '.join((step, one.engine, *([state] if state else [])))}")
    if state in (DAMAGED, INCOMPLETE):
        for reason in one.reasons:
            click.echo(printable(reason))
    tensors = [row for row in rows if not row[0].is_plain]
    values = [row for row in rows if row[0].is_plain]
    if tensors:
        print_table(_COLUMNS, [_cells(tensor, found) for tensor, _, found in tensors])
    if with_values and values:
        columns = (Column("NAME", shrink=True), Column("TYPE"), Column("VALUE", shrink=True))
        print_table(columns, [(printable(one.name), one.dtype, _shown(array)) for one, array, _ in values])
    total = output.size(sum(tensor.nbytes or 0 for tensor, _, _ in tensors))
    hint = "" if with_values or not values else " (--all shows them)"
    more = f", and {output.counted(len(values), 'value')} beside them{hint}" if values else ""
    click.echo(f"{output.counted(len(tensors), 'tensor')}, {total}{more}")


def _cells(tensor: SavedTensor, found: Statistics | None) -> tuple[str, ...]:
    numbers = ("-",) * 5
    if found is not None:
        numbers = (
            output.number(found.minimum),
            output.number(found.maximum),
            output.number(found.mean),
            str(found.nan),
            str(found.inf),
        )
    size = "-" if tensor.nbytes is None else output.size(tensor.nbytes)
    return (printable(tensor.name), tensor.dtype, output.shape(tensor.shape), size, *numbers)


def _read(tensor: SavedTensor) -> _Row:
    """Keep a plain value as it is, and only the statistics of a tensor."""
    array = None if tensor.read is None else tensor.read()
    if tensor.is_plain:
        return tensor, array, None
    return tensor, None, None if array is None else describe(array)


def _shown(array: Any) -> str:
    if array.size > _SHORT:
        return output.counted(array.size, "number")
    return printable(str(_value(array)))


def _value(array: Any) -> Any:
    value = array.tolist()
    return value if isinstance(value, (bool, int, float, str, list)) else str(value)
