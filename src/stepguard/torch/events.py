"""Writes the records of a run to a TensorBoard event file, by the program's SummaryWriter or by one of our own."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

from stepguard.torch.random_states import STREAMS
from stepguard.words import logger

_log = logger(__name__)

_opened = itertools.count()

# After a disk error, a log of our own is opened again at the next checkpoint, or after this time.
_RETRY_SECS = 60.0
_PROBE_BYTES = 1 << 16


def open_writer(logdir: str) -> Any:
    """A SummaryWriter for ``logdir``; ``None``, with a warning, if the tensorboard package is not installed."""
    # The import draws random numbers: without `preserved`, a program that has seeded its streams would train otherwise
    # with a supervisor.
    with STREAMS.preserved():
        _leave_tensorflow_out()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            _log.warning("no summaries are written: %s; pip install tensorboard", error)
            return None
        # The names of event files count whole seconds: the suffix keeps two of them apart.
        options = {"log_dir": logdir, "filename_suffix": f".{os.getpid()}.{next(_opened)}"}
        return _late(SummaryWriter, _storage_errors())(**options)


def _leave_tensorflow_out() -> None:
    """Have tensorboard use its own small file layer: it would import TensorFlow if that is installed.

    That takes longer than PyTorch itself, at every start, for a local file. A program that has imported TensorFlow has
    it anyway, and its tensorboard as it was.
    """
    if "tensorflow" not in sys.modules:
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))


def _late(kind: type[Any], storage_errors: tuple[type[BaseException], ...]) -> type[Any]:
    """A kind of SummaryWriter whose file is opened when the disk takes it.

    Until then its ``file_writer`` is None, and what the program itself writes is a gap in its curves.
    """

    class LateWriter(kind):
        file_writer: Any
        all_writers: Any
        open_error: BaseException | None = None

        def _get_file_writer(self) -> Any:
            if self.file_writer is None and _no_room(self.log_dir) is not None:
                return _Nowhere()
            try:
                return super()._get_file_writer()
            except storage_errors as error:
                # Full since it was looked at, or at a place where no file can be.
                self.open_error, self.file_writer, self.all_writers = error, None, None
                return _Nowhere()

    return LateWriter


class _Nowhere:
    """An event file on a disk that is full."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _no_room(logdir: str) -> OSError | None:
    """Why the disk takes nothing now; None where it does, or where that is no matter of room."""
    try:
        with tempfile.TemporaryFile(dir=logdir) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        return error if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else None
    return None


def _no_space(logdir: str) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), logdir)


class TorchEvents:
    """The event log over a ``torch.utils.tensorboard.SummaryWriter``, or anything that has its methods.

    ``is_own`` says that Stepguard, and not the program, has made the writer. After a disk error of such a writer
    training goes on, and the curves have a gap. Errors of a writer that the program made are raised.
    """

    def __init__(self, writer: Any, *, is_own: bool = False) -> None:
        self.writer = writer
        # A write to a closed SummaryWriter would open a new file, which nobody would close.
        self._is_open = True
        self._passed_over = _storage_errors() if is_own else ()
        # The time of the next try to open a file, on the clock of time.monotonic; None while a file is open.
        self._retry_at: float | None = None
        self._opening = threading.RLock()
        # The step of a start of which no file has the record.
        self._start_due: int | None = None
        if is_own and writer.file_writer is None:
            self._lose_file(writer.open_error or _no_room(writer.log_dir) or _no_space(writer.log_dir))
        elif is_own:
            self._quieten()

    def started(self, step: int) -> None:
        """Write the session log record START. TensorBoard then drops earlier values for this step and later steps.

        A run that resumes at step 1,200 does the later steps again. Without the record, the curve of the run that was
        killed at step 1,350 would appear under the new curve.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if self._retry_at is not None:
            self._start_due = step
            return
        self._start_due = None
        self._add(Event(step=step, file_version="brain.Event:2"))
        self._add(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def checkpointed(self, step: int | None, path: str) -> None:
        """Write the session log record CHECKPOINT, with the directory that was written."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if self._retry_at is not None:
            # A checkpoint was written, so the disk works again: retry now.
            self._retry_at = 0.0
        self._add(Event(step=step, session_log=SessionLog(status=SessionLog.CHECKPOINT, checkpoint_path=path)))
        self.flush()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Write one value of one curve."""
        self._write(lambda: self.writer.add_scalar(tag, value, step))

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """Write one value for each of several curves."""
        for tag, value in values.items():
            self.scalar(tag, value, step)

    def stopped(self) -> None:
        """Write the session log record STOP."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._add(Event(session_log=SessionLog(status=SessionLog.STOP)))

    def close(self) -> None:
        """Close the writer. Later records, from a write that was given up, are dropped."""
        self._is_open = False
        try:
            self.writer.close()
        except self._passed_over as error:
            self._lose_file(error)

    def reopen(self) -> None:
        """Allow writing again; the writer then opens a new file."""
        self._is_open = True
        if self._retry_at is not None:
            self._retry_at = 0.0

    def _add(self, event: Any) -> None:
        # A writer of another kind may have no file writer; then it gets the curves without the session log records.
        get = getattr(self.writer, "_get_file_writer", None)
        if get is not None:
            self._write(lambda: get().add_event(event, event.step or None))

    def flush(self) -> None:
        """Hand all records so far to the system."""
        # The writer keeps records for up to two minutes, and a SIGKILL loses them: then a checkpoint has no curves.
        flush = getattr(self.writer, "flush", None)
        if flush is not None:
            self._write(flush)

    # --- a disk that fails ---

    def _write(self, add: Callable[[], object]) -> None:
        if not self._is_open or (self._retry_at is not None and time.monotonic() < self._retry_at):
            return
        try:
            if self._passed_over and self.writer.file_writer is None:
                # The lock is held while the file is opened; else a step and a checkpoint could open two files.
                with self._opening:
                    if self.writer.file_writer is None:
                        self._open_file()
            add()
        except self._passed_over as error:
            self._lose_file(error)

    def _open_file(self) -> None:
        if self._retry_at is not None:
            # Not with the event file itself: where it cannot be written, a thread dies and prints why.
            full = _no_room(self.writer.log_dir)
            if full is not None:
                raise full
        self.writer._get_file_writer()
        if self.writer.file_writer is None:
            raise self.writer.open_error or _no_space(self.writer.log_dir)
        self._quieten()
        if self._retry_at is not None:
            self._retry_at = None
            if self._start_due is not None:
                self.started(self._start_due)
            _log.info("the event log is written again, to a new file in %s", self.writer.log_dir)

    def _lose_file(self, error: BaseException) -> None:
        was_known, self._retry_at = self._retry_at is not None, time.monotonic() + _RETRY_SECS
        if not was_known:
            _log.warning(
                "the event log in %s could not be written (%s: %s): its curves have a gap from here on, and training "
                "goes on; the log is tried again at the next checkpoint, or in %g s",
                self.writer.log_dir,
                type(error).__name__,
                error,
                _RETRY_SECS,
            )
        file_writer, self.writer.file_writer, self.writer.all_writers = self.writer.file_writer, None, None
        if file_writer is not None:
            with contextlib.suppress(*self._passed_over):
                file_writer.close()

    def _quieten(self) -> None:
        """Keep the thread that writes the file from printing its first error, which kills it and which we report."""
        with contextlib.suppress(AttributeError):  # The thread has no public name; if not found, the error is printed.
            thread = self.writer.file_writer.event_writer._async_writer._worker
            thread._invoke_excepthook = lambda _: None


def _storage_errors() -> tuple[type[BaseException], ...]:
    """The errors that the event file raises if the disk fails: also TensorFlow's, whose file system it may use."""
    from tensorboard.compat import tf

    named = getattr(tf.errors, "OpError", None)
    return (OSError,) if named is None else (OSError, named)
