"""The loggers of the package: what their lines quote is escaped, for it may come from a logdir that somebody prepared.

A name of a file, a path, or the text of an error may hold what a terminal obeys, or a line end with a line behind it
that looks like another record. Handlers and levels are the program's: none is set here.
"""

from __future__ import annotations

import logging
from pathlib import PurePath

from stepguard.errors import printable


def logger(name: str) -> logging.Logger:
    """The standard library's logger ``name``, such as ``__name__``, with a filter that escapes. Any thread."""
    found = logging.getLogger(name)
    # Of the logger and not of a handler, so that the handlers of the program get the escaped text.
    found.addFilter(_escape)
    return found


def _escape(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(map(_escaped, record.args))
    return True


def _escaped(value: object) -> object:
    """``value`` as it may be shown: on one line, so that nothing that it quotes looks like a record of its own."""
    if not isinstance(value, (str, PurePath, BaseException)):
        return value
    try:
        text = str(value)
    except Exception:  # noqa: BLE001 - __str__ is the program's code; the handler says that it raises
        return value
    return value if text.isprintable() else printable(text)
