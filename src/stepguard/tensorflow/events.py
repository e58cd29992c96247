"""The records of a run in a TensorBoard event file, through the program's summary writer or one of our own."""

from __future__ import annotations

import itertools
import os
from typing import Any

import tensorflow as tf

_v1 = tf.compat.v1


_opened = itertools.count()


def open_writer(logdir: str) -> Any:
    """An event file writer for ``logdir``, which is created if missing.

    TensorFlow names event files by whole seconds, and a writer truncates a file that has its name. The suffix keeps
    two writers of the same second apart. The writer's thread hands each event to the system as soon as it can, so that
    a kill loses at most the events of the last moment.
    """
    return _v1.summary.FileWriter(logdir, flush_secs=0, filename_suffix=f".{os.getpid()}.{next(_opened)}")


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
        """Write the session log record CHECKPOINT, with the prefix of the files that were written."""
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
