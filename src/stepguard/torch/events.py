"""The records of a run in a TensorBoard event file, through the program's SummaryWriter or one of our own."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from stepguard.torch.random_states import STREAMS

_log = logging.getLogger(__name__)

_opened = itertools.count()

# After the disk has failed a log of our own it is opened anew at the next checkpoint, or else after so long.
_RETRY_SECS = 60.0
_PROBE_BYTES = 1 << 16


def open_writer(logdir: str) -> Any:
    """A SummaryWriter for ``logdir``; ``None``, with a warning, where the tensorboard package is not installed."""
    # Its import draws random numbers (so does TensorFlow's, which it loads where there is one), and a program that has
    # seeded its streams before would train otherwise than without a supervisor.
    with STREAMS.preserved():
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            _log.warning("no summaries are written: %s; pip install tensorboard", error)
            return None
        # The names of event files count whole seconds: the suffix keeps two of them apart.
        return SummaryWriter(log_dir=logdir, filename_suffix=f".{os.getpid()}.{next(_opened)}")


def check_values(values: Any, where: str) -> None:
    """Raises TypeError if ``values``, given to ``where``, are no numbers by the names of their curves."""
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{where}: expected numbers by the names of their curves, found {type(values).__name__}: {values!r:.80}"
        )


def as_numbers(values: Mapping[str, Any], where: str) -> dict[str, float]:
    """Numbers, or tensors of one element, as numbers. Those on a GPU are waited for.

    Raises:
        TypeError: one of them is none; the message names its curve, and ``where`` it was given.
    """
    return {tag: _as_number(tag, value, where) for tag, value in values.items()}


def _as_number(tag: str, value: Any, where: str) -> float:
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise TypeError(
            f"{where}: expected a number for the curve {tag!r}, found a tensor of shape {list(value.shape)}; take its "
            f"mean, say"
        )
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{where}: expected a number for the curve {tag!r}, found {type(value).__name__}: {value!r:.80}"
        ) from error


class TorchEvents:
    """The event log over a ``torch.utils.tensorboard.SummaryWriter``, or anything that has its methods.

    ``is_own`` says that the program has not made the writer itself. When the disk fails such a one, training goes on
    and the curves have a gap; errors of the program's own writer are raised to the program.
    """

    def __init__(self, writer: Any, *, is_own: bool = False) -> None:
        self.writer = writer
        # A SummaryWriter that is written to after it was closed opens a new file, which nobody would close.
        self._is_open = True
        self._passed_over = _storage_errors() if is_own else ()
        # When the file is to be opened anew, on the clock of time.monotonic; None while there is one.
        self._retry_at: float | None = None
        self._opening = threading.Lock()
        if is_own:
            self._quieten()

    def started(self, step: int) -> None:
        """The session log record START: TensorBoard drops what an earlier run wrote for this step and later ones.

        A run that goes on from step 1,200 does the steps after it once more, and without this the curve of the run
        that was killed at 1,350 would lie under the new one.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._add(Event(step=step, file_version="brain.Event:2"))
        self._add(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def checkpointed(self, step: int | None, path: str) -> None:
        """The session log record CHECKPOINT, with the directory that was really written."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if self._retry_at is not None:
            # There is room again.
            self._retry_at = 0.0
        self._add(Event(step=step, session_log=SessionLog(status=SessionLog.CHECKPOINT, checkpoint_path=path)))
        self.flush()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """One value of one curve."""
        self._write(lambda: self.writer.add_scalar(tag, value, step))

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """One value of each of some curves."""
        for tag, value in values.items():
            self.scalar(tag, value, step)

    def stopped(self) -> None:
        """The session log record STOP."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._add(Event(session_log=SessionLog(status=SessionLog.STOP)))

    def close(self) -> None:
        """Close the writer; what comes later, from a write that was given up, is not written."""
        self._is_open = False
        try:
            self.writer.close()
        except self._passed_over as error:
            self._lose_file(error)

    def reopen(self) -> None:
        """Let the writer be written to again: it then opens a new file."""
        self._is_open = True
        if self._retry_at is not None:
            self._retry_at = 0.0

    def _add(self, event: Any) -> None:
        # A writer of another make that has no such file takes the curves, and goes without the records.
        get = getattr(self.writer, "_get_file_writer", None)
        if get is not None:
            self._write(lambda: get().add_event(event, event.step or None))

    def flush(self) -> None:
        """Hand what was written so far to the system."""
        # Else the writer keeps its records for up to two minutes, and SIGKILL takes the curves before a checkpoint.
        flush = getattr(self.writer, "flush", None)
        if flush is not None:
            self._write(flush)

    # --- a disk that fails ---

    def _write(self, add: Callable[[], object]) -> None:
        if not self._is_open or (self._retry_at is not None and time.monotonic() < self._retry_at):
            return
        try:
            if self._passed_over and self.writer.file_writer is None:
                # Held while the file is opened: the steps and a checkpoint would open two.
                with self._opening:
                    if self.writer.file_writer is None:
                        self._open_file()
            add()
        except self._passed_over as error:
            self._lose_file(error)

    def _open_file(self) -> None:
        if self._retry_at is not None:
            # Not with the event file itself: where it cannot be written, a thread dies and prints why.
            with tempfile.TemporaryFile(dir=self.writer.log_dir) as probe:
                probe.write(bytes(_PROBE_BYTES))
        self.writer._get_file_writer()
        self._quieten()
        if self._retry_at is not None:
            self._retry_at = None
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
        """The thread that writes the file dies of the first error, which we are told of too: not on stderr as well."""
        with contextlib.suppress(AttributeError):  # It has no public name; without it there is only more to read.
            thread = self.writer.file_writer.event_writer._async_writer._worker
            thread._invoke_excepthook = lambda _: None


def _storage_errors() -> tuple[type[BaseException], ...]:
    """What the event file raises when the disk fails it: TensorFlow's file system is used where there is one."""
    from tensorboard.compat import tf

    named = getattr(tf.errors, "OpError", None)
    return (OSError,) if named is None else (OSError, named)
