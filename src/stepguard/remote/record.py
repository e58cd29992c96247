"""The file ``mirror.json`` in a logdir: what the mirror has, for those who look at the logdir and ask no store."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from stepguard.disk import files, schema

FILE_NAME = "mirror.json"
_MOST_BYTES = 16 << 20

_KINDS: schema.Kinds = {
    "url": (str,),
    "time": (float,),
    "waiting": (str, NoneType),
    "error": (str, NoneType),
    "checkpoints": (list,),
}
_KINDS_OF_ONE: schema.Kinds = {
    "name": (str,),
    "step": (int, NoneType),
    "time": (float,),
    "bytes": (int,),
    "engine": (str,),
}


@dataclass(frozen=True, slots=True)
class MirroredCheckpoint:
    """One checkpoint in the mirror: its name and step, the Unix time of its commit, its bytes and its engine."""

    name: str
    step: int | None
    time: float
    bytes: int
    engine: str


@dataclass(frozen=True, slots=True)
class MirrorRecord:
    """What was known of the mirror at ``time`` (Unix), the newest checkpoint first.

    ``waiting`` is the checkpoint that is being sent, or waits for it; ``error`` is why the last try failed.
    """

    url: str
    time: float
    checkpoints: tuple[MirroredCheckpoint, ...] = ()
    waiting: str | None = None
    error: str | None = None

    def document(self) -> dict[str, Any]:
        """The record as plain JSON."""
        return {
            "url": self.url,
            "time": round(self.time, 3),
            "waiting": self.waiting,
            "error": self.error,
            "checkpoints": [
                {"name": one.name, "step": one.step, "time": one.time, "bytes": one.bytes, "engine": one.engine}
                for one in self.checkpoints
            ],
        }


def write(
    logdir: Path, url: str, checkpoints: Sequence[MirroredCheckpoint], *, waiting: str | None, error: str | None
) -> None:
    """Replace the record in a logdir. Raises OSError."""
    found = MirrorRecord(url, time.time(), tuple(checkpoints), waiting, error)
    files.write_volatile(logdir / FILE_NAME, json.dumps(found.document()).encode())


def read(logdir: Path) -> MirrorRecord | None:
    """Read the record in a logdir; None if there is none, or if it cannot be read. What in it is wrong is left out."""
    try:
        found = schema.checked(schema.parse(files.read_own(logdir / FILE_NAME, most=_MOST_BYTES)), _KINDS)
        fields = {"waiting": None, "error": None, "checkpoints": [], **found}
        rows = [schema.checked(one, _KINDS_OF_ONE, required=tuple(_KINDS_OF_ONE)) for one in fields["checkpoints"]]
        return MirrorRecord(
            fields["url"],
            fields["time"],
            tuple(MirroredCheckpoint(**one) for one in rows if schema.is_name(one["name"])),
            fields["waiting"],
            fields["error"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
