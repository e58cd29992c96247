"""The ledger of a logdir: ``run.jsonl``, one line for each event of the run. Lines are never changed.

Every line is a JSON object with ``event``, ``time`` (Unix seconds), ``pid``, ``host`` and ``role`` (``chief``,
``worker-1``, ``launcher``), and the fields of its event, which docs/files.md lists. Later versions only add events and
fields, so a reader must ignore those that it does not know.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stepguard import files

_log = logging.getLogger(__name__)

FILE_NAME = "run.jsonl"

# The most lines kept in memory while the disk is full; the oldest are dropped first.
_MOST_WAITING = 1000


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
        failure = None
        with self._lock:
            self._waiting = [*self._waiting, encode(line)][-_MOST_WAITING:]
            try:
                files.append_lines(self.path, b"".join(self._waiting), durable=durable)
                self._waiting = []
                self._is_failing = False
            except OSError as error:
                if not self._is_failing:
                    failure = error
                self._is_failing = True
        if failure is not None:
            _log.warning("%s: the ledger could not be written (%s); its lines wait for the next", self.path, failure)


def encode(line: Mapping[str, Any]) -> bytes:
    """Encode one line of the ledger. Numbers that are not finite become strings, since JSON cannot express them."""
    return json.dumps(_plain(line), allow_nan=False, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"


def read(logdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of a logdir in the order in which they were written; empty if there is no ledger.

    A line that is damaged, or was cut short by a kill, is skipped.

    Raises:
        OSError: the file exists and cannot be read.
    """
    try:
        content = files.read_bytes(Path(logdir) / FILE_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return list(_events(content.split(b"\n")))


def _events(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str) and _is_number(event.get("time")):
            yield event


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value
