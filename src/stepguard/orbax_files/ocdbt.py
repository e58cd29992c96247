"""Writes the index of an OCDBT database, Orbax's format for arrays, over data files that are there already.

A database maps keys to bytes: here ``params.w/.zarray`` to the description of an array and ``params.w/0.0`` to the
bytes of its only chunk. One node has all keys, each with its value or with file, place and length of the value. The
format allows data files of any form, so the arrays lie in them as they are in memory.

The format is described at https://google.github.io/tensorstore/kvstore/ocdbt/ ("Storage format").
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import google_crc32c

MANIFEST = "manifest.ocdbt"

_MANIFEST_MAGIC = 0x0CDB3A2A
_NODE_MAGIC = 0x0CDB20DE
_ARITY_LOG2 = 4
_INLINE_BYTES = 1024
# For readers that would write to the database: a node of ours is larger than the default with 80,000 keys.
_MOST_NODE_BYTES = 1 << 30


class Place(NamedTuple):
    """Where the bytes of a value are: a file, named from the directory of the database, and the place in it."""

    file: str
    offset: int
    length: int


def node(values: Mapping[str, bytes | Place]) -> bytes:
    """The node with all keys, to be written to a data file."""
    keys = sorted((key.encode(), value) for key, value in values.items())
    names = [key for key, _ in keys]
    held = [value for _, value in keys]
    places = [value for value in held if isinstance(value, Place)]
    files = sorted({one.file for one in places})
    return _framed(
        _NODE_MAGIC,
        bytes([0]),  # the height: this is a leaf
        _file_table(files),
        # The zeros say that no key leaves out what it has in common with the one before it.
        _numbers([len(names), *[0] * (len(names) - 1)]),
        _numbers(map(len, names)),
        *names,
        _numbers(value.length if isinstance(value, Place) else len(value) for value in held),
        _numbers(isinstance(value, Place) for value in held),
        _numbers(files.index(one.file) for one in places),
        _numbers(one.offset for one in places),
        *(value for value in held if not isinstance(value, Place)),
    )


def manifest(root: Place, values: Mapping[str, bytes | Place]) -> bytes:
    """The content of the file `MANIFEST`, for the node with ``values`` at ``root``."""
    indirect = sum(one.length for one in values.values() if isinstance(one, Place))
    config = (os.urandom(16), _numbers([0, _INLINE_BYTES, _MOST_NODE_BYTES]), bytes([_ARITY_LOG2]), _numbers([0]))
    version = (
        _numbers([1, 1]),  # one version, of the generation 1
        bytes([0]),  # the height of its root
        _numbers([0, root.offset, root.length, len(values), root.length, indirect]),
        time.time_ns().to_bytes(8, "little"),
    )
    return _framed(_MANIFEST_MAGIC, *config, _file_table([root.file]), *version, _numbers([0]))


def _framed(magic: int, *body: bytes) -> bytes:
    """A body without compression, between its header and its checksum."""
    content = b"".join((_numbers([0, 0]), *body))
    length = 4 + 8 + len(content) + 4
    framed = magic.to_bytes(4, "big") + length.to_bytes(8, "little") + content
    return framed + int(google_crc32c.value(framed)).to_bytes(4, "little")


def _file_table(files: Sequence[str]) -> bytes:
    paths = [one.encode() for one in files]
    return b"".join(
        (
            _numbers([len(paths), *[0] * (len(paths) - 1)]),
            _numbers(map(len, paths)),
            _numbers([0] * len(paths)),
            *paths,
        )
    )


def _numbers(values: Iterable[int]) -> bytes:
    """Integers in the form of Protocol Buffers: seven bits a byte, the lowest first."""
    found = bytearray()
    for value in values:
        left = int(value)
        while left > 127:
            found.append(left & 127 | 128)
            left >>= 7
        found.append(left)
    return bytes(found)
