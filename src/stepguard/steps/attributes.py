"""Reads what an object holds without asking the object's own code, which may raise anything."""

from __future__ import annotations

from types import MemberDescriptorType
from typing import Any


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, also those in slots."""
    found = dict(_dictionary(value) or {})
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            # A private name stands in the class under another one.
            inside = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and name[-2:] != "__" else name
            member = kind.__dict__.get(inside)
            if isinstance(member, MemberDescriptorType):
                try:
                    found[name] = member.__get__(value)
                except AttributeError:
                    continue  # It was never set.
    return found


def has(value: Any, name: str) -> bool:
    """As ``hasattr``, and ``False`` for an object that raises another error than AttributeError."""
    try:
        return hasattr(value, name)
    except Exception:  # noqa: BLE001 - the program's own code
        return False


def has_dictionary(value: Any) -> bool:
    """Whether ``vars(value)`` are the attributes of the object."""
    return _dictionary(value) is not None


def _dictionary(value: Any) -> dict[str, Any] | None:
    try:
        held = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return None
    return held if isinstance(held, dict) else None
