"""Requests to a run from outside: "save now", "stop". Files in ``requests/`` of its logdir.

The protocol: who asks writes ``requests/ID.json``, in one rename, and polls for ``requests/ID.answer.json``. The
observer's thread of the chief looks into the directory once a second. It takes each request that is addressed to its
process (pid, start of the process, host), removes the file, and hands the request to a thread of its own, because a
save may wait for a step. That thread writes the answer. Nobody in the run waits for who asks; who asks waits for a
limited time, and removes what is left. A request that names another process is one that a run before was killed with:
it is removed, and does nothing.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from stepguard.disk import files, schema
from stepguard.errors import described
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.part import Part
from stepguard.words import logger

_log = logger(__name__)

DIR_NAME = "requests"
SAVE, STOP = "save", "stop"

_REQUEST = re.compile(r"([0-9a-f]{16})\.json")
_MOST_BYTES = 4096
_LOOK_SECS = 0.1


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for: ``verb`` is "save" (under ``name``, if any) or "stop" (after ``step``, if any).

    The other fields say which process is asked.
    """

    verb: str
    name: str | None
    step: int | None
    pid: int
    process_start: int | None
    host: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer: whether it was, or will be, done, and one sentence that says what."""

    is_done: bool
    text: str


class Reception(Part):
    """Takes the requests to the process that ``now`` tells of. ``answer`` does what they ask for; any thread."""

    def __init__(self, logdir: Path, now: Heartbeat, answer: Callable[[Request], Answer]) -> None:
        self._place = logdir / DIR_NAME
        self._now = now
        self._answer = answer
        self._has_failed = False

    def look(self) -> None:
        """Take what has come. A directory that cannot be read costs one warning."""
        try:
            names = os.listdir(self._place)
            for name in sorted(names):
                if _REQUEST.fullmatch(name):
                    self._take(self._place / name)
        except FileNotFoundError:
            return
        except OSError as error:
            if not self._has_failed:
                _log.warning("%s: requests cannot be read: %s", self._place, error)
            self._has_failed = True

    def _take(self, path: Path) -> None:
        files.check_own_dir(self._place)
        request = _read(path)
        files.remove(path)
        mine = (self._now.pid, self._now.process_start, self._now.host)
        if request is None or (request.pid, request.process_start, request.host) != mine:
            _log.warning("%s: not a request to this process: removed", path)
            return
        _log.info("asked from outside: %s", request.verb)
        threading.Thread(target=self._serve, args=(path, request), name="stepguard-request", daemon=True).start()

    def _serve(self, path: Path, request: Request) -> None:
        try:
            answer = self._answer(request)
        except Exception as error:  # noqa: BLE001 - a thread's edge: who asks is told
            answer = Answer(False, described(error))
        try:
            files.write_volatile(path.with_suffix(".answer.json"), json.dumps(asdict(answer)).encode())
        except OSError as error:
            _log.warning("%s: could not be answered: %s", path, error)


def ask(
    logdir: Path, to: Heartbeat, verb: str, *, name: str | None = None, step: int | None = None, within_secs: float
) -> Answer | None:
    """Ask the process that ``to`` tells of, and wait for its answer; ``None`` if none came ``within_secs``.

    Raises:
        OSError: the logdir cannot be written.
    """
    place = logdir / DIR_NAME
    files.make_own_dir(place)
    path = place / f"{secrets.token_hex(8)}.json"
    told = path.with_suffix(".answer.json")
    request = Request(verb, name, step, to.pid, to.process_start, to.host)
    deadline = time.monotonic() + within_secs
    try:
        files.write_volatile(path, json.dumps(asdict(request)).encode())
        while time.monotonic() < deadline:
            if (answer := _read_answer(told)) is not None:
                return answer
            time.sleep(_LOOK_SECS)
        return None
    finally:
        files.remove_quietly(path)
        files.remove_quietly(told)


def _read(path: Path) -> Request | None:
    try:
        kinds = schema.kinds_of(Request)
        found = schema.parse(files.read_own(path, most=_MOST_BYTES))
        return Request(**schema.checked(found, kinds, required=tuple(kinds)))
    except (OSError, ValueError):
        return None


def _read_answer(path: Path) -> Answer | None:
    try:
        kinds = schema.kinds_of(Answer)
        found = schema.parse(files.read_own(path, most=_MOST_BYTES))
        return Answer(**schema.checked(found, kinds, required=tuple(kinds)))
    except (OSError, ValueError):
        return None
