"""Writes the trace of one process: appends records, and begins the next file when one is full.

The protocol: any thread adds values. The usual way takes no lock: it looks up the shape of the names, packs a record
and appends it by one ``write`` to a file opened for appending, so that records of several threads do not mix. A lock
covers what is rare: a new shape, the next file, and a disk that fails. A shape is in the table only once its record is
in the file, and a new file begins with all shapes of the table before any thread sees it; so no record comes before its
shape. While the disk fails, records wait in memory, the oldest are dropped first, and the observer's thread tries again
once a second. A kill leaves whole records, and at most one that is cut short, which the next start removes.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from zlib import crc32

from stepguard.disk import files
from stepguard.disk.files import AppendedFile
from stepguard.watching import trace
from stepguard.watching.trace import Fork, Item, Mark, Start
from stepguard.words import logger

_log = logger(__name__)

MOST_COMPARED = 50_000
"""How many steps after a restart are compared at most: what they were is in memory until then."""

_NEVER = 1 << 63
_MOST_WAITING = 4096
_MOST_SHAPES = 4096
_MAY_PASS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE})


_Shape = tuple[int, Callable[..., bytes]]
"""The number of a shape, and the function that packs its records."""

_packed_crc = struct.Struct("<I").pack


@dataclass(frozen=True, slots=True)
class Past:
    """What the trace tells a start: its items, without the steps before. ``is_whole``: nothing after it is lost."""

    items: list[Item]
    is_whole: bool


def _read_past(contents: Sequence[bytes], checkpoint_step: int) -> tuple[Past, int]:
    """What to compare with after a restart from ``checkpoint_step``, and where the good part of the newer file ends."""
    since = checkpoint_step
    parsed = [trace.parse(content, since, since + MOST_COMPARED) for content in contents]
    marked = _step_of([item for one in parsed for item in one.items], checkpoint_step)
    if marked != since:
        parsed = [trace.parse(content, marked, marked + MOST_COMPARED) for content in contents]
    items = [item for one in parsed for item in one.items]
    is_whole = not items or isinstance(items[0], Start) or any(one.earlier for one in parsed)
    return Past(items, is_whole), parsed[-1].end


def _end(content: bytes) -> int:
    return trace.parse(content, since=_NEVER).end


def _step_of(items: Sequence[Item], checkpoint_step: int) -> int:
    marks = (one.step for one in reversed(items) if isinstance(one, Mark) and one.checkpoint_step == checkpoint_step)
    return next(marks, checkpoint_step)


class TraceWriter:
    """Appends to the trace of ``role`` in ``logdir``. Any thread. A run never fails because of its trace.

    ``most_bytes`` is the size of a file at which the next one begins.
    """

    def __init__(self, logdir: Path, role: str, *, most_bytes: int = trace.MOST_BYTES) -> None:
        self._path = trace.path_of(logdir, role)
        self._most_bytes = most_bytes
        self._shapes: dict[int, dict[tuple[str, ...], _Shape]] = {kind: {} for kind in trace.VALUES}
        self._file: AppendedFile | None = None
        self._room = 0
        self._lock = threading.Lock()
        # While the disk fails: the records that could not be written yet.
        self._waiting: deque[bytes] = deque(maxlen=_MOST_WAITING)
        self._is_failing = self._is_over = False

    def open(self, start: Start) -> Past:
        """Begin with ``start``; returns what matters of the past to it. A disk that fails causes a warning."""
        past = Past([], is_whole=True)
        record = trace.encoded_start(start)
        try:
            files.make_own_dir(self._path.parent)
            contents = self._contents()
            if start.is_resumed:
                past, end = _read_past(contents, start.step)
            else:
                end = _end(contents[-1])
            file = self._opened(keep=end)
            file.append(record)
        except OSError as error:
            with self._lock:
                self._fail(error, record)
        else:
            self._file = file
        return past

    def _contents(self) -> list[bytes]:
        contents = trace.contents(self._path.parent.parent, self._path.name.removesuffix(trace.SUFFIX))
        if not contents[-1] and files.size_of(self._path):
            # It cannot be read, and a warning has said so: this raises the same error.
            files.read_own(self._path)
        return contents

    def add(self, kind: int, step: int, epochs: int, values: Mapping[str, float], between: int = 0) -> None:
        """Append values of one moment; ``kind`` is one of ``trace.VALUES``, ``between`` 1 for between two steps."""
        # Every step may come here: what would read better as calls of functions is written out.
        shape = self._shapes[kind].get(tuple(values))
        if shape is None:
            self._add_new(kind, step, epochs, values, between)
            return
        number, pack = shape
        if len(values) == 1:
            (value,) = values.values()
            body = pack(kind, between, number, epochs, step, value)
        else:
            body = pack(kind, between, number, epochs, step, *values.values())
        record = body + _packed_crc(crc32(body))
        file = self._file
        if file is None:
            self._wait(record)
            return
        try:
            file.append(record)
        except OSError as error:
            with self._lock:
                self._fail(error, record)
            return
        self._room -= len(record)
        if self._room < 0:
            self._begin_next_file()

    def note(self, item: Fork | Mark) -> None:
        """Append a fork or a mark."""
        record = trace.encoded_fork(item) if isinstance(item, Fork) else trace.encoded_mark(item)
        with self._lock:
            self._put(record)

    def retry(self) -> None:
        """If the disk has failed, try again. Called about once a second."""
        with self._lock:
            if not self._is_failing or self._is_over:
                return
            try:
                self._reopen()
            except OSError:
                return
            self._is_failing = False
        _log.info("%s: the trace is written again", self._path)

    def close(self) -> None:
        """Write nothing more."""
        with self._lock:
            self._is_over = True
            self._file = None
            self._waiting.clear()

    # --- inside ---

    def _add_new(self, kind: int, step: int, epochs: int, values: Mapping[str, float], between: int) -> None:
        """Add values under names that were not seen together before."""
        names = tuple(values)
        is_large = len(names) > trace.MOST_NAMES or any(len(one) > trace.LONGEST_NAME for one in names)
        if is_large:
            rest = iter({str(name)[: trace.LONGEST_NAME]: value for name, value in values.items()}.items())
            while part := dict(islice(rest, trace.MOST_NAMES)):
                self.add(kind, step, epochs, part, between)
            return
        if not names:
            return
        with self._lock:
            known = sum(map(len, self._shapes.values()))
            if names not in self._shapes[kind] and known < _MOST_SHAPES:
                shape = known, trace.packing(kind, len(names))
                self._put(trace.encoded_shape(known, names))
                self._shapes[kind][names] = shape
            elif names not in self._shapes[kind]:
                return  # A program that makes up names: the trace has enough of them.
        self.add(kind, step, epochs, values, between)

    def _put(self, record: bytes) -> None:
        """Append a record, with the lock taken."""
        if self._is_over:
            return
        if self._file is None:
            self._waiting.append(record)
            return
        try:
            self._append(record)
        except OSError as error:
            self._fail(error, record)

    def _append(self, record: bytes) -> None:
        assert self._file is not None
        self._file.append(record)
        self._room -= len(record)

    def _wait(self, record: bytes) -> None:
        with self._lock:
            self._put(record)

    def _opened(self, *, keep: int) -> AppendedFile:
        file = AppendedFile(self._path, keep=keep)
        if not keep:
            file.append(trace.MAGIC)
        self._room = self._most_bytes - keep
        return file

    def _put_shapes(self, file: AppendedFile) -> None:
        for shapes in self._shapes.values():
            for names, shape in shapes.items():
                file.append(trace.encoded_shape(shape[0], names))

    def _begin_next_file(self) -> None:
        with self._lock:
            if self._room >= 0 or self._file is None:
                return  # Another thread was faster.
            try:
                files.move(self._path, self._path.with_name(self._path.name.removesuffix(trace.SUFFIX) + trace.BEFORE))
                file = self._opened(keep=0)
                self._put_shapes(file)
                self._file = file
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError, record: bytes | None = None) -> None:
        """Keep ``record`` until the disk works again, with the lock taken. Errors that cannot pass end the trace."""
        self._file = None
        may_pass = error.errno in _MAY_PASS
        self._is_over = self._is_over or not may_pass
        if record is not None and may_pass:
            self._waiting.append(record)
        if not self._is_failing:
            self._is_failing = True
            _log.warning(
                "%s: the trace could not be written (%s); %s",
                self._path,
                error.strerror or error,
                "it is tried again" if may_pass else "steps that are done again cannot be compared with this run's",
            )

    def _reopen(self) -> None:
        files.make_own_dir(self._path.parent)
        file = self._opened(keep=_end(self._contents()[-1]))
        # A shape may be among the records that were dropped.
        self._put_shapes(file)
        while self._waiting:
            file.append(self._waiting[0])
            self._waiting.popleft()
        self._file = file
