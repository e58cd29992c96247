"""The checks of options and arguments, whose messages name the option, what was expected and what was found."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Sequence
from typing import Any

# Of one letter it is a drive of Windows. `pathlib` makes one slash of two.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

MIRROR_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "file")
"""The kinds of addresses that a mirror may have."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def check_mirror(place: object) -> None:
    """Raise unless ``place`` is a path, or an address of a known kind that names more than a scheme.

    Raises:
        TypeError: it is neither a text nor a path.
        ValueError: it is empty, of an unknown kind, or has credentials or a query in it.
    """
    if not isinstance(place, (str, os.PathLike)):
        raise wrong_type("mirror", "an address such as 's3://bucket/run', a directory or a stepguard.Mirror", place)
    text = os.fspath(place)
    found = _URL.match(text)
    rest = text if found is None else text[found.end() :]
    is_known = found.group(1).lower() in MIRROR_SCHEMES if found is not None else not _SCHEME.match(text)
    if not is_known or not rest.strip("/"):
        raise ValueError(
            f"mirror must be an address such as 's3://bucket/run', 'gs://bucket/run' or 'az://container/run', or a "
            f"directory, got {text!r}"
        )
    if found is not None and "@" in rest.partition("/")[0]:
        raise ValueError(
            "mirror must not have credentials in its address, which everyone who reads the logdir would see; give them "
            "in the environment"
        )
    if found is not None and found.group(1).lower() != "file" and (sign := re.search("[?#]", rest)):
        # Not repeated, since a signature may follow.
        raise ValueError(
            f"mirror must be an address without '{sign.group()}' and what comes after it, which no store would see, "
            f"got {found.group()}{rest[: sign.start()]}{sign.group()}...; give options in Mirror(store_options=...)"
        )


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether ``place`` is an address such as ``s3://bucket/run``, and no path."""
    return _URL.match(os.fspath(place)) is not None


def check_local(name: str, place: str | os.PathLike[str]) -> None:
    """Check that ``place`` is no address in a store, such as ``s3://bucket/run``: it would be a folder called ``s3:``.

    Raises:
        ValueError: it is.
    """
    text = os.fspath(place)
    if _SCHEME.match(text):
        todo = f"`stepguard pull {text} DIR` fetches what a mirror has"
        if name in ("logdir", "the directory of a store"):
            todo = f"give a directory here, and the address as the mirror of it: mirror={text!r}"
        raise ValueError(
            f"{name} must be a directory that this machine can reach by a path, got {text!r}, which is in another "
            f"store; {todo}; or mount the store and give its path"
        )


def check_switch(name: str, value: object, *, or_none: bool = False) -> None:
    """Raise unless ``value`` is a bool, 0 or 1. A merely true value, such as the text ``"no"``, is a mistake.

    Raises:
        TypeError: ``value`` is anything else; the message names the option, what was expected and what was found.
    """
    # Matched by name, so that NumPy's bool, which `ranks == 0` returns, counts without importing NumPy.
    is_switch = type(value).__name__ in ("bool", "bool_") or (isinstance(value, int) and value in (0, 1))
    if is_switch or (or_none and value is None):
        return
    raise wrong_type(name, "True, False or None" if or_none else "True or False", value)


def check_seconds(
    name: str,
    value: Any,
    *,
    unit: str = "seconds",
    least: float = 0,
    is_positive: bool = False,
    is_finite: bool = False,
    or_none: bool = False,
) -> None:
    """Raise unless ``value`` is a number of seconds, or of another ``unit``, that is at least ``least`` and not NaN.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is out of range.
    """
    if value is None and or_none:
        return
    bound = "" if least == -math.inf else " > 0" if is_positive else f" >= {least:g}"
    expected = f"a {'finite ' if is_finite else ''}number of {unit}{bound}{' or None' if or_none else ''}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(name, expected, value)
    number = float(value)
    in_range = number > 0 if is_positive else number >= least
    if not in_range or (is_finite and math.isinf(number)):
        raise ValueError(f"{name} must be {expected}, got {value}")


def check_count(
    name: str, value: Any, *, what: str = "", least: int = 0, most: int | None = None, or_none: bool = False
) -> None:
    """Raise unless ``value`` is a whole number from ``least`` to ``most``; ``what`` is counted.

    Raises:
        TypeError: ``value`` is not a whole number.
        ValueError: ``value`` is out of range.
    """
    if value is None and or_none:
        return
    bound = f" >= {least}" if most is None else f" from {least} to {most}"
    expected = f"{f'a number of {what}' if what else 'a whole number'}{bound}{' or None' if or_none else ''}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise wrong_type(name, expected, value)
    if int(value) < least or (most is not None and int(value) > most):
        raise ValueError(f"{name} must be {expected}, got {value}")


def wrong_type(name: str, expected: str, found: object) -> TypeError:
    """The TypeError for an argument: its name, what was expected and what was found."""
    return TypeError(f"{name} must be {expected}, got {type(found).__name__}: {found!r:.80}")


def check_text(name: str, value: object, expected: str) -> None:
    if not isinstance(value, str):
        raise wrong_type(name, expected, value)
    if not value:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_asked(value: Any) -> None:
    if isinstance(value, str):
        check_text("step", value, "a step, 'best', the name of a checkpoint, or None")
    elif value is not None:
        check_count("step", value)


def check_best(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, tuple) or len(value) != 3:
        raise wrong_type("keep_best", "a tuple such as ('val_loss', 'min', 3), or None", value)
    check_text("keep_best[0]", value[0], "the name of a metric such as 'val_loss'")
    check_choice("keep_best[1]", value[1], "min", "max")
    check_count("keep_best[2]", value[2], what="checkpoints", least=1)


def check_choice(name: str, value: object, *choices: object) -> None:
    if not any(value is one or (isinstance(value, str) and value == one) for one in choices):
        *first, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r:.80}")


def check_patterns(name: str, value: Any, *, or_none: bool = False) -> None:
    if value is None and or_none:
        return
    # A str is a sequence too, of characters: refuse it.
    is_sequence = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not is_sequence or not all(isinstance(one, str) and one for one in value):
        raise wrong_type(name, f"a sequence of names such as ('model',){' or None' if or_none else ''}", value)
