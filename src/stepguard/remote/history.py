"""What goes along with the checkpoints: ledger, event files, heartbeats, traces and the last rollback: one history.

They are sent whole, because object stores cannot append. A small file is sent whenever it has changed. A large one is
sent once it has grown by an eighth, and at the end of the run: a file that is appended to for a month is then sent a
few dozen times, and not at each checkpoint.

A start fetches those that are not here, and the ledger also if the one here is the beginning of the one there: this
machine was the run's before, and another one has gone on. A ledger here that says something else is kept. Of the notes
of a rollback, the later one counts; one that was forgotten here is removed there.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from stepguard.disk import files, schema
from stepguard.disk.new_file import NewFile
from stepguard.remote.objects import BLOCK_BYTES, Remote, RemoteObject, read_whole
from stepguard.remote.pace import Pace
from stepguard.store import rollback
from stepguard.words import logger

_log = logger(__name__)

LEDGER = "run.jsonl"
_OURS = re.compile(
    r"rollback\.json|run(?:\.[0-9]{1,9})?\.jsonl|"
    r"events\.out\.tfevents\.[^/]*|graph\.pbtxt|heartbeats/[^/]+\.json|traces/[^/]+\.trace"
)
_PLACES = ("", "heartbeats/", "traces/")
_SMALL_BYTES = 4 << 20
# A ledger, which is compared as a whole.
_MOST_BYTES = 64 << 20


def is_history(key: str) -> bool:
    """Whether a file of this name goes along."""
    return _OURS.fullmatch(key) is not None and schema.is_name(key)


class History:
    """The files beside the checkpoints in one logdir and one remote place. One thread at a time."""

    def __init__(self, logdir: Path, remote: Remote, pace: Pace) -> None:
        self._logdir = logdir
        self._remote = remote
        self._pace = pace
        # What was sent last, by key: size and time of the last write.
        self._sent: dict[str, tuple[int, int]] = {}

    def send(self, *, is_last: bool) -> list[str]:
        """Send what has changed, and return the keys. ``is_last`` sends large files that have grown by little too."""
        sent = []
        if rollback.FILE_NAME in self._sent and not os.path.lexists(self._logdir / rollback.FILE_NAME):
            self._remote.delete([rollback.FILE_NAME])
            del self._sent[rollback.FILE_NAME]
        for key, path in self._found():
            try:
                status = os.lstat(path)
            except OSError:
                continue
            now = (status.st_size, status.st_mtime_ns)
            before = self._sent.get(key)
            if before == now or not status.st_size:
                continue
            is_small = status.st_size <= _SMALL_BYTES
            if before is not None and not (is_last or is_small) and now[0] - before[0] < before[0] // 8:
                continue
            try:
                self._send_one(key, path, now[0])
            except FileNotFoundError:
                continue  # A ledger that is being put aside, or a heartbeat that has ended.
            self._sent[key] = now
            sent.append(key)
        return sent

    def _found(self) -> Iterator[tuple[str, Path]]:
        for place in _PLACES:
            with contextlib.suppress(OSError):
                files.check_own_dir(self._logdir / place)
                for name in sorted(os.listdir(self._logdir / place)):
                    if is_history(place + name):
                        yield place + name, self._logdir / place / name

    def _send_one(self, key: str, path: Path, size: int) -> None:
        descriptor = files.open_own(path, os.O_RDONLY)
        try:
            # As long as it was when it was looked at: somebody appends to it.
            size = min(size, os.fstat(descriptor).st_size)
            self._remote.write(key, self._blocks(descriptor, size), size)
        finally:
            os.close(descriptor)

    def _blocks(self, descriptor: int, size: int) -> Iterator[bytes]:
        place = 0
        while place < size and (block := os.pread(descriptor, min(BLOCK_BYTES, size - place), place)):
            place += len(block)
            self._pace.take(len(block), url=self._remote.url)
            yield block
        if place < size:
            raise FileNotFoundError(f"{self._logdir}: a file became shorter while it was sent")

    def fetch(self) -> list[str]:
        """Fetch what is not here, and a ledger that goes on where the one here ends; return the keys."""
        fetched = []
        for found in self._remote.objects():
            path = self._logdir / found.key
            if not is_history(found.key):
                continue
            if found.key == rollback.FILE_NAME:
                # It is there, whoever wrote it: once it is forgotten here, it goes.
                self._sent.setdefault(found.key, (0, 0))
                if not self._is_put_back(found):
                    continue
                fetched.append(found.key)
            elif not os.path.lexists(path):
                self._fetch_one(found, path)
                fetched.append(found.key)
            elif found.key == LEDGER and self._goes_on(found, path):
                fetched.append(found.key)
            else:
                continue
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                self._sent[found.key] = (status.st_size, status.st_mtime_ns)
        return fetched

    def _fetch_one(self, found: RemoteObject, path: Path) -> None:
        files.make_dirs(path.parent)
        aside = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
        try:
            with NewFile(aside) as file:
                for block in self._remote.read(found.key):
                    file.write(block)
            files.fsync_file(aside)
            files.move(aside, path)
            files.fsync_dir(path.parent)
        except BaseException:
            files.remove_quietly(aside)
            raise

    def _is_put_back(self, found: RemoteObject) -> bool:
        """Take over the rollback that is noted there, if it is later than the one here."""
        here = rollback.read(self._logdir)
        try:
            there = rollback.parse(read_whole(self._remote, found.key, most=rollback.MOST_BYTES))
        except (ValueError, TypeError) as error:
            _log.warning("%s/%s: cannot be read, and is passed over: %s", self._remote.url, found.key, error)
            return False
        if here is not None and here.time >= there.time:
            return False
        rollback.take_over(self._logdir, there)
        return True

    def _goes_on(self, found: RemoteObject, path: Path) -> bool:
        """Replace the ledger here by the one there, if that begins with it."""
        try:
            here = files.read_own(path, most=_MOST_BYTES)
        except OSError as error:
            _log.warning("%s: the ledger cannot be read, and is left: %s", path, error)
            return False
        if found.size <= len(here):
            return False
        there = read_whole(self._remote, found.key, most=_MOST_BYTES)
        if not there.startswith(here):
            _log.warning(
                "%s: it and the one in the mirror %s tell different stories; the one here is kept, and goes there",
                path,
                self._remote.url,
            )
            return False
        files.write_atomic(path, there)
        return True
