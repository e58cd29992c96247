"""A state taken apart: its values by name, and as text what of it is part of the program."""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stepguard.orbax_files.index import Keys

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_MOST_TEXT = 300

PLAIN = (bool, int, float, complex, str)
"""The types of Python values that a checkpoint holds."""


class Leaf(NamedTuple):
    """One value of a state. ``keys`` is its place: names, and ``int`` for a place in a list or tuple.

    ``key_impl`` is the implementation of a typed PRNG key, of which ``value`` has the data.
    """

    keys: Keys
    name: str
    value: Any
    key_impl: str | None = None


@dataclass(frozen=True, slots=True)
class Flat:
    """A state taken apart. ``static`` has the parts that are compared, as text; ``empty`` the kinds of empty nodes."""

    leaves: list[Leaf]
    static: Mapping[str, str]
    empty: Mapping[Keys, str]


def described(part: Any) -> str:
    """A static part as text that is the same in each process: without addresses, and sets in order."""
    text = _text(part)
    if len(text) <= _MOST_TEXT:
        return text
    return f"{text[:_MOST_TEXT]}... ({hashlib.blake2b(text.encode(), digest_size=8).hexdigest()})"


def check_saveable(name: str, value: Any) -> None:
    """Raise TypeError, with the name, for an array of something else than numbers, or an integer that is too long."""
    if isinstance(value, (np.ndarray, np.generic)):
        # The types of ml_dtypes, such as bfloat16, have the kind "V", as structured arrays have.
        if value.dtype.kind in "OSUMm" or value.dtype.names is not None:
            raise TypeError(f"{name}: expected numbers, found a NumPy array of {value.dtype}, which cannot be saved")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise TypeError(f"{name}: expected an integer of at most 64 bits, found {value!r:.80}")


def described_leaf(name: str, value: Any) -> str:
    """The text of a leaf that is no data. Functions and the like are part of the program; other objects hold state."""
    if callable(value) or isinstance(value, (enum.Enum, np.dtype)):
        return described(value)
    raise TypeError(
        f"{name}: expected an array, a number, a string or a function, found a {type(value).__name__}, which cannot be "
        f"saved: take it out of the state, or put what it holds into arrays"
    )


def _text(part: Any) -> str:
    if isinstance(part, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_text, part)))}}}"
    if type(part) in (list, tuple):
        return f"({', '.join(map(_text, part))})"
    if isinstance(part, Mapping):
        return f"{{{', '.join(f'{key}: {_text(one)}' for key, one in part.items())}}}"
    if isinstance(part, type) or hasattr(part, "__qualname__"):
        return f"{part.__module__}.{part.__qualname__}"
    return _ADDRESS.sub("", repr(part))
