"""Documents with a wrong value in one place, and checkpoints whose manifests say that they are good all the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stepguard.disk import files
from stepguard.store import Manifest
from stepguard.store.manifest import SUFFIX

MISSING = object()
EVIL = "\x1b]0;owned\x07\x1b[2J"
WRONG = (MISSING, None, True, -1, 2**62, 10**400, 1.5, float("nan"), EVIL, "x" * 70_000, [], {}, [[]], {"a": {"b": 1}})


def nested(depth: int = 100) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def places(document: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a document, and the document itself; of a list, which is of one form, the first and the last."""
    yield place
    if isinstance(document, Mapping):
        for key, value in document.items():
            yield from places(value, (*place, key))
    elif isinstance(document, (list, tuple)):
        for number in sorted({0, len(document) - 1}) if document else ():
            yield from places(document[number], (*place, number))


def replaced(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document with another value in one place, or without that place."""
    if not place:
        return value
    here, *rest = place
    if isinstance(document, Mapping):
        items = {key: one for key, one in document.items() if key != here or rest or value is not MISSING}
        return {key: replaced(one, tuple(rest), value) if key == here else one for key, one in items.items()}
    parts = [one for number, one in enumerate(document) if number != here or rest or value is not MISSING]
    if here < len(parts) and (rest or value is not MISSING):
        parts[here] = replaced(parts[here], tuple(rest), value)
    return type(document)(parts)


def variants(document: Any) -> Iterator[tuple[str, Any]]:
    """Copies of a document with a wrong value in one place, each with what is wrong."""
    for place in places(document):
        for value in (*WRONG, nested()):
            if place or value is not MISSING:
                shown = "missing" if value is MISSING else f"{value!r:.40}" if value != 10**400 else "10**400"
                yield f"{'.'.join(map(str, place)) or 'the whole'}: {shown}", replaced(document, place, value)


def sign(logdir: Path, name: str) -> None:
    """Have the manifest of a checkpoint name its files as they are now."""
    path = logdir / f"{name}{SUFFIX}"
    manifest = Manifest.from_json(path.read_bytes(), path)
    records = []
    for one in manifest.files:
        size, digest = files.digest(logdir / one.name)
        records.append(dataclasses.replace(one, size=size, digest=digest))
    path.write_bytes(dataclasses.replace(manifest, files=tuple(records)).to_json())
