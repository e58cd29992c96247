"""Notices a server that is silent rather than dead: stopped, or cut off.

The protocol: the heartbeat's thread sends a ping through a courier and waits for the answer. Its ``give_up`` ends that
wait after ``timeout_secs`` of silence, or when :meth:`Heartbeat.end` was called; between two pings the thread waits on
the flag ``_ended``, which ``end`` sets. No deadlock is possible: the thread holds no lock, each of its waits has a
limit, it closes its session on yet another thread for at most 1 s, and :meth:`Heartbeat.join` has a timeout and does
not wait when the heartbeat's own thread calls it (from ``on_lost``). Nothing here is on disk.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from stepguard.tensorflow.cluster import tasks
from stepguard.tensorflow.cluster.calls import ReleasableCalls
from stepguard.words import logger

_log = logger(__name__)
_v1 = tf.compat.v1

_LONGEST_INTERVAL_SECS = 5.0
# Silence is the sum of slices of this length in which the thread was awake. A process that was stopped, or that had no
# processor, did not listen during that time and must not blame its peers for it.
_SLICE_SECS = 0.05
_CLOSE_SECS = 1.0


class Heartbeat:
    """Pings one task at intervals, and reports when no answer has come for ``timeout_secs``.

    It has a session of its own, on a graph of its own with one empty operation. So it does not wait for the runs of
    the program, and they do not wait for it. ``on_lost(error)`` is called at most once, on the heartbeat's thread.
    """

    def __init__(self, master: str, task: str, timeout_secs: float, on_lost: Callable[[BaseException], None]) -> None:
        self._task = task
        self._timeout_secs = timeout_secs
        self._interval_secs = min(timeout_secs / 4, _LONGEST_INTERVAL_SECS)
        self._on_lost = on_lost
        self._ended = threading.Event()
        graph = tf.Graph()
        with graph.as_default(), tf.device(f"{task}/device:CPU:0" if "/task:" in task else task):
            self._ping = tf.no_op(name="ping")
        graph.finalize()
        self._calls = ReleasableCalls(graph.as_default)
        config = _v1.ConfigProto(device_filters=[task] if task else [])
        self._session: Any = _v1.Session(master, graph=graph, config=config)
        self._thread = threading.Thread(target=self._run, name=f"stepguard-heartbeat-{task.strip('/')}", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Tell the thread to end soon; do not wait for it."""
        self._ended.set()

    def join(self, timeout_secs: float) -> None:
        """Wait for the thread to end."""
        if self._thread is not threading.current_thread():
            self._thread.join(max(0.0, timeout_secs))

    def _run(self) -> None:
        try:
            while True:
                lost = self._lost()
                if lost is not None:
                    self._on_lost(lost)
                if lost is not None or self._ended.wait(self._interval_secs):
                    return
        finally:
            # Closing also calls the task and may wait for ever, so it has a thread of its own.
            closing = threading.Thread(target=self._session.close, name="stepguard-close", daemon=True)
            # Some versions of Python cannot start a thread while the process ends.
            with contextlib.suppress(RuntimeError):
                closing.start()
                closing.join(_CLOSE_SECS)
            self._calls.close()

    def _lost(self) -> BaseException | None:
        """Ping until an answer comes. Return the error if none came in time or if the server was restarted."""
        silent_secs = self._interval_secs
        problem = ""

        def give_up() -> BaseException | None:
            nonlocal silent_secs
            silent_secs += _SLICE_SECS
            return TimeoutError() if silent_secs >= self._timeout_secs or self._ended.is_set() else None

        while True:
            try:
                self._calls.call(lambda: self._session.run(self._ping), give_up)
                return None
            except TimeoutError:
                pass
            except (tf.errors.AbortedError, tf.errors.FailedPreconditionError) as error:
                # The program's runs raise AbortedError too; a program that catches it goes on, whichever comes first.
                return self._lost_by(tf.errors.AbortedError, f"was started again: {tasks.first_line(error)}")
            except tf.errors.OpError as error:
                problem = f" ({tasks.first_line(error)})"
                _log.debug("%s: %s", self._task, error)
            if self._ended.wait(_SLICE_SECS):
                return None
            silent_secs += _SLICE_SECS
            if silent_secs >= self._timeout_secs:
                what = f"gave no answer for {self._timeout_secs:g} s{problem}"
                return self._lost_by(tf.errors.UnavailableError, what)

    def _lost_by(self, error_type: Any, what: str) -> BaseException:
        error: BaseException = error_type(None, None, f"{self._task or 'the master'} {what}: its session is lost")
        return error
