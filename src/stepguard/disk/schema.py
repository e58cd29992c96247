"""What may stand in the JSON that is read from a logdir: checked once, where it comes in, so that nobody asks again.

Manifests, lines of the ledger, heartbeats and the note in the lock go through `parse` and then `checked`, which refuses
the whole, or `passed`, which leaves out what is wrong. A record says what its fields hold by the hints of its dataclass
(`kinds_of`) or by a table. What comes out has numbers that every operation can be done with: integers fit into 64 bits,
floats are finite and are no date in another age of the world, and texts have a bound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

MOST_DIGITS = 18
"""Of a step in a file name: more do not fit into 64 bits."""

_LARGEST_INT = 2**63 - 1
_LARGEST_FLOAT = 1e15
_LONGEST_TEXT = 1 << 16
_DEEPEST = 64
_TOO_DEEP = "expected JSON, found it nested too deeply"

Kinds = Mapping[str, tuple[type, ...]]
"""What the field of a name may hold; ``NoneType`` is one of the types where null may stand."""

_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}


_known: dict[type, Kinds] = {}


class SchemaError(ValueError):
    """What was read is not of the form that is written there."""


WRONG = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError)
"""What Python raises where a value that was read is not of the form that its user expects."""


def parse(content: bytes) -> Any:
    """The value of a JSON document. Raises ValueError: there is none, or one that is nested too deeply."""
    try:
        value = _DECODER.decode(content.decode("utf-8"))
    except RecursionError as error:
        raise SchemaError(_TOO_DEEP) from error
    # Whoever takes such a value apart, or prints it, may call itself for each level.
    if content.count(b"{") + content.count(b"[") > _DEEPEST and _is_deeper(value, _DEEPEST):
        raise SchemaError(_TOO_DEEP)
    return value


def _is_deeper(value: object, most: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return most == 0 or any(_is_deeper(one, most - 1) for one in inner)


def checked(document: object, kinds: Kinds, *, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of ``document`` that ``kinds`` knows; others are of a later version, and are passed over.

    Raises SchemaError, with the field and what was found: one is of another kind, or one that is required is missing.
    """
    if not isinstance(document, Mapping):
        raise SchemaError(f"expected an object, found {_name_of(document)}")
    for name in required:
        if name not in document:
            raise SchemaError(f"expected the field {name!r}, found none")
    for name, value in document.items():
        if name in kinds and not is_of(value, kinds[name]):
            raise SchemaError(f"{name}: expected {_expected(kinds[name])}, found {_name_of(value)}")
    return {name: value for name, value in document.items() if name in kinds}


def passed(document: Mapping[str, Any], kinds: Kinds) -> dict[str, Any]:
    """``document`` without those fields that ``kinds`` knows and that are of another kind."""
    return {name: value for name, value in document.items() if name not in kinds or is_of(value, kinds[name])}


def is_of(value: object, kinds: tuple[type, ...]) -> bool:
    """Whether ``value`` is of one of the kinds, and within the bounds."""
    if value is None or isinstance(value, bool):
        return type(value) in kinds
    if isinstance(value, int):
        return (int in kinds or float in kinds) and abs(value) <= (_LARGEST_INT if int in kinds else _LARGEST_FLOAT)
    if isinstance(value, float):
        # False for NaN.
        return float in kinds and abs(value) <= _LARGEST_FLOAT
    if isinstance(value, str):
        return str in kinds and len(value) <= _LONGEST_TEXT
    return isinstance(value, (list, tuple, dict)) and type(value) in kinds


@dataclass(frozen=True, slots=True)
class Fields:
    """The form of an object: fields that it must have, and others that it may have. More are passed over."""

    required: Mapping[str, Form]
    optional: Mapping[str, Form] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Each:
    """The form of a list, perhaps of one ``length``, or with ``keys`` of an object, whose members are of one form."""

    member: Form
    keys: Form | None = None
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Count:
    """The form of a whole number, with its bounds."""

    least: int = 0
    most: int = _LARGEST_INT


Form = tuple[type, ...] | Fields | Each | Count
"""What a value may be: one of some types, as in `Kinds`, or of a form with forms inside. ``object`` stands for all."""


def check(value: object, form: Form, place: str = "") -> None:
    """Raise SchemaError, with the place in the document, unless ``value`` and all that is in it are of this form."""
    at = f"{place.removeprefix('.')}: " if place else ""
    if isinstance(form, Count):
        if not is_of(value, (int,)) or not form.least <= value <= form.most:  # type: ignore[operator]
            raise SchemaError(f"{at}expected a whole number from {form.least} to {form.most}, found {_name_of(value)}")
    elif isinstance(form, tuple):
        if object not in form and not is_of(value, form):
            raise SchemaError(f"{at}expected {_expected(form)}, found {_name_of(value)}")
    elif isinstance(form, Each) and form.keys is None:
        if not isinstance(value, (list, tuple)) or form.length not in (None, len(value)):
            many = "" if form.length is None else f" of {form.length}"
            raise SchemaError(f"{at}expected a list{many}, found {_name_of(value)}")
        for number, one in enumerate(value):
            check(one, form.member, f"{place}[{number}]")
    elif not isinstance(value, Mapping):
        raise SchemaError(f"{at}expected an object, found {_name_of(value)}")
    elif isinstance(form, Each):
        for key, one in value.items():
            check(key, form.keys or (), f"{place} (a key)")
            check(one, form.member, f"{place}.{key}")
    else:
        for name in form.required:
            if name not in value:
                raise SchemaError(f"{at}expected the field {name!r}, found none")
        for name, inside in {**form.required, **form.optional}.items():
            if name in value:
                check(value[name], inside, f"{place}.{name}")


def is_like(value: object, form: Form) -> bool:
    """Whether ``value`` and all that is in it are of this form."""
    try:
        check(value, form)
    except SchemaError:
        return False
    return True


def is_name(text: str) -> bool:
    """Whether ``text`` can be the name of a file, or of one in directories: no system call refuses it."""
    try:
        parts = [part.encode("utf-8", "surrogateescape") for part in text.split("/")]
    except UnicodeEncodeError:
        return False
    return all(0 < len(part) <= 255 and b"\0" not in part and part not in (b".", b"..") for part in parts)


def kinds_of(record: type) -> Kinds:
    """What the hints of a dataclass say of its fields."""
    kinds = _known.get(record)
    if kinds is None:
        hints = get_type_hints(record)
        kinds = _known[record] = {one.name: _types(hints[one.name]) for one in fields(record)}
    return kinds


def _types(hint: Any) -> tuple[type, ...]:
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(get_origin(one) or one for one in kinds)


def _refuse(constant: str) -> None:
    raise SchemaError(f"expected JSON, found {constant}")


# One for all: a ledger has thousands of lines.
_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _expected(kinds: tuple[type, ...]) -> str:
    return " or ".join(dict.fromkeys("null" if one is NoneType else _NAMES[one] for one in kinds))


def _name_of(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "a number out of range" if not is_of(value, (int, float)) else f"the number {value}"
    return _NAMES.get(type(value), type(value).__name__)
