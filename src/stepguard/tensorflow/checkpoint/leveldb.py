"""Writes sorted tables in the format of LevelDB's table files (see its doc/table_format.md), without compression."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

import google_crc32c

_MAGIC = 0xDB4775248B80FB57
_BLOCK_BYTES = 64 << 10
_RESTART_INTERVAL = 16


def table_pieces(rows: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """The pieces of a table file with these rows; the rows must be sorted by their keys."""
    position = 0
    index: list[tuple[bytes, bytes]] = []
    waiting: list[tuple[bytes, bytes]] = []
    size = 0

    def sealed(block: bytes) -> tuple[bytes, bytes]:
        # Each block is followed by the kind of its compression (0: none) and the checksum of both.
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
    """A block of rows. Each key omits the bytes that it shares with the previous key, except in each 16th row.

    The block ends with the offsets of these complete rows, which LevelDB calls restarts.
    """
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
    """The length of the common prefix of two keys, in bytes."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))


def varint(number: int) -> bytes:
    """An integer >= 0 as a varint: seven bits in each byte, the lowest first."""
    coded = bytearray()
    while number > 0x7F:
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    coded.append(number)
    return bytes(coded)


def masked(crc: int) -> int:
    """A checksum as LevelDB stores it: masked, because the data may itself contain checksums."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
