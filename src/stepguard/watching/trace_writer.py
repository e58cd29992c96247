"""Writes the trace of one process: appends records, and begins the next file when one is full.

The protocol: any thread adds values. The usual way looks up the shape of the names, packs a record and appends it by
one ``write``. A lock covers what is rare: a new shape, the next file, and the moment at which a disk fails or works
again. A shape is in the table only once its record is in the file, and a new file begins with all shapes of the table
before any thread sees it; so no record comes before its shape.

While the disk fails, there is no file, and records wait in a deque that threads append to without a lock; the oldest
are dropped first. The observer's thread alone tries again, once a second: it opens the file, writes the shapes and
what waits, and holds no lock meanwhile, so that no step waits for the disk. What other threads have added to the deque
while the file was handed over is written at the next look, or at the end. Any error may pass: a disk that is full says
so in several ways. A kill leaves whole records, and at most one that is cut short, which the next start removes.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from zlib import crc32

from stepguard.disk import files
from stepguard.disk.appended_file import AppendedFile
from stepguard.watching import trace
from stepguard.watching.trace import Fork, Item, Mark, Start
from stepguard.words import logger

_log = logger(__name__)

MOST_COMPARED = 50_000
"""How many steps after a restart are compared at most: what they were is in memory until then."""

_NEVER = 1 << 63
_MOST_WAITING = 4096
_MOST_SHAPES = 4096

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
        # Where the good part of the file ends, once an error has ended the writing; ``None`` if that is not known.
        self._end: int | None = None
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
            self._fail(None, error, record)
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
        self._put(body + _packed_crc(crc32(body)))

    def note(self, item: Fork | Mark) -> None:
        """Append a fork or a mark."""
        self._put(trace.encoded_fork(item) if isinstance(item, Fork) else trace.encoded_mark(item))

    def retry(self) -> None:
        """If the disk has failed, try again. Called about once a second, by the observer's thread only."""
        if self._file is None:
            if self._is_over or not self._is_failing or not self._is_reopened():
                return
            _log.info("%s: the trace is written again", self._path)
        file = self._file
        try:
            if file is not None:
                self._write_waiting(file)
        except OSError as error:
            self._fail(file, error)

    def close(self) -> None:
        """Write nothing more."""
        with self._lock:
            self._is_over = True
            self._file = None
            self._waiting.clear()

    # --- inside ---

    def _add_new(self, kind: int, step: int, epochs: int, values: Mapping[str, float], between: int) -> None:
        """Add values under names that were not seen together before."""
        names = tuple(str(one)[: trace.LONGEST_NAME] for one in values)
        if len(names) > trace.MOST_NAMES or names != tuple(values):
            rest = iter(dict(zip(names, values.values(), strict=True)).items())
            while part := dict(islice(rest, trace.MOST_NAMES)):
                self.add(kind, step, epochs, part, between)
        elif names and self._is_declared(kind, names):
            self.add(kind, step, epochs, values, between)

    def _is_declared(self, kind: int, names: tuple[str, ...]) -> bool:
        """Put names into the table. ``False``: a program makes up names, and the trace has enough of them."""
        failure = None
        with self._lock:
            if names in self._shapes[kind]:
                return True
            number = sum(map(len, self._shapes.values()))
            if number >= _MOST_SHAPES:
                return False
            file, record = self._file, trace.encoded_shape(number, names)
            try:
                if file is None:
                    self._waiting.append(record)
                else:
                    file.append(record)
            except OSError as error:
                failure = error
            self._shapes[kind][names] = number, trace.packing(kind, len(names))
        if failure is not None:
            self._fail(file, failure, record)
        return True

    def _put(self, record: bytes) -> None:
        """Append a record, or let it wait."""
        file = self._file
        if file is None:
            if not self._is_over:
                self._waiting.append(record)
            return
        try:
            file.append(record)
        except OSError as error:
            self._fail(file, error, record)
            return
        if file.size > self._most_bytes:
            self._begin_next_file(file)

    def _opened(self, *, keep: int) -> AppendedFile:
        file = AppendedFile(self._path, keep=keep)
        if not file.size:
            file.append(trace.MAGIC)
        return file

    def _begin_next_file(self, full: AppendedFile) -> None:
        with self._lock:
            if self._file is not full:
                return  # Another thread was faster.
            try:
                files.move(self._path, self._path.with_name(self._path.name.removesuffix(trace.SUFFIX) + trace.BEFORE))
                file = self._opened(keep=0)
                for names, shape in self._all_shapes():
                    file.append(trace.encoded_shape(shape[0], names))
                self._file = file
                return
            except OSError as error:
                failure = error
        self._fail(full, failure)

    def _all_shapes(self) -> list[tuple[tuple[str, ...], _Shape]]:
        """By the names, all shapes of the table."""
        # A copy: other threads may add shapes meanwhile.
        return [one for shapes in self._shapes.values() for one in list(shapes.items())]

    def _fail(self, file: AppendedFile | None, error: OSError, record: bytes | None = None) -> None:
        """Give ``file`` up, and keep ``record`` until the disk works again."""
        with self._lock:
            if record is not None and not self._is_over:
                self._waiting.append(record)
            if self._file is not file or self._is_failing or self._is_over:
                return  # Another thread was faster.
            self._file, self._is_failing = None, True
            # Nothing may come behind this end, which the next try goes on from.
            self._end = None if file is None else file.seal()
        _log.warning("%s: the trace could not be written (%s); it is tried again", self._path, error.strerror or error)

    def _is_reopened(self) -> bool:
        """Whether the disk works again. The file then has all that waits, and threads append to it."""
        try:
            file = self._file_again()
        except OSError:
            return False
        declared: set[int] = set()
        try:
            self._write_waiting(file, declared)
            with self._lock:
                # No record comes before its shape: those that were added meanwhile are among what waits.
                self._declare(file, declared)
                if not self._is_over:
                    self._file, self._is_failing = file, False
        except OSError:
            self._end = file.seal()
            return False
        return not self._is_over

    def _file_again(self) -> AppendedFile:
        files.make_own_dir(self._path.parent)
        size, end = files.size_of(self._path), self._end
        if end is None or size is None or size < end:
            # To read it takes a while; only a file that this writer has not written is read.
            end = _end(self._contents()[-1])
        return self._opened(keep=end)

    def _write_waiting(self, file: AppendedFile, declared: set[int] | None = None) -> None:
        """Append what waits. With ``declared``, the numbers of the shapes that the file has, those that it lacks come
        first: the record of a shape may be among those that were dropped.
        """
        while self._waiting:
            record = self._waiting.popleft()
            try:
                # The shape of a record is in the table before the record waits.
                if declared is not None:
                    self._declare(file, declared)
                file.append(record)
            except OSError:
                if len(self._waiting) < _MOST_WAITING:
                    self._waiting.appendleft(record)
                raise

    def _declare(self, file: AppendedFile, declared: set[int]) -> None:
        if len(declared) == sum(map(len, self._shapes.values())):
            return
        for names, (number, _) in self._all_shapes():
            if number not in declared:
                file.append(trace.encoded_shape(number, names))
                declared.add(number)
