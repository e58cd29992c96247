"""The ledger of a logdir: ``run.jsonl``, one line for each event of the run. Lines are never changed.

Every line is a JSON object with ``event``, ``time`` (Unix seconds), ``pid``, ``host`` and ``role`` (``chief``,
``worker-1``, ``launcher``), and the fields of its event, which docs/files.md lists. Events are only ever added to that
list, and fields to an event: who reads a ledger passes over those that it does not know.

A start and `stepguard status` read the end of it, a megabyte at most. So the chief puts a longer one aside, as
``run.1.jsonl`` and so on, and begins the next with the lines that the present start needs and an event ``rotated``.
What came before adds up in the lines of starts (``so_far``). A kill in between leaves the ledger that was put aside,
whose end is read then.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from stepguard.disk import files, schema
from stepguard.watching import history
from stepguard.watching.redaction import without_secrets
from stepguard.words import logger

_log = logger(__name__)

FILE_NAME = "run.jsonl"

# The most lines kept in memory while the disk is full; the oldest are dropped first.
_MOST_WAITING = 1000

_MOST_BYTES = 1 << 20
# A ledger that is rotated in time is no longer than this; one that nobody has rotated may be.
_MOST_BYTES_OF_WHOLE = 64 << 20
# Of lines that a new ledger begins with.
_MOST_CARRIED = 1000

_KINDS: schema.Kinds = {
    **dict.fromkeys(("event", "host", "role"), (str,)),
    **dict.fromkeys(
        (
            *("engine", "version", "name", "checkpoint", "reason", "error", "failure", "message", "stacks", "signal"),
            *("python", "framework_version"),
            *("outcome", "cause"),
        ),
        (str, NoneType),
    ),
    **dict.fromkeys(
        ("pid", "child_pid", "process_start", "attempt", "restarts", "bytes", "number", "code"), (int, NoneType)
    ),
    **dict.fromkeys(
        ("step", "to_step", "previous_step", "lost_steps", "compared", "differs_at"),
        (int, NoneType),
    ),
    **dict.fromkeys(("secs", "stall_secs", "delay_secs", "checkpoint_time", "previous_time"), (float, NoneType)),
    **dict.fromkeys(("ended", "progressed"), (bool, NoneType)),
    "time": (float,),
    "argv": (list,),
    "damaged": (list,),
    "options": (dict,),
    "so_far": (dict,),
    "archive": (str,),
}

_ARCHIVE = re.compile(r"run\.([0-9]{1,9})\.jsonl")


class Ledger:
    """Appends to the ledger of one logdir. Any thread; other processes may append at the same time.

    A run never fails because of its ledger. Lines that cannot be written stay in memory and are written with the next
    event. The first failure of a series is logged.
    """

    def __init__(self, logdir: str | os.PathLike[str], *, role: str) -> None:
        self.path = Path(logdir) / FILE_NAME
        self._role = role
        self._host = socket.gethostname()
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._is_failing = False

    def append(self, event: str, *, durable: bool = True, **fields: Any) -> None:
        """Add one line, unless the disk fails. A line survives a kill, and with ``durable`` also a power loss."""
        line = {
            "event": event,
            "time": round(time.time(), 3),
            "pid": os.getpid(),
            "host": self._host,
            "role": self._role,
            **fields,
        }
        if isinstance(line.get("argv"), list):
            line["argv"] = without_secrets(line["argv"])
        failure = None
        with self._lock:
            self._waiting = [*self._waiting, encode(line)][-_MOST_WAITING:]
            try:
                size = files.append_lines(self.path, b"".join(self._waiting), durable=durable)
                self._waiting = []
                # Of several processes only one may.
                if size > _MOST_BYTES and self._role == history.CHIEF:
                    self._rotate()
                self._is_failing = False
            except OSError as error:
                if not self._is_failing:
                    failure = error
                self._is_failing = True
        if failure is not None:
            _log.warning("%s: the ledger could not be written (%s); its lines wait for the next", self.path, failure)

    def _rotate(self) -> None:
        events = read(self.path.parent)
        archive = self.path.with_name(f"run.{_newest_archive(self.path.parent) + 1}.jsonl")
        head = {"event": "rotated", "time": round(time.time(), 3), "pid": os.getpid(), "host": self._host}
        told = {"role": self._role, "archive": archive.name, "error": history.last_error(events)}
        lines = [*history.needed(events)[-_MOST_CARRIED:], {**head, **told}]
        files.move(self.path, archive)
        files.append_lines(self.path, b"".join(map(encode, lines)), durable=True)
        files.fsync_dir(self.path.parent)


def encode(line: Mapping[str, Any]) -> bytes:
    """Encode one line of the ledger. Numbers that are not finite become strings, since JSON cannot express them."""
    return json.dumps(_plain(line), allow_nan=False, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"


def _warn(path: Path, error: OSError) -> None:
    _log.warning("%s cannot be read, and is passed over: %s", path, error.strerror or error)


def read(
    logdir: str | os.PathLike[str], on_unreadable: Callable[[Path, OSError], None] = _warn
) -> list[dict[str, Any]]:
    """The newest events of a logdir, a megabyte of them, in the order in which they were written.

    A line that a kill has cut short, or that is damaged, is passed over, and so is a field of another kind than it has.
    One that cannot be read, or is no file, is none: ``on_unreadable`` is told.
    """
    root = Path(logdir)
    found = _events(_lines(root / FILE_NAME, on_unreadable))
    if not any(one["event"] == "rotated" for one in found) and (number := _newest_archive(root)):
        # Killed between the two: what the new one should begin with is the end of the old.
        return [*_events(_lines(root / f"run.{number}.jsonl", on_unreadable)), *found]
    return found


def read_whole(
    logdir: str | os.PathLike[str], on_unreadable: Callable[[Path, OSError], None] = _warn
) -> Iterator[dict[str, Any]]:
    """All events of a logdir, in the order in which they were written, with those of the ledgers that were put aside.

    One ledger is in memory at a time. Events are checked as `read` does it.
    """
    root = Path(logdir)
    names = [f"run.{number}.jsonl" for number in _archives(root)]
    for name in (*names, FILE_NAME):
        events = _events(_lines(root / name, on_unreadable, most_bytes=_MOST_BYTES_OF_WHOLE))
        # A ledger begins with copies of lines of the one before it, as far as that is still there.
        carried = [number for number, one in enumerate(events) if one["event"] == "rotated"]
        yield from events[carried[-1] + 1 if carried and events[carried[-1]].get("archive") in names else 0 :]


def _archives(root: Path) -> list[int]:
    try:
        names = os.listdir(root)
    except OSError:
        return []
    return sorted(int(match.group(1)) for one in names if (match := _ARCHIVE.fullmatch(one)))


def _newest_archive(root: Path) -> int:
    return max(_archives(root), default=0)


def _lines(path: Path, on_unreadable: Callable[[Path, OSError], None], *, most_bytes: int = _MOST_BYTES) -> list[bytes]:
    try:
        content, is_whole = files.read_end(path, most_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        on_unreadable(path, error)
        return []
    lines = content.split(b"\n")
    return lines if is_whole else lines[1:]


def _events(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        try:
            event = schema.parse(line)
        except ValueError:
            continue
        if not isinstance(event, dict):
            continue
        event = schema.passed(event, _KINDS)
        if event.get("event") and event.get("time") is not None:
            found.append(event)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value
