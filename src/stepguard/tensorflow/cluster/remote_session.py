"""A session on a TensorFlow server: its runs can be given up, and a silent peer is noticed."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from stepguard.tensorflow.cluster import tasks
from stepguard.tensorflow.cluster.calls import Carrier, GiveUp
from stepguard.tensorflow.cluster.server_ping import Heartbeat
from stepguard.tensorflow.session import Session

_log = logging.getLogger(__name__)
_v1 = tf.compat.v1

# Closing tells every server that the session used. One that is gone would be waited for until it comes back.
_CLOSE_SECS = 2.0
_LOST_CLOSE_SECS = 0.1
# After a stop the run of a queue runner has this many looks (of 50 ms) to end by itself.
_STOP_SLICES = 10


class _CarriedSession(tf.compat.v1.Session):
    """TensorFlow's session, with every call into the runtime made by a carrier."""

    def __init__(self, target: str = "", graph: Any = None, config: Any = None) -> None:
        self._master = target
        super().__init__(target, graph=graph, config=config)
        self._carrier = Carrier(self.graph.as_default)
        self.give_up: GiveUp | None = None
        """Asked while a run is under way: an error ends the wait for it. For the time of a preparation."""
        self._heartbeats: list[Heartbeat] = []
        self._closing: threading.Thread | None = None
        self._pid = os.getpid()
        _open.add(self)

    def run(self, fetches: Any, feed_dict: Any = None, options: Any = None, run_metadata: Any = None) -> Any:
        """Run operations and evaluate tensors, as ``tf.compat.v1.Session.run`` does. Any thread."""
        run = super().run
        return self._carrier.call(lambda: run(fetches, feed_dict, options, run_metadata), self.give_up)

    def partial_run(self, handle: Any, fetches: Any, feed_dict: Any = None) -> Any:
        """Continue a partial run."""
        run = super().partial_run
        return self._carrier.call(lambda: run(handle, fetches, feed_dict))

    def make_callable(self, fetches: Any, feed_list: Any = None, accept_options: bool = False) -> Callable[..., Any]:
        """A function that runs ``fetches``, as ``tf.compat.v1.Session.make_callable`` does."""
        if feed_list:
            # TensorFlow makes one that calls `run`, which is carried already.
            return super().make_callable(fetches, feed_list, accept_options)
        make = super().make_callable
        function = self._carrier.call(lambda: make(fetches, feed_list, accept_options))

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._carrier.call(lambda: function(*args, **kwargs), self.give_up)

        return call

    def watch_peers(self, timeout_secs: float | None, on_lost: Callable[[BaseException], object] | None) -> None:
        """Notice within ``timeout_secs`` when a task that the graph needs falls silent; ``None`` waits for ever.

        Every run under way is then ended with UnavailableError, and ``on_lost`` is called with it.
        """
        if timeout_secs is None or self._heartbeats:
            return

        carrier = self._carrier

        def lose(error: BaseException) -> None:
            _log.warning("%s", error)
            carrier.lose(error)
            if on_lost is not None:
                on_lost(error)

        for task in tasks.tasks_of(self.graph) or ("",):
            self._heartbeats.append(Heartbeat(self._master, task, timeout_secs, lose))

    def close(self) -> None:
        """Close the session, and wait for that a moment: a server that is gone cannot say that it has done so."""
        if self._closing is None:
            self._begin_close()
            self._finish_close(time.monotonic() + (_LOST_CLOSE_SECS if self._carrier.left_behind else _CLOSE_SECS))

    def _begin_close(self) -> None:
        for heartbeat in self._heartbeats:
            heartbeat.end()
        self._closing = threading.Thread(target=super().close, name="stepguard-close", daemon=True)
        self._closing.start()

    def _finish_close(self, deadline: float) -> None:
        assert self._closing is not None
        self._closing.join(max(0.0, deadline - time.monotonic()))
        if self._closing.is_alive():
            _log.info("a session on %s is left to itself: a server that it used does not answer", self._master)
            self._carrier.lose(tf.errors.CancelledError(None, None, "the session was closed"))
        for heartbeat in self._heartbeats:
            heartbeat.join(deadline - time.monotonic())
        self._carrier.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # One that could not even be made has no carrier.
        if not hasattr(self, "_pid") or is_finalizing() or os.getpid() != self._pid:
            # No thread starts any more, and what waits for one waits for ever; or a forked child holds a copy of what
            # is its parent's. The kernel frees it.
            return
        self.close()
        # One that is still being closed must not be deleted.
        if self._closing is None or not self._closing.is_alive():
            super().__del__()


# Those that somebody may still use, and nobody has collected.
_open: weakref.WeakSet[_CarriedSession] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close what the program has left open, as long as threads still run: all of them against one deadline.

    A thread that comes back from TensorFlow while the interpreter goes would take the whole process down with it.
    """
    mine = [session for session in list(_open) if session._pid == os.getpid() and session._closing is None]
    for session in mine:
        # Some versions of Python start no thread any more here: such a session is left to the kernel.
        with contextlib.suppress(RuntimeError):
            session._begin_close()
    deadline = time.monotonic() + _CLOSE_SECS
    for session in mine:
        if session._closing is not None and session._closing.ident is not None:
            session._finish_close(deadline)


class RemoteSession(Session, _CarriedSession):
    """What ``managed_session`` gives to the program on a remote master: a :class:`Session` whose runs can be given up.

    A run that waits for a server that is silent ends with ``UnavailableError``, and the session with it.
    """

    def for_queue_runners(self, should_stop: Callable[[], bool]) -> QueueSession:
        """This session for queue runners, whose runs may wait for ever and are no steps of the training loop."""
        if self._queue_session is None:
            # One for all: a queue runner knows by its session that it runs already.
            self._queue_session = QueueSession(self, should_stop)
        return self._queue_session

    _queue_session: QueueSession | None = None


class QueueSession:
    """A remote session as queue runners use it: their runs mark no steps, and end when the supervisor stops.

    The queue runner of synchronous training waits in the parameter servers for gradients of all replicas: it would
    never let a step boundary come, nor end when the chief alone has finished.
    """

    def __init__(self, session: RemoteSession, should_stop: Callable[[], bool]) -> None:
        self._session = session
        self._should_stop = should_stop
        self.graph = session.graph

    def run(self, fetches: Any, *args: Any, **kwargs: Any) -> Any:
        """Run without marking a step. The closing of a queue is run at the stop, so it is not given up for one."""
        return _CarriedSession.run(self._session, fetches, *args, **kwargs)

    def make_callable(self, fetches: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """A function that runs ``fetches``, until a stop is requested and a moment has passed."""
        session = self._session
        make = super(_CarriedSession, session).make_callable
        function = session._carrier.call(lambda: make(fetches, *args, **kwargs))

        def call(*call_args: Any, **call_kwargs: Any) -> Any:
            slices = 0

            def give_up() -> BaseException | None:
                nonlocal slices
                slices += self._should_stop()
                return tf.errors.CancelledError(None, None, "stopped") if slices > _STOP_SLICES else None

            return session._carrier.call(lambda: function(*call_args, **call_kwargs), give_up)

        return call


def open_session(master: str, *, graph: Any, config: Any) -> Session:
    """A session on ``master``: ``""``, ``"local"``, or the address of a server."""
    if not master:
        return Session(master, graph=graph, config=config)
    if master == tasks.LOCAL:
        return RemoteSession(tasks.local_master(), graph=graph, config=tasks.isolated(config))
    return RemoteSession(master, graph=graph, config=tasks.narrowed(config, graph))
