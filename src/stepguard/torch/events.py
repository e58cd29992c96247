"""The records of a run in a TensorBoard event file, through the program's SummaryWriter or one of our own."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping
from typing import Any

from stepguard.torch import random_states

_log = logging.getLogger(__name__)

_opened = itertools.count()


def open_writer(logdir: str) -> Any:
    """A SummaryWriter for ``logdir``; ``None``, with a warning, where the tensorboard package is not installed."""
    # Its import draws random numbers (so does TensorFlow's, which it loads where there is one), and a program that has
    # seeded its streams before would train otherwise than without a supervisor.
    with random_states.preserved():
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            _log.warning("no summaries are written: %s; pip install tensorboard", error)
            return None
        # The names of event files count whole seconds: the suffix keeps two of them apart.
        return SummaryWriter(log_dir=logdir, filename_suffix=f".{os.getpid()}.{next(_opened)}")


def as_number(value: Any) -> float:
    """A number, or a tensor of one element, as a number. One on a GPU is waited for."""
    return float(value.item() if hasattr(value, "item") else value)


class TorchEvents:
    """The event log over a ``torch.utils.tensorboard.SummaryWriter``, or anything that has its methods."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        # A SummaryWriter that is written to after it was closed opens a new file, which nobody would close.
        self._is_open = True

    def started(self, step: int) -> None:
        """The session log record START: TensorBoard drops what an earlier run wrote for this step and later ones.

        A run that goes on from step 1,200 does the steps after it once more, and without this the curve of the run
        that was killed at 1,350 would lie under the new one.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._add(Event(step=step, file_version="brain.Event:2"))
        self._add(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def checkpointed(self, step: int | None, path: str) -> None:
        """The session log record CHECKPOINT, with the directory that was really written."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._add(Event(step=step, session_log=SessionLog(status=SessionLog.CHECKPOINT, checkpoint_path=path)))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """One value of one curve."""
        if self._is_open:
            self.writer.add_scalar(tag, value, step)

    def summary(self, values: Mapping[str, Any], step: int) -> None:
        """One value of each of some curves: numbers, or tensors of one element."""
        for tag, value in values.items():
            self.scalar(tag, as_number(value), step)

    def stopped(self) -> None:
        """The session log record STOP."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._add(Event(session_log=SessionLog(status=SessionLog.STOP)))

    def close(self) -> None:
        """Close the writer; what comes later, from a write that was given up, is not written."""
        self._is_open = False
        self.writer.close()

    def reopen(self) -> None:
        """Let the writer be written to again: it then opens a new file."""
        self._is_open = True

    def _add(self, event: Any) -> None:
        # A writer of another make that has no such file takes the curves, and goes without the records.
        get = getattr(self.writer, "_get_file_writer", None)
        if get is not None and self._is_open:
            get().add_event(event, event.step or None)
