"""Sorted tables in the format of LevelDB's table files, see its doc/table_format.md; only writing, never compressed."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

import google_crc32c

_MAGIC = 0xDB4775248B80FB57
_BLOCK_BYTES = 64 << 10
_RESTART_INTERVAL = 16


def table_pieces(rows: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """The pieces of a table file with these rows, which come sorted by their keys."""
    position = 0
    index: list[tuple[bytes, bytes]] = []
    waiting: list[tuple[bytes, bytes]] = []
    size = 0

    def sealed(block: bytes) -> tuple[bytes, bytes]:
        # Behind each block: how it is compressed (0: not at all), and the checksum of both.
        nonlocal position
        handle = varint(position) + varint(len(block))
        block += b"\0"
        block += struct.pack("<I", masked(google_crc32c.value(block)))
        position += len(block)
        return block, handle

    for row in rows:
        waiting.append(row)
        size += len(row[0]) + len(row[1])
        if size >= _BLOCK_BYTES:
            block, handle = sealed(_table_block(waiting))
            yield block
            index.append((waiting[-1][0], handle))
            waiting, size = [], 0
    if waiting:
        block, handle = sealed(_table_block(waiting))
        yield block
        index.append((waiting[-1][0], handle))
    block, meta_handle = sealed(_table_block([]))
    yield block
    block, index_handle = sealed(_table_block(index))
    yield block
    yield (meta_handle + index_handle).ljust(40, b"\0") + struct.pack("<Q", _MAGIC)


def _table_block(rows: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Rows whose keys say how much they share with the one before; where each sixteenth, which shares none, begins."""
    block = bytearray()
    restarts = []
    previous = b""
    for number, (key, value) in enumerate(rows):
        shared = 0
        if number % _RESTART_INTERVAL == 0:
            restarts.append(len(block))
        else:
            shared = _shared(previous, key)
        block += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    restarts = restarts or [0]
    return bytes(block) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def _shared(one: bytes, other: bytes) -> int:
    """How many bytes two keys have in common at their beginning."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))


def varint(number: int) -> bytes:
    """An integer >= 0, seven bits a byte, the lowest first."""
    coded = bytearray()
    while number > 0x7F:
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    coded.append(number)
    return bytes(coded)


def masked(crc: int) -> int:
    """The checksum of data that may itself hold checksums, as LevelDB stores it."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
