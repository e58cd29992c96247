"""The switches and places among the options of a Supervisor, checked at its construction."""

from __future__ import annotations

import os
import re

# Of one letter it is a drive of Windows. `pathlib` makes one slash of two.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def check_local(name: str, place: str | os.PathLike[str]) -> None:
    """Raise ValueError for ``s3://bucket/run`` and the like: without this it would be a folder here, called ``s3:``."""
    if _SCHEME.match(os.fspath(place)):
        raise ValueError(
            f"{name} must be a directory that this machine can reach by a path, got {os.fspath(place)!r}, which is in "
            f"another store; mount it and give its path, or keep the checkpoints here and copy them"
        )


def check_switch(name: str, value: object, *, or_none: bool = False) -> None:
    """Whether it is one: what is merely true, such as the text ``"no"``, is a mistake.

    Raises:
        TypeError: it is none; the message names the option, what was expected and what was found.
    """
    # A bool of NumPy is named like that too, and is what `ranks == 0` gives.
    is_switch = type(value).__name__ in ("bool", "bool_") or (isinstance(value, int) and value in (0, 1))
    if is_switch or (or_none and value is None):
        return
    expected = "True, False or None" if or_none else "True or False"
    raise TypeError(f"{name} must be {expected}, got {type(value).__name__}: {value!r:.80}")
