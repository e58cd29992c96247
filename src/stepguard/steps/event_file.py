"""TensorBoard's event files, written without TensorFlow and without a thread.

Records and messages are TensorBoard's own. A record is one append to the file, which the system keeps in one piece, so
threads need a lock only to open a file, and a kill loses nothing.
"""

from __future__ import annotations

import importlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepguard.disk.appended_file import AppendedFile
from stepguard.steps.random_streams import RandomStreams
from stepguard.words import logger

_log = logger(__name__)

_opened = itertools.count()

# After a disk error, a new file is opened at the next checkpoint, or after this time.
_RETRY_SECS = 60.0
_VERSION = "brain.Event:2"


def event_file(logdir: str, streams: RandomStreams) -> EventFile | None:
    """An event file in ``logdir``; ``None``, with a warning, if the tensorboard package is not installed."""
    try:
        # An import may draw random numbers, and the program may have seeded its streams already.
        with streams.preserved():
            for name in ("compat.proto.event_pb2", "summary.writer.record_writer"):
                importlib.import_module(f"tensorboard.{name}")
    except ImportError as error:
        _log.warning("no summaries are written: %s; pip install tensorboard", error)
        return None
    return EventFile(logdir)


class EventFile:
    """The event log of a run: curves, and the records of its own life. After a disk error the curves have a gap."""

    def __init__(self, logdir: str) -> None:
        self._logdir = logdir
        self._file: AppendedFile | None = None
        self._opening = threading.Lock()
        self._is_open = True
        # The time of the next try to open a file, on the clock of time.monotonic; None while the disk works.
        self._retry_at: float | None = None
        # The step of a start of which no file has the record.
        self._start_due: int | None = None

    def started(self, step: int) -> None:
        """Write the session log record START. TensorBoard then drops earlier values for this step and later steps."""
        self._start_due = step
        self._write()

    def checkpointed(self, step: int | None, path: str) -> None:
        """Write the session log record CHECKPOINT, with the directory that was written."""
        if self._retry_at is not None:
            # A checkpoint was written, so the disk works again: retry now.
            self._retry_at = 0.0
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._write(step=step, session_log=SessionLog(status=SessionLog.CHECKPOINT, checkpoint_path=path))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Write one value of one curve."""
        self.summary({tag: value}, step)

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """Write one value for each of several curves."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        shown = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=Summary(value=shown))

    def flush(self) -> None:
        """Do nothing: each record is with the system already."""

    def stopped(self) -> None:
        """Write the session log record STOP."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._write(session_log=SessionLog(status=SessionLog.STOP))

    def close(self) -> None:
        """Close the file. Later records, from a write that was given up, are dropped."""
        self._is_open = False
        self._file = None

    def reopen(self) -> None:
        """Allow writing again, to a new file."""
        self._is_open = True
        if self._retry_at is not None:
            self._retry_at = 0.0

    def _write(self, **event: Any) -> None:
        """Append a message Event with these fields, after what is due before it."""
        if not self._is_open or (self._retry_at is not None and time.monotonic() < self._retry_at):
            return
        try:
            with self._opening:
                file = self._file = self._file or self._opened()
                self._write_start(file)
            if event:
                _append(file, **event)
        except OSError as error:
            self._lose_file(error)

    def _opened(self) -> AppendedFile:
        # The time is in whole seconds, so two files of one second differ in the last number.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(_opened)}"
        os.makedirs(self._logdir, exist_ok=True)
        file = AppendedFile(Path(self._logdir, name), keep=0)
        _append(file, file_version=_VERSION)
        if self._retry_at is not None:
            self._retry_at = None
            _log.info("the event log is written again, to a new file in %s", self._logdir)
        return file

    def _write_start(self, file: AppendedFile) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        step = self._start_due
        if step is not None:
            # For this version of the format TensorBoard heeds the record START.
            _append(file, step=step, file_version=_VERSION)
            _append(file, step=step, session_log=SessionLog(status=SessionLog.START))
            self._start_due = None

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
        self._file = None


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


def _append(file: AppendedFile, **event: Any) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    RecordWriter(_Appending(file)).write(Event(wall_time=time.time(), **event).SerializeToString())


class _Appending:
    """The file of a TensorBoard record writer, in which each record is one write."""

    def __init__(self, file: AppendedFile) -> None:
        self._file = file

    def write(self, record: bytes) -> None:
        self._file.append(record)
