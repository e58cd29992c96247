"""The options that a start was given, as its line in the ledger tells them, and how those of two starts differ.

Whoever reads the logdir may read them. So a function is told by its name, an object of another kind by its class, the
options of a mirror's store by their names alone, and texts as `redaction` shows them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from datetime import datetime
from enum import Enum
from numbers import Integral, Real
from typing import Any, NamedTuple

from stepguard.options import Options
from stepguard.watching.redaction import without_secrets

_MOST_ITEMS = 100


class Change(NamedTuple):
    """An option that two starts were given differently, with both values as `shown` has them."""

    name: str
    before: str
    after: str


def told(options: Options) -> dict[str, Any]:
    """The options that are not the defaults, by names such as ``saving.max_to_keep``, as they may stand in JSON."""
    return {name: value for part in fields(options) for name, value in _given(part.name, getattr(options, part.name))}


def as_read(options: object) -> dict[str, Any] | None:
    """What `told` has returned, from a line of a ledger, which is not trusted: told once more, by the same rules."""
    return {name: _plain(value) for name, value in options.items()} if isinstance(options, Mapping) else None


def shown(options: Mapping[str, Any], name: str) -> str:
    """The value of an option as a program writes it, or that it is the default."""
    return repr(options[name]) if name in options else "the default"


def changes(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[Change]:
    """How the options of two starts differ, both as of `as_read`; empty if one of them tells no options."""
    if before is None or after is None:
        return []
    found = [Change(name, shown(before, name), shown(after, name)) for name in {**after, **before}]
    return [one for one in found if one.before != one.after]


def _given(group: str, options: Any) -> Iterator[tuple[str, Any]]:
    for one in () if options is None else fields(options):
        value = getattr(options, one.name)
        if value != one.default:
            # What a store is told may be a credential.
            yield f"{group}.{one.name}", _plain(list(value) if one.name == "store_options" else value)


def _plain(value: Any, *, depth: int = 1) -> Any:
    if isinstance(value, (str, os.PathLike)):
        return without_secrets([os.fsdecode(value)])[0]
    # By its name, so that NumPy's bool counts without importing NumPy.
    if value is None or type(value).__name__ in ("bool", "bool_"):
        return None if value is None else bool(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Collection):
        if depth == 0:
            return "..."
        some = list(value)[:_MOST_ITEMS]
        if isinstance(value, Mapping):
            return {str(key): _plain(value[key], depth=depth - 1) for key in some}
        return [_plain(one, depth=depth - 1) for one in some]
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
