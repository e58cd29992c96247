"""TensorBoard's event files, written without TensorFlow, TensorBoard or a thread.

A record is one append to the file, which the system keeps in one piece, so threads need no lock and a kill loses
nothing. The format is that of TensorFlow's record files (length, its checksum, content, its checksum), of which each
holds one message of ``event.proto``.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

from stepguard.words import logger

_log = logger(__name__)

_opened = itertools.count()

# After a disk error, a new file is opened at the next checkpoint, or after this time.
_RETRY_SECS = 60.0
_START, _STOP, _CHECKPOINT = 1, 2, 3


class EventFile:
    """The event log of a run: curves, and the records of its own life. After a disk error the curves have a gap."""

    def __init__(self, logdir: str) -> None:
        self._logdir = logdir
        self._descriptor: int | None = None
        self._is_open = True
        # The time of the next try to open a file, on the clock of time.monotonic; None while the disk works.
        self._retry_at: float | None = None
        # The step of a start of which no file has the record.
        self._start_due: int | None = None

    def started(self, step: int) -> None:
        """Write the session log record START. TensorBoard then drops earlier values for this step and later steps."""
        self._start_due = step
        self._write(b"")

    def checkpointed(self, step: int | None, path: str) -> None:
        """Write the session log record CHECKPOINT, with the directory that was written."""
        if self._retry_at is not None:
            # A checkpoint was written, so the disk works again: retry now.
            self._retry_at = 0.0
        self._write(_event(step, 7, _session_log(_CHECKPOINT, path)))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Write one value of one curve."""
        self.summary({tag: value}, step)

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """Write one value for each of several curves."""
        self._write(_event(step, 5, b"".join(_bytes(1, _value(tag, value)) for tag, value in values.items())))

    def flush(self) -> None:
        """Do nothing: each record is with the system already."""

    def stopped(self) -> None:
        """Write the session log record STOP."""
        self._write(_event(None, 7, _session_log(_STOP)))

    def close(self) -> None:
        """Close the file. Later records, from a write that was given up, are dropped."""
        self._is_open = False
        self._drop_file()

    def reopen(self) -> None:
        """Allow writing again, to a new file."""
        self._is_open = True
        if self._retry_at is not None:
            self._retry_at = 0.0

    def _write(self, message: bytes) -> None:
        if not self._is_open or (self._retry_at is not None and time.monotonic() < self._retry_at):
            return
        try:
            if self._descriptor is None:
                self._open_file()
            step, self._start_due = self._start_due, None
            if step is not None:
                # For this version of the format TensorBoard heeds the record START.
                self._append(_event(step, 3, b"brain.Event:2"))
                self._append(_event(step, 7, _session_log(_START)))
            if message:
                self._append(message)
        except OSError as error:
            self._lose_file(error)

    def _open_file(self) -> None:
        # The time is in whole seconds, so two files of one second differ in the last number.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(_opened)}"
        path = os.path.join(self._logdir, name)
        os.makedirs(self._logdir, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._append(_event(None, 3, b"brain.Event:2"))
        if self._retry_at is not None:
            self._retry_at = None
            _log.info("the event log is written again, to a new file in %s", self._logdir)

    def _append(self, message: bytes) -> None:
        length = struct.pack("<Q", len(message))
        record = length + _checksum(length) + message + _checksum(message)
        if self._descriptor is not None and os.write(self._descriptor, record) < len(record):
            # A reader stops at a part of a record.
            raise OSError(f"a record of {len(record)} bytes was written in part: the disk is full")

    def _lose_file(self, error: OSError) -> None:
        was_known, self._retry_at = self._retry_at is not None, time.monotonic() + _RETRY_SECS
        if not was_known:
            _log.warning(
                "the event log in %s could not be written (%s: %s): its curves have a gap from here on, and training "
                "goes on; the log is tried again at the next checkpoint, or in %g s",
                self._logdir,
                type(error).__name__,
                error,
                _RETRY_SECS,
            )
        self._drop_file()

    def _drop_file(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class WriterEvents:
    """The event log over a writer that the program has made, such as tensorboardX's. Its errors are raised.

    It gets the curves, without the records of the run's life.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        # A write to a closed writer would open a new file, which nobody would close.
        self._is_open = True

    def started(self, step: int) -> None:
        """Do nothing."""

    def checkpointed(self, step: int | None, path: str) -> None:  # noqa: ARG002 - as in the protocol
        """Flush, so that the curves are as long as the checkpoint."""
        self.flush()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Write one value of one curve."""
        if self._is_open:
            self.writer.add_scalar(tag, value, step)

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """Write one value for each of several curves."""
        for tag, value in values.items():
            self.scalar(tag, value, step)

    def flush(self) -> None:
        """Flush the writer, if it can."""
        flush = getattr(self.writer, "flush", None)
        if flush is not None and self._is_open:
            flush()

    def stopped(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close the writer."""
        self._is_open = False
        self.writer.close()

    def reopen(self) -> None:
        """Allow writing again; the writer then opens a new file."""
        self._is_open = True


def as_numbers(values: Any, where: str) -> dict[str, float]:
    """Convert numbers, and arrays of one element, to floats. This waits for arrays that are still computed.

    Raises:
        TypeError: ``values``, given to ``where``, is no mapping, or a value is no number; the message names its curve.
    """
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{where}: expected numbers by the names of their curves, found {type(values).__name__}: {values!r:.80}"
        )
    return {tag: _as_number(tag, value, where) for tag, value in values.items()}


def _as_number(tag: str, value: Any, where: str) -> float:
    if getattr(value, "size", 1) != 1:
        raise TypeError(
            f"{where}: expected a number for the curve {tag!r}, found an array of shape {list(value.shape)}; take its "
            f"mean, say"
        )
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{where}: expected a number for the curve {tag!r}, found {type(value).__name__}: {value!r:.80}"
        ) from error


# --- the format ---


def _event(step: int | None, field: int, content: bytes) -> bytes:
    """A message Event: field 1 is the time, field 2 the step."""
    numbered = b"" if not step else b"\x10" + _varint(step)
    return b"\x09" + struct.pack("<d", time.time()) + numbered + _bytes(field, content)


def _value(tag: str, value: float) -> bytes:
    """A message Summary.Value with a float."""
    try:
        packed = struct.pack("<f", value)
    except OverflowError:  # The number is beyond 32 bits.
        packed = struct.pack("<f", math.copysign(math.inf, value))
    return _bytes(1, tag.encode()) + b"\x15" + packed


def _session_log(status: int, path: str = "") -> bytes:
    return b"\x08" + _varint(status) + (_bytes(2, os.fsencode(path)) if path else b"")


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _table() -> list[int]:
    table = []
    for one in range(256):
        for _ in range(8):
            one = one >> 1 ^ (0x82F63B78 if one & 1 else 0)
        table.append(one)
    return table


_CRC32C = _table()


def _checksum(content: bytes) -> bytes:
    """The masked CRC-32C (Castagnoli) of TensorFlow's record files."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
