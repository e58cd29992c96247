"""How commands print: arbitrary text, sizes and ages for people, and JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stepguard.words import duration, printable

if TYPE_CHECKING:
    from stepguard.remote.record import MirrorRecord
    from stepguard.watching.history import History

_Function = TypeVar("_Function", bound=Callable[..., Any])


def json_option(function: _Function) -> _Function:
    """The option ``--json``, as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")(function)


def print_json(document: Mapping[str, Any]) -> None:
    """Print one document. Floats that JSON has no number for are the strings "nan", "inf" and "-inf"."""
    click.echo(json.dumps(_plain(document), indent=2, allow_nan=False))


def print_json_line(document: Mapping[str, Any]) -> None:
    """Print one document on a line of its own, for a command that prints many."""
    click.echo(json.dumps(_plain(document), allow_nan=False))


def size(count: int) -> str:
    """Bytes in binary units with three digits: ``"512 B"``, ``"1.46 MiB"``."""
    if count < 1024:
        return f"{count} B"
    power = min(4, (count.bit_length() - 1) // 10)
    value, unit = count / 1024**power, ("KiB", "MiB", "GiB", "TiB")[power - 1]
    return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f} {unit}"


def number(value: float | None) -> str:
    """A number in a column: an integer in full, a float with three digits, "-" for None."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def shape(sizes: tuple[int, ...]) -> str:
    """The shape of a tensor, such as "784x10"; "scalar" if it has no dimensions."""
    return "x".join(map(str, sizes)) if sizes else "scalar"


def counted(count: int, noun: str) -> str:
    """A number and a noun: ``"1 file"``, ``"2 files"``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def accounted(found: History) -> str:
    """The time of a run as text: productive, replayed, down."""
    return (
        f"productive {duration(found.productive_secs)}, replayed {duration(found.replayed_secs)}, "
        f"down {duration(found.down_secs)}"
    )


def missing_newest(name: str) -> str:
    """The line about a newest checkpoint that no longer exists."""
    return f"the file 'checkpoint' names {printable(name)} as the newest, and there is no file of it"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def mirror(found: MirrorRecord) -> str:
    """One line on the mirror of a run, as the logdir knows it."""
    newest = f"has {found.checkpoints[0].name}" if found.checkpoints else "has no checkpoint yet"
    waiting = "" if found.waiting is None else f"; {found.waiting} is not there yet"
    error = "" if found.error is None else f" ({found.error})"
    return printable(f"mirror {found.url}: {newest}{waiting}{error}")
