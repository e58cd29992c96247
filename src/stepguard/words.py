"""Text for people: lists and durations, the same everywhere, and what is quoted, in messages and in the log.

The name of a file, a path, or the text of an error may hold what a terminal obeys, or a line end with a line behind it
that looks like another record, for a logdir may come from anybody. What quotes such a text escapes it by `printable`,
and each module logs by a `logger`, which does so for the values of a line. Handlers and levels are the program's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import PurePath


def listed(items: Iterable[str], *, most: int = 5, separator: str = ", ") -> str:
    """Join ``items``; if there are more than ``most``, join the first ``most`` and say how many more there are."""
    shown = list(items)
    more = f"{separator}and {len(shown) - most} more" if len(shown) > most else ""
    return separator.join(shown[:most]) + more


def duration(secs: float) -> str:
    """``secs`` as ``42 s``, ``3 min``, ``2 h 05 min`` or ``3 d 4 h``; a negative duration counts as 0."""
    secs = max(0.0, secs)
    if secs < 100:
        return f"{int(secs)} s"
    minutes = round(secs / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def printable(text: str) -> str:
    """``text`` on one line, as it may be shown on a terminal: control characters, those that turn the direction of
    writing, and bytes that are no UTF-8 become escapes. Whatever was read from a file, or names one, goes through it.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def logger(name: str) -> logging.Logger:
    """The standard library's logger ``name``, such as ``__name__``, with a filter that escapes. Any thread."""
    found = logging.getLogger(name)
    # Of the logger and not of a handler, so that the handlers of the program get the escaped text.
    found.addFilter(_escape)
    return found


def _escape(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(map(_shown, record.args))
    return True


def _shown(value: object) -> object:
    """``value`` as it may be shown: on one line, so that nothing that it quotes looks like a record of its own."""
    if not isinstance(value, (str, PurePath, BaseException)):
        return value
    try:
        text = str(value)
    except Exception:  # noqa: BLE001 - __str__ is the program's code; the handler says that it raises
        return value
    return value if text.isprintable() else printable(text)
