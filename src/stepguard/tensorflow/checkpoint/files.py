"""Writes TensorFlow checkpoints in the tensor bundle format, from arrays in memory, in one pass.

A bundle has two or more files. ``NAME.data-00000-of-00001`` holds the bytes of the tensors of one shard, one after the
other; a Saver with ``sharded=True`` has a shard for each device. ``NAME.index`` is a sorted table in the format of
LevelDB's table files. It maps tensor names to `BundleEntryProto`: type, shape, place in the data file, and checksum.
Its first key is empty, and has a `BundleHeaderProto`. The format is described in
tensorflow/core/protobuf/tensor_bundle.proto and in LevelDB's doc/table_format.md.

TensorFlow's own operation copies every tensor and computes one checksum after the other, and the file must then be read
again for its digest. Here every block is checksummed, digested and written while it is in the cache of the core.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2, tensor_slice_pb2
from tensorflow.core.protobuf import tensor_bundle_pb2

from stepguard.disk.new_file import NewFile
from stepguard.store import tensorflow_files
from stepguard.tensorflow.checkpoint.leveldb import masked, table_pieces, varint

# A block and its copy in the kernel fit into the cache of a core. Its checksum holds the GIL for 0.1 ms.
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BundleTensor:
    """One tensor, or one slice of a partitioned one, to be written.

    ``spec`` is in the form of the Saver's own operation: ``""`` for a whole tensor, or ``"4 10 0,2:-"`` for rows 0 and
    1 of a tensor of shape (4, 10). For strings ``array`` holds objects of type bytes; for a variant (the state of an
    iterator) it holds one serialised TensorProto.
    """

    name: str
    spec: str
    dtype: Any
    array: Any


def write_bundle(prefix: Path, shards: Sequence[Iterable[BundleTensor]]) -> dict[str, tuple[int, str]]:
    """Write ``prefix.data-*-of-*``, one file for each shard, and ``prefix.index``; return size and digest by file name.

    The files are not durable yet.

    Raises ValueError if two tensors have the same name, and OSError.
    """
    table: dict[bytes, tensor_bundle_pb2.BundleEntryProto] = {}
    written = []
    for number, tensors in enumerate(shards):
        with NewFile(Path(tensorflow_files.data_file(str(prefix), number, len(shards)))) as data:
            for tensor in tensors:
                _write_tensor(data, number, tensor, table)
        written.append(data)
    header = tensor_bundle_pb2.BundleHeaderProto(num_shards=len(shards))
    header.version.producer = 1
    rows = {b"": header, **table}
    with NewFile(Path(tensorflow_files.entry_file(str(prefix)))) as index:
        for piece in table_pieces((key, rows[key].SerializeToString()) for key in sorted(rows)):
            index.write(piece)
    return {one.path.name: (one.size, one.digest) for one in (*written, index)}


def _write_tensor(
    data: NewFile, shard: int, tensor: BundleTensor, table: dict[bytes, tensor_bundle_pb2.BundleEntryProto]
) -> None:
    array = np.asarray(tensor.array)
    key = _key(table, tensor, array)
    if key in table:
        raise ValueError(f"{data.path}: two tensors of the name {tensor.name!r} {tensor.spec!r}")
    offset, crc = data.size, 0
    for block, checked in _blocks(tensor.dtype, array):
        crc = google_crc32c.extend(crc, checked)
        data.write(block)
    table[key] = _entry(
        tensor.dtype,
        _shape(tensor.dtype, array),
        shard_id=shard,
        offset=offset,
        size=data.size - offset,
        crc32c=masked(crc),
    )


def _entry(dtype: Any, shape: Iterable[int], **fields: int) -> tensor_bundle_pb2.BundleEntryProto:
    dims = [tensor_shape_pb2.TensorShapeProto.Dim(size=size) for size in shape]
    return tensor_bundle_pb2.BundleEntryProto(
        dtype=dtype.as_datatype_enum, shape=tensor_shape_pb2.TensorShapeProto(dim=dims), **fields
    )


def _shape(dtype: Any, array: Any) -> Sequence[int]:
    if dtype != tf.variant:
        return tuple(array.shape)
    serialised = tensor_pb2.TensorProto.FromString(array.item())
    return [dim.size for dim in serialised.tensor_shape.dim]


# --- the bytes of one tensor ---


def _blocks(dtype: Any, array: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of the bytes to write and the bytes to checksum for them. Only for the lengths of strings they differ."""
    if dtype == tf.variant:
        yield from _variant_blocks(array.item())
    elif dtype == tf.string:
        yield from _string_blocks([_as_bytes(item) for item in array.reshape(-1)])
    else:
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, flat.size, _BLOCK_BYTES):
            # Passed as an array, because the checksum function refuses a memoryview.
            block = flat[start : start + _BLOCK_BYTES]
            yield block, block


def _string_blocks(items: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """First all lengths as varints, then the checksum of the lengths as integers, then the bytes of all strings."""
    lengths = b"".join(struct.pack("<I" if len(item) < 1 << 32 else "<Q", len(item)) for item in items)
    yield b"".join(varint(len(item)) for item in items), lengths
    checksum = struct.pack("<I", masked(google_crc32c.value(lengths)))
    yield checksum, checksum
    for item in items:
        for start in range(0, len(item), _BLOCK_BYTES):
            block = item[start : start + _BLOCK_BYTES]
            yield block, block


def _variant_blocks(serialised: bytes) -> Iterator[tuple[bytes, bytes]]:
    """For each element: its length, its proto, and the checksum of all bytes so far."""
    crc = 0
    for content in _variant_elements(tensor_pb2.TensorProto.FromString(serialised)):
        length = struct.pack("<Q", len(content))
        yield varint(len(content)), length
        yield content, content
        crc = google_crc32c.extend(google_crc32c.extend(crc, length), content)
        checksum = struct.pack("<I", masked(crc))
        crc = google_crc32c.extend(crc, checksum)
        yield checksum, checksum


def _variant_elements(tensor: Any) -> list[bytes]:
    """The serialised elements: in the tensor's content, after their sizes, or else in its field ``variant_val``."""
    content, position, sizes = tensor.tensor_content, 0, []
    if not content:
        return [element.SerializeToString() for element in tensor.variant_val]
    for _ in range(math.prod(dim.size for dim in tensor.tensor_shape.dim)):
        size = shift = 0
        while content[position] > 0x7F:
            size |= (content[position] & 0x7F) << shift
            position, shift = position + 1, shift + 7
        sizes.append(size | content[position] << shift)
        position += 1
    ends = list(itertools.accumulate(sizes, initial=position))
    if ends[-1] != len(content):
        raise ValueError(f"a serialised variant: expected {ends[-1]} bytes, found {len(content)}")
    return [content[start:end] for start, end in itertools.pairwise(ends)]


def _as_bytes(item: Any) -> bytes:
    return item if isinstance(item, bytes) else str(item).encode()


# --- partitioned variables ---


def _key(table: dict[bytes, tensor_bundle_pb2.BundleEntryProto], tensor: BundleTensor, array: Any) -> bytes:
    """The key of a tensor or slice. A slice is also added to the entry of its whole tensor."""
    name = tensor.name.encode()
    *sizes, last = tensor.spec.split(" ")
    whole = [int(size) for size in sizes]
    if list(array.shape) == whole or not tensor.spec:
        return name
    extents = [None if one == "-" else tuple(map(int, one.split(","))) for one in last.split(":")]
    entry = table.setdefault(name, _entry(tensor.dtype, whole))
    if not entry.slices and entry.size:
        raise ValueError(f"two tensors of the name {tensor.name!r}, one of them whole")
    entry.slices.append(
        tensor_slice_pb2.TensorSliceProto(
            extent=[
                tensor_slice_pb2.TensorSliceProto.Extent()
                if one is None
                else tensor_slice_pb2.TensorSliceProto.Extent(start=one[0], length=one[1])
                for one in extents
            ]
        )
    )
    # An order-preserving code keeps the slices of one tensor together: 0, the name, the rank, and the pairs. The code
    # escapes the bytes 0 and 0xFF, but no name that TensorFlow accepts contains them.
    key = b"\0" + name + b"\0\1"
    rank = len(extents)
    key += bytes([(rank.bit_length() + 7) // 8]) + rank.to_bytes((rank.bit_length() + 7) // 8, "big")
    return key + b"".join(_ordered(number) for one in extents for number in (one or (0, -1)))


def _ordered(number: int) -> bytes:
    """A signed integer as bytes that sort like the numbers. The leading bits of the first byte give the length."""
    length = (number if number >= 0 else ~number).bit_length() // 7 + 1
    if length > 8:
        raise ValueError(f"expected the bounds of a slice to be below 2**55, found {number}")
    ones = (0xFF << (8 - length)) & 0xFF
    coded = bytearray(number.to_bytes(length, "big", signed=True))
    coded[0] ^= ones
    return bytes(coded)
