"""The records of event files as bytes: fewer of them, where a file has more than anybody looks at.

A file is a series of records, each a length (8 bytes), a checksum of it (4), a message and a checksum of that (4). The
message is an ``Event`` in the encoding of protocol buffers. TensorBoard's own package takes 50 microseconds or more for
each, so that a million cannot be waited for. Here only the name of its first value is looked for.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from stepguard.disk import files

_HEAD = struct.Struct("<Q4x")
_CRC_BYTES = 4
# No scalar is larger. Images and graphs, which may be, are not read.
_MOST_BYTES = 1 << 16

# Of an Event the summary, of that a value, of that the tag.
_TAG_FIELDS = (5, 1, 1)


def thin(paths: Sequence[Path], place: Path, most: int) -> bool:
    """Write copies of event files into the directory ``place``, with ``most`` records of values at most, roughly.

    Each curve keeps as many as any other, at even distances, and its last; of more than ``most`` curves the shortest
    go. Records of other kinds stay, unless they are too large for a scalar. If the files have no more records than
    that, nothing is written, and False is returned.
    """
    counts = Counter(tag for path in paths for tag, _ in _records(path) if tag is not None)
    if counts.total() <= most:
        return False
    counts = Counter(dict(counts.most_common(most)))
    each = max(1, most // len(counts))
    seen: Counter[bytes] = Counter()
    for path in paths:
        with open(place / path.name, "wb") as target:
            for tag, record in _records(path):
                if tag is not None:
                    if tag not in counts:
                        continue
                    seen[tag] += 1
                    distance = -(-counts[tag] // each)
                    if (seen[tag] - 1) % distance and seen[tag] != counts[tag]:
                        continue
                target.write(record)
    return True


def _records(path: Path) -> Iterator[tuple[bytes | None, bytes]]:
    """The records up to one that is cut short, each with the tag of its first value, if it has one."""
    try:
        descriptor = files.open_regular(path)
    except FileNotFoundError:
        return  # It was removed just now.
    with os.fdopen(descriptor, "rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            (length,) = _HEAD.unpack(head)
            if length > _MOST_BYTES:
                if length > 1 << 40:
                    return  # No length: the file is damaged, and TensorBoard's package reads no further either.
                file.seek(length + _CRC_BYTES, os.SEEK_CUR)
                continue
            body = file.read(length + _CRC_BYTES)
            if len(body) < length + _CRC_BYTES:
                return
            yield _tag(body[:-_CRC_BYTES]), head + body


def _tag(message: bytes) -> bytes | None:
    part: bytes | None = message
    for wanted in _TAG_FIELDS:
        if part is None:
            return None
        part = _field(part, wanted)
    return part


def _field(message: bytes, wanted: int) -> bytes | None:
    """The first field of that number that has a length; None if there is none."""
    place = 0
    try:
        while place < len(message):
            key, place = _varint(message, place)
            kind = key & 7
            if kind == 2:
                length, place = _varint(message, place)
                if key >> 3 == wanted:
                    return message[place : place + length]
                place += length
            elif kind == 0:
                _, place = _varint(message, place)
            elif kind in (1, 5):
                place += 8 if kind == 1 else 4
            else:
                return None
    except IndexError:
        pass  # It is cut short, or no message.
    return None


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number of up to 64 bits, and the place behind it. Raises IndexError where the message ends."""
    found = shift = 0
    while shift < 64:
        byte = message[place]
        place += 1
        found |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return found, place
