"""The format of a trace: what each step of one process was, so that steps that are done again can be compared.

A process of a run appends to ``traces/<role>.trace`` in the logdir. When that file is full, it becomes
``<role>.before.trace`` and a new one begins; the two together are the trace, a few megabytes at most. Every record is
one ``write`` to a file opened for appending, so a SIGKILL loses nothing and at most cuts the last record short. The
files are not memory-mapped: under a map, a file that somebody truncates, or a disk that fails, kills the process.

A file begins with :data:`MAGIC`. Records follow without gaps, all numbers little-endian::

    kind u8 | between u8 | shape u16 | extent u32 | step i64 | payload | crc32 u32 of all before it in the record

==========  ====  =============================  ===================================================================
kind              extent                         payload
==========  ====  =============================  ===================================================================
NUMBERS     1     complete epochs                a float64 for each name of the shape: what the program reported
DIGESTS     2     complete epochs                a uint64 for each name: what the step was made of
SETTINGS    3     complete epochs                a float64 for each name: hyperparameters, from this step on
SHAPE       16    bytes of the payload           a JSON list of names; they are the shape from here on
START       17    bytes of the payload           a JSON object: the fields of :class:`Start` but for ``step``
FORK        18    complete epochs                none: see :class:`Fork`
MARK        19    0                              an int64, the step of the checkpoint: see :class:`Mark`
==========  ====  =============================  ===================================================================

``step`` is the number of steps of the run that were done when the record was written: inside the first step it is 0.
``between`` is 1 for what was recorded between two steps, before the step of that number, and else 0. Both and the
number of complete epochs, which changes between two steps, are a :data:`Moment`.

Nothing in a file is trusted: a record with a wrong checksum, an unknown kind or an impossible size ends the reading of
that file, and what was before it counts. Names have bounds, and nothing outside the logdir is read.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepguard.disk import files, schema
from stepguard.words import logger

_log = logger(__name__)

DIR_NAME = "traces"
SUFFIX = ".trace"
BEFORE = ".before.trace"
MAGIC = b"SGTRACE1"
MOST_BYTES = 4 << 20
"""The size of a file at which the next one begins."""

NUMBERS, DIGESTS, SETTINGS = 1, 2, 3
SHAPE, START, FORK, MARK = 16, 17, 18, 19
VALUES = {NUMBERS: "numbers", DIGESTS: "digests", SETTINGS: "settings"}

MOST_NAMES = 128
"""The most names of one shape; a summary of more numbers becomes several records."""
LONGEST_NAME = 200

_HEAD = struct.Struct("<BBHIq")
_CRC = struct.Struct("<I")
_INT = struct.Struct("<q")
_MOST_PAYLOAD = 1 << 16
_END = 1 << 63
MOST_READ = MOST_BYTES + 2 * _MOST_PAYLOAD
"""The most that is read of a file, which may be larger than MOST_BYTES by its last record."""
_ROLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")

Moment = tuple[int, int, bool]
"""The number of steps done, that of complete epochs, and whether it is inside a step. They come in their order."""


@dataclass(frozen=True, slots=True)
class Start:
    """A session begins. ``is_resumed`` says that it continues from a checkpoint; otherwise nothing before it counts.

    ``step`` and ``epochs`` are the moment at which it continues, ``processes`` the number that train together,
    ``time`` Unix seconds.
    """

    step: int
    epochs: int = 0
    is_resumed: bool = False
    processes: int = 1
    pid: int = 0
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class Record:
    """Some values of one step. ``kind`` is "numbers", "digests" (integers of 64 bits) or "settings"."""

    kind: str
    step: int
    epochs: int
    values: Mapping[str, float]
    is_inside: bool = True

    @property
    def moment(self) -> Moment:
        """When it was recorded."""
        return self.step, self.epochs, self.is_inside


@dataclass(frozen=True, slots=True)
class Fork:
    """Earlier records from this moment on are of a way that the run has left: they are compared with nothing."""

    step: int
    epochs: int


@dataclass(frozen=True, slots=True)
class Mark:
    """The checkpoint of ``checkpoint_step`` was taken when ``step`` of the trace was about to begin.

    For a framework that cannot tell cheaply what step a run of the graph belongs to: it counts its runs.
    """

    step: int
    checkpoint_step: int


Item = Start | Record | Fork | Mark


@dataclass(slots=True)
class Step:
    """What was recorded at one moment: by name, the values in the order in which they were recorded."""

    numbers: dict[str, list[float]] = field(default_factory=dict)
    digests: dict[str, list[float]] = field(default_factory=dict)
    settings: dict[str, list[float]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Add the values of a record."""
        values: dict[str, list[float]] = getattr(self, record.kind)
        for name, value in record.values.items():
            values.setdefault(name, []).append(value)


@dataclass(frozen=True, slots=True)
class Difference:
    """The first value of one name that is not what it was. ``kind`` is that of its :class:`Record`."""

    kind: str
    name: str
    then: float
    now: float


def differences(then: Step, now: Step) -> list[Difference]:
    """The names whose values differ, bit for bit, among those that both have; any NaN equals any other.

    If one has fewer values of a name, only as many are compared: a run may have ended in the middle.
    """
    found = []
    for kind in ("settings", "digests", "numbers"):
        before, after = getattr(then, kind), getattr(now, kind)
        for name in (one for one in before if one in after):
            pairs = zip(before[name], after[name], strict=False)
            unlike = next((pair for pair in pairs if not is_same(*pair)), None)
            if unlike is not None:
                found.append(Difference(kind, name, *unlike))
    return found


def is_same(then: float, now: float) -> bool:
    """Whether two values are the same bit for bit; any NaN equals any other."""
    if then != now:
        return then != then and now != now
    # 0.0 and -0.0 are equal, and not the same.
    return then != 0 or isinstance(then, int) or struct.pack("<d", then) == struct.pack("<d", now)


def steps(items: Iterable[Item]) -> dict[Moment, Step]:
    """What each moment was the last time that it was reached, oldest first, in the order of the moments.

    What a start or a fork makes obsolete is left out: everything before a start that was not resumed, and what was
    recorded from the moment of a fork on.
    """
    found: dict[Moment, Step] = {}
    written_by: dict[Moment, int] = {}
    start = 0
    for item in items:
        if isinstance(item, Start):
            start += 1
            if not item.is_resumed:
                found.clear()
        elif isinstance(item, Fork):
            for moment in [one for one in found if one[:2] >= (item.step, item.epochs)]:
                del found[moment]
        elif isinstance(item, Record):
            moment = item.moment
            if moment not in found or written_by[moment] != start:
                found[moment], written_by[moment] = Step(), start
            found[moment].add(item)
    return dict(sorted(found.items()))


# --- reading ---


def path_of(logdir: str | os.PathLike[str], role: str) -> Path:
    """The file that the process of ``role`` appends to."""
    return Path(logdir) / DIR_NAME / f"{role}{SUFFIX}"


def roles(logdir: str | os.PathLike[str]) -> list[str]:
    """The roles that have a trace in a logdir, the chief's first; empty if there is none, or it cannot be read."""
    place = Path(logdir) / DIR_NAME
    try:
        files.check_own_dir(place)
        names = os.listdir(place)
    except OSError:
        return []
    found = {name.removesuffix(BEFORE).removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)}
    return sorted((one for one in found if _ROLE.fullmatch(one)), key=lambda one: (one != "chief", one))


def _warn(path: Path, error: OSError) -> None:
    _log.warning("%s cannot be read, and is passed over: %s", path, error.strerror or error)


def read(
    logdir: str | os.PathLike[str], role: str = "chief", on_unreadable: Callable[[Path, OSError], None] = _warn
) -> list[Item]:
    """The trace of one process, in the order in which it was written; also while the process writes it.

    A missing file is an empty one. What the system cannot read, and what is no regular file, is passed over:
    ``on_unreadable`` is told.
    """
    return [item for content in contents(logdir, role, on_unreadable) for item in parse(content).items]


def contents(
    logdir: str | os.PathLike[str], role: str, on_unreadable: Callable[[Path, OSError], None] = _warn
) -> list[bytes]:
    """The contents of the two files of a trace, the older first; what is missing or cannot be read is empty."""
    place = path_of(logdir, role)
    try:
        files.check_own_dir(place.parent)
    except OSError as error:
        if os.path.lexists(place.parent):
            on_unreadable(place.parent, error)
        return [b"", b""]
    return [_content(path, on_unreadable) for path in (place.with_name(role + BEFORE), place)]


def came_to(logdir: str | os.PathLike[str], role: str, *, pid: int, started: float, since: int = 0) -> int | None:
    """The newest step that the process ``pid``, whose run began at ``started`` (Unix seconds), has recorded.

    Steps before ``since`` are left out. ``None`` if there is none, if another process was the last to record, or if the
    steps of the trace are not those of the checkpoints (see :class:`Mark`). What cannot be read is passed over.
    """
    newest: int | None = None
    is_own, is_counted_alike = False, True
    read_contents = contents(logdir, role, lambda _path, _error: None)
    for item in (item for content in read_contents for item in parse(content, since).items):
        if isinstance(item, Start):
            newest, is_own = None, item.pid == pid and item.time >= started
            is_counted_alike = is_counted_alike or not item.is_resumed
        elif isinstance(item, Mark):
            is_counted_alike = is_counted_alike and item.step == item.checkpoint_step
        elif isinstance(item, Fork):
            newest = None if newest is None else min(newest, item.step)
        elif item.step >= since:
            newest = item.step if newest is None else max(newest, item.step)
    return newest if is_own and is_counted_alike else None


def _content(path: Path, on_unreadable: Callable[[Path, OSError], None]) -> bytes:
    try:
        return files.read_own(path, most=MOST_READ)
    except FileNotFoundError:
        pass
    except OSError as error:
        on_unreadable(path, error)
    return b""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the content of one file holds: up to ``end`` it is whole; ``earlier`` is how many records were too early."""

    items: list[Item]
    end: int
    earlier: int


def parse(
    content: bytes,
    since: int = 0,
    until: int = _END,
    *,
    shapes: dict[int, tuple[str, ...]] | None = None,
    is_begun: bool = False,
) -> Parsed:
    """Read the content of one file, up to the first record that is damaged.

    Numbers and digests of other steps than ``since`` to ``until`` are left out: a trace may have hundreds of thousands.
    ``is_begun`` says that ``content`` goes on where another call has ended, which was given the same ``shapes``.
    """
    items: list[Item] = []
    if not is_begun and not content.startswith(MAGIC):
        return Parsed(items, 0, 0)
    shapes = {} if shapes is None else shapes
    view, earlier, end = memoryview(content), 0, 0 if is_begun else len(MAGIC)
    last = len(content) - _HEAD.size - _CRC.size
    unpack, crc_at, crc32, head = _HEAD.unpack_from, _CRC.unpack_from, zlib.crc32, _HEAD.size
    while end <= last:
        kind, between, shape, extent, step = unpack(content, end)
        names = shapes.get(shape)
        size = _payload_size(kind, extent, names)
        past = end + head + (size or 0)
        if size is None or between > 1 or step < 0 or past + _CRC.size > len(content):
            break
        if crc32(view[end:past]) != crc_at(content, past)[0]:
            break
        if kind <= DIGESTS and not since <= step < until:
            earlier += step < since
        elif kind == SHAPE:
            declared = _names(bytes(view[end + head : past]))
            if declared is None:
                break
            shapes[shape] = declared
        else:
            item = _item(kind, names or (), (step, extent, not between), view[end + head : past])
            if item is None:
                break
            items.append(item)
        end = past + _CRC.size
    return Parsed(items, end, earlier)


def _payload_size(kind: int, extent: int, names: Sequence[str] | None) -> int | None:
    if kind in VALUES:
        return None if names is None else 8 * len(names)
    if kind in (SHAPE, START):
        return extent if extent <= _MOST_PAYLOAD else None
    return {FORK: 0, MARK: _INT.size}.get(kind)


def _item(kind: int, names: Sequence[str], moment: Moment, payload: memoryview) -> Item | None:
    step, extent, is_inside = moment
    if kind == FORK:
        return Fork(step, extent)
    if kind == START:
        return _start(step, bytes(payload))
    if kind == MARK:
        return Mark(step, _INT.unpack(payload)[0])
    values = struct.unpack(f"<{len(names)}{'Q' if kind == DIGESTS else 'd'}", payload)
    return Record(VALUES[kind], step, extent, dict(zip(names, values, strict=True)), is_inside)


def _names(payload: bytes) -> tuple[str, ...] | None:
    try:
        names = schema.parse(payload)
    except ValueError:
        return None
    is_good = isinstance(names, list) and 0 < len(names) <= MOST_NAMES and len({*map(str, names)}) == len(names)
    if not is_good or not all(isinstance(one, str) and len(one) <= LONGEST_NAME for one in names):
        return None
    return tuple(names)


def _start(step: int, payload: bytes) -> Start | None:
    try:
        return Start(**{**schema.checked(schema.parse(payload), schema.kinds_of(Start)), "step": step})
    except ValueError:
        return None


# --- writing ---


def encoded_shape(number: int, names: Sequence[str]) -> bytes:
    """The record that declares a shape."""
    return _with_payload(SHAPE, number, 0, list(names))


def encoded_start(start: Start) -> bytes:
    """The record of a start."""
    told = {name: getattr(start, name) for name in ("epochs", "is_resumed", "processes", "pid", "time")}
    return _with_payload(START, 0, start.step, told)


def encoded_fork(fork: Fork) -> bytes:
    """The record of a fork."""
    return with_checksum(_HEAD.pack(FORK, 0, 0, fork.epochs, fork.step))


def encoded_mark(mark: Mark) -> bytes:
    """The record of a mark."""
    return with_checksum(_HEAD.pack(MARK, 0, 0, 0, mark.step) + _INT.pack(mark.checkpoint_step))


def packing(kind: int, names: int) -> Callable[..., bytes]:
    """A function ``pack(kind, between, shape, epochs, step, *values)`` for records with this number of values."""
    return struct.Struct(f"<BBHIq{names}{'Q' if kind == DIGESTS else 'd'}").pack


def with_checksum(body: bytes) -> bytes:
    """A record with its checksum."""
    return body + _CRC.pack(zlib.crc32(body))


def _with_payload(kind: int, shape: int, step: int, document: Any) -> bytes:
    payload = json.dumps(document).encode()
    return with_checksum(_HEAD.pack(kind, 0, shape, len(payload), step) + payload)
