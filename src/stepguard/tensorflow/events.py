"""The records of a run in a TensorBoard event file, through the program's summary writer or one of our own."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from stepguard.disk import files
from stepguard.errors import described
from stepguard.words import logger

_log = logger(__name__)
_v1 = tf.compat.v1
_FileWriter: Any = _v1.summary.FileWriter

# What TensorFlow raises when the disk fails: its event writer knows no better than RuntimeError.
_STORAGE_ERRORS = (OSError, tf.errors.OpError, RuntimeError)
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})
_RETRY_SECS = 60.0
_PROBE_BYTES = 1 << 16

_opened = itertools.count()


def open_writer(logdir: str) -> Any:
    """An event file writer for ``logdir``, which is created if missing.

    A disk that is full, also now, costs curves and not the run: the file is opened when there is room.
    """
    return FileWriter(_EventFile(logdir))


class FileWriter(_FileWriter):
    """A FileWriter whose file is an `_EventFile`."""

    def __init__(self, file: _EventFile) -> None:
        self._closed = False
        # What a FileWriter adds to its base is only that it opens the file.
        super(_FileWriter, self).__init__(file)

    def retry_soon(self) -> None:
        """There is room again: a checkpoint was written."""
        self.event_writer.retry_soon()


class _EventFile:
    """An event file that is opened anew when the disk has failed it: at the next checkpoint, or after a while.

    Any thread.

    What comes while there is none is a gap in the curves. Only the record of the start and the graph are kept for the
    next file, unless one has them.
    """

    def __init__(self, logdir: str) -> None:
        self._logdir = logdir
        self._file: Any = None
        self._is_closed = False
        self._opening = threading.RLock()
        # On the clock of time.monotonic; None while the disk has not failed.
        self._retry_at: float | None = None
        self._due: list[Any] = []
        self._open()

    def get_logdir(self) -> str:
        """The directory of the file."""
        return self._logdir

    def add_event(self, event: Any) -> None:
        """Write a record, at some time."""
        if self._is_closed:
            return
        with self._opening:
            if self._file is None:
                self._reopen()
            if self._file is None:
                if event.HasField("graph_def") or event.HasField("meta_graph_def") or _is_start(event):
                    self._due.append(event)
                return
            file = self._file
        self._do(file, lambda: file.add_event(event))

    def flush(self) -> None:
        """Have the disk take all records so far."""
        if (file := self._file) is not None:
            self._do(file, file.flush)

    def close(self) -> None:
        """End the file."""
        self._is_closed = True
        self._due.clear()
        file, self._file = self._file, None
        if file is not None:
            self._do(file, file.close)

    def reopen(self) -> None:
        """What comes next goes into a new file, if the last was closed."""
        self._is_closed = False

    def retry_soon(self) -> None:
        """Try the disk again with the next record, if it had failed."""
        if self._retry_at is not None:
            self._retry_at = 0.0

    def _do(self, file: Any, call: Callable[[], None]) -> None:
        try:
            call()
        except _STORAGE_ERRORS as error:
            self._lose(file, error)

    def _reopen(self) -> None:
        if self._retry_at is not None and (time.monotonic() < self._retry_at or _no_room(self._logdir) is not None):
            return
        self._open()
        file, due, self._due = self._file, self._due, []
        if file is not None and self._retry_at is not None:
            self._retry_at = None
            _log.info("the event log is written again, to a new file in %s", self._logdir)
        for event in due:
            self._do(file, functools.partial(file.add_event, event))

    def _open(self) -> None:
        # The names of event files count whole seconds, and a writer truncates a file of its name: the suffix keeps two
        # that are opened within one second apart. The writer's thread hands each event to the system as soon as it can,
        # so that a process that is killed has lost none of those that it wrote a moment before.
        suffix = f".{os.getpid()}.{next(_opened)}"
        try:
            with tf.Graph().as_default():
                self._file = _v1.summary.FileWriter(self._logdir, flush_secs=0, filename_suffix=suffix)
        except _STORAGE_ERRORS as error:
            if self._retry_at is None and "://" in self._logdir:
                raise
            # There may be room again, a moment later.
            self._lose(None, _no_room(self._logdir) or error)

    def _lose(self, file: Any, error: BaseException) -> None:
        was_known, self._retry_at = self._retry_at is not None, time.monotonic() + _RETRY_SECS
        with self._opening:
            if self._file is file:
                self._file = None
        if not was_known:
            _log.warning(
                "the event log in %s could not be written (%s: %s): its curves have a gap from here on, and training "
                "goes on; the log is tried again at the next checkpoint, or in %g s",
                self._logdir,
                type(error).__name__,
                error,
                _RETRY_SECS,
            )


def _is_start(event: Any) -> bool:
    return bool(event.HasField("session_log") and event.session_log.status == _v1.SessionLog.START)


def _no_room(logdir: str) -> OSError | None:
    """Why the disk takes nothing now; None where it does, or where that is no matter of room."""
    try:
        with tempfile.TemporaryFile(dir=logdir) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        return error if error.errno in _NO_ROOM else None
    return None


def write_graph(graph: Any, logdir: str) -> bool:
    """Write ``graph.pbtxt``, which no restart needs; if that fails, warn. ``False`` if only room for it is missing."""
    definition = graph.as_graph_def(add_shapes=True)
    try:
        tf.io.write_graph(definition, logdir, "graph.pbtxt")
    except _STORAGE_ERRORS as error:
        if "://" in logdir:
            raise
        # What it has written of it so far.
        for left in Path(logdir).glob("graph.pbtxt.tmp*"):
            files.remove_quietly(left)
        full = _no_room(logdir)
        if full is not None:
            _log.warning("graph.pbtxt is written at the next checkpoint, since there is no room for it: %s", full)
            return False
        _log.warning("graph.pbtxt is not written, and training goes on without it: %s", described(error))
    return True


class TensorFlowEvents:
    """The event log over a ``tf.compat.v1.summary.FileWriter`` or anything that has its methods."""

    def __init__(self, writer: Any, *, is_ours: bool) -> None:
        self.writer = writer
        self._is_ours = is_ours
        self._graph_is_in = False
        self._is_open = True

    def started(self, step: int) -> None:
        """Write the session log record START."""
        self.writer.add_session_log(_v1.SessionLog(status=_v1.SessionLog.START), step)
        self._flush()

    def checkpointed(self, step: int | None, path: str) -> None:
        """The session log record CHECKPOINT, with the prefix that was really written."""
        if self._is_ours:
            self.writer.retry_soon()
        if step is not None:
            record = _v1.SessionLog(status=_v1.SessionLog.CHECKPOINT, checkpoint_path=path)
            self.writer.add_session_log(record, step)
            self._flush()

    def _flush(self) -> None:
        # SIGKILL loses the events in memory. A writer that the program made is flushed by the program.
        if self._is_ours:
            self.writer.flush()

    def flush(self) -> None:
        """Hand all events so far to the system, also for a writer that the program made."""
        if self._is_open:
            self.writer.flush()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Write one value of one curve."""
        self.writer.add_summary(_v1.Summary(value=[_v1.Summary.Value(tag=tag, simple_value=value)]), step)

    def summary(self, summary: Any, step: int | None) -> None:
        """Write a Summary proto, or the bytes of one."""
        self.writer.add_summary(summary, step)

    def graph(self, graph: Any, meta_graph: Any) -> None:
        """Write the graph and the meta graph, once into each event file."""
        if not self._graph_is_in:
            self.writer.add_graph(graph)
            self.writer.add_meta_graph(meta_graph)
            self._graph_is_in = True

    def stopped(self) -> None:
        """Write the session log record STOP. After :meth:`close` (a second stop of the program) do nothing."""
        if not self._is_open:
            return
        self.writer.add_session_log(_v1.SessionLog(status=_v1.SessionLog.STOP))

    def close(self) -> None:
        """Close the writer. The next event file gets the graph again."""
        if self._is_open:
            self.writer.close()
        self._is_open = False
        self._graph_is_in = False

    def reopen(self) -> None:
        """Open a new event file if the last one was closed."""
        self.writer.reopen()
        self._is_open = True
