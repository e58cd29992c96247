"""A session on a TensorFlow server: its runs can be given up, and a silent peer is noticed.

The protocol: a thread that runs something waits either in TensorFlow itself or, when closing the session would not
free it, at its courier (see calls.py). A heartbeat for each task of the graph (server_ping.py) notices a silent server
on a thread of its own. It then ends all carried calls, and closes the session if the master is in this process, which
ends the calls that wait in TensorFlow; both kinds of caller raise the error of the loss. The runs of queue runners also
poll for a requested stop.

No deadlock is possible: closing has a thread of its own, and ``close`` waits for it at most 2 s (0.1 s if a server was
lost), after which it leaves that thread and the carried calls behind. ``lose`` runs on a heartbeat's thread and only
starts the closing. At exit all open sessions are closed against one deadline. Nothing here is on disk; what a killed
process leaves on the servers, the next chief or worker finds there.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from stepguard.coordination.process_exit import has_threads
from stepguard.tensorflow.cluster import tasks
from stepguard.tensorflow.cluster.calls import GiveUp, ReleasableCalls
from stepguard.tensorflow.cluster.server_ping import Heartbeat
from stepguard.tensorflow.session import Session
from stepguard.words import logger

_log = logger(__name__)
_v1 = tf.compat.v1

# Closing a session calls every server that it used, and would wait for a lost server until that comes back.
_CLOSE_SECS = 2.0
_LOST_CLOSE_SECS = 0.1

# After a stop, the run of a queue runner has this many polls (each 50 ms) to end by itself.
_STOP_LOOKS = 10
_MOST_KNOWN = 4096
_ELEMENTS = (tf.Operation, tf.Tensor, tf.Variable)


class _CarriedSession(tf.compat.v1.Session):
    """TensorFlow's session, but a call to a silent server never holds its caller for ever.

    A call into the runtime cannot be interrupted. There are two ways to free its caller:

    - A courier makes the call on another thread, and leaves it behind there. This always works, and costs 15 us.
    - If the master is a server of this process, closing the session cancels the master's waits. The call then returns
      with an error, in whose place the error of the loss is raised. This does not work for the first run of any set of
      elements, in which the master sends the other servers their part of the graph and cannot be cancelled: a courier
      makes that run.
    """

    def __init__(self, target: str = "", graph: Any = None, config: Any = None) -> None:
        self._master = target
        super().__init__(target, graph=graph, config=config)
        self._calls = ReleasableCalls(self.graph.as_default)
        self._has_own_master = tasks.is_own_master(target)
        # The runs made before, by the ids of their elements. The values keep the elements alive, so no id is reused.
        self._known: dict[Any, Any] = {}
        self.give_up: GiveUp | None = None
        """Asked at intervals during each run of a preparation; an error that it returns ends the wait for the run."""
        self._heartbeats: list[Heartbeat] = []
        self._closing: threading.Thread | None = None
        self._is_closed = False
        self._pid = os.getpid()
        _open.add(self)

    def run(self, fetches: Any, feed_dict: Any = None, options: Any = None, run_metadata: Any = None) -> Any:
        """Run operations and evaluate tensors, as ``tf.compat.v1.Session.run`` does. Any thread."""
        run = super().run
        is_plain = self._has_own_master and options is None and run_metadata is None
        elements = _elements(fetches, feed_dict) if is_plain else None
        key = None if elements is None else tuple(map(id, elements))
        if key in self._known and self.give_up is None:
            return self._call(run, fetches, feed_dict, options, run_metadata)
        result = self._calls.call(lambda: run(fetches, feed_dict, options, run_metadata), self.give_up)
        if key is not None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = elements
        return result

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` on this thread; closing the session frees it."""
        if self._calls.lost is None:
            try:
                return function(*args, **kwargs)
            except (tf.errors.OpError, RuntimeError):
                # RuntimeError: the session was closed just before.
                if self._calls.lost is None:
                    raise
        raise self._calls.lost

    def partial_run(self, handle: Any, fetches: Any, feed_dict: Any = None) -> Any:
        """Continue a partial run."""
        run = super().partial_run
        return self._calls.call(lambda: run(handle, fetches, feed_dict))

    def make_callable(self, fetches: Any, feed_list: Any = None, accept_options: bool = False) -> Callable[..., Any]:
        """A function that runs ``fetches``, as ``tf.compat.v1.Session.make_callable`` does."""
        if feed_list:
            # TensorFlow then makes a function that calls `run`, which is carried already.
            return super().make_callable(fetches, feed_list, accept_options)
        make = super().make_callable
        function = self._calls.call(lambda: make(fetches, feed_list, accept_options))
        was_run = False

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal was_run
            if was_run and self.give_up is None:
                return self._call(function, *args, **kwargs)
            result = self._calls.call(lambda: function(*args, **kwargs), self.give_up)
            was_run = self._has_own_master
            return result

        return call

    def watch_peers(self, timeout_secs: float | None, on_lost: Callable[[BaseException], object] | None) -> None:
        """Notice within ``timeout_secs`` that a task which the graph needs is silent; ``None`` watches nothing.

        Every run under way then ends with UnavailableError, or with AbortedError if the task was restarted, and
        ``on_lost`` is called with that error.
        """
        if timeout_secs is None or self._heartbeats:
            return

        # A weak reference: the watching thread must not keep alive a session that the program has dropped.
        calls, session = self._calls, weakref.ref(self)

        def lose(error: BaseException) -> None:
            _log.warning("%s", error)
            calls.lose(error)
            mine = session()
            if mine is not None and mine._has_own_master:
                mine._begin_close()
            if on_lost is not None:
                on_lost(error)

        for task in tasks.tasks_of(self.graph) or ("",):
            self._heartbeats.append(Heartbeat(self._master, task, timeout_secs, lose))

    def close(self) -> None:
        """Close the session; wait for that at most 2 s, because a lost server cannot confirm it."""
        if not self._is_closed and has_threads(self._pid):
            self._is_closed = True
            is_lost = self._calls.left_behind or self._calls.lost is not None
            self._begin_close()
            self._finish_close(time.monotonic() + (_LOST_CLOSE_SECS if is_lost else _CLOSE_SECS))

    def _begin_close(self) -> None:
        if self._closing is not None:
            return
        for heartbeat in self._heartbeats:
            heartbeat.end()
        closing = threading.Thread(target=super().close, name="stepguard-close", daemon=True)
        # Some versions of Python start no thread while the process exits; then the session is left to the kernel.
        with contextlib.suppress(RuntimeError):
            closing.start()
            self._closing = closing

    def _finish_close(self, deadline: float) -> None:
        if self._closing is None:
            return
        self._closing.join(max(0.0, deadline - time.monotonic()))
        if self._closing.is_alive():
            _log.info("a session on %s is left to itself: a server that it used does not answer", self._master)
            self._calls.lose(tf.errors.CancelledError(None, None, "the session was closed"))
        for heartbeat in self._heartbeats:
            heartbeat.join(deadline - time.monotonic())
        self._calls.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # A session whose constructor failed has no `_closing`.
        if not hasattr(self, "_closing") or is_finalizing() or os.getpid() != self._pid:
            # While the interpreter ends no thread can start, and a wait for one would never end. A forked child has
            # only a copy of its parent's session. The kernel frees both.
            return
        self.close()
        # A session that is still being closed must not be deleted, nor one that no thread can close.
        if self._closing is not None and not self._closing.is_alive():
            super().__del__()


# The sessions that have not been collected yet, so that the program may still use them.
_open: weakref.WeakSet[_CarriedSession] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close the sessions that the program has left open, while threads can still run, against one deadline.

    A thread that returns from TensorFlow while the interpreter ends would crash the process.
    """
    mine = [session for session in list(_open) if session._pid == os.getpid() and not session._is_closed]
    for session in mine:
        session._begin_close()
    deadline = time.monotonic() + _CLOSE_SECS
    for session in mine:
        session._finish_close(deadline)


def _elements(fetches: Any, feed_dict: Any) -> tuple[Any, ...] | None:
    """The elements that a run fetches and feeds; like runs have the same. ``None`` if one is of an unknown kind."""
    kind = type(fetches)
    flat = tuple(fetches) if kind is list or kind is tuple else tuple(fetches.values()) if kind is dict else (fetches,)
    # `None` separates the fetches from the feeds, so that neither is taken for the other.
    flat = (*flat, None, *feed_dict) if feed_dict else flat
    return flat if all(one is None or isinstance(one, _ELEMENTS) for one in flat) else None


class RemoteSession(Session, _CarriedSession):
    """The session that ``managed_session`` returns on a remote master: a :class:`Session` whose runs can be given up.

    A run that waits for a silent server ends with ``UnavailableError``, and the session is then lost.
    """

    def for_queue_runners(self, should_stop: Callable[[], bool]) -> QueueSession:
        """This session for queue runners, whose runs may wait without limit and are no steps of the training loop."""
        if self._queue_session is None:
            # All queue runners share one: a queue runner knows by its session whether it is already running.
            self._queue_session = QueueSession(self, should_stop)
        return self._queue_session

    _queue_session: QueueSession | None = None


class QueueSession:
    """A remote session as queue runners use it: their runs mark no steps, and end when the supervisor stops.

    The queue runner of synchronous training waits on the parameter servers for the gradients of all replicas. As a
    step, that run would prevent every step boundary, and it would not end when the chief alone has finished.
    """

    def __init__(self, session: RemoteSession, should_stop: Callable[[], bool]) -> None:
        self._session = session
        self._should_stop = should_stop
        self.graph = session.graph

    def run(self, fetches: Any, *args: Any, **kwargs: Any) -> Any:
        """Run without marking a step. A stop does not end such a run, because queues are closed by runs after it."""
        return _CarriedSession.run(self._session, fetches, *args, **kwargs)

    def make_callable(self, fetches: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """A function that runs ``fetches``. A run that lasts half a second after a requested stop is given up."""
        session = self._session
        make = super(_CarriedSession, session).make_callable
        function = session._calls.call(lambda: make(fetches, *args, **kwargs))

        def call(*call_args: Any, **call_kwargs: Any) -> Any:
            looks = 0

            def give_up() -> BaseException | None:
                nonlocal looks
                looks += self._should_stop()
                return tf.errors.CancelledError(None, None, "stopped") if looks > _STOP_LOOKS else None

            return session._calls.call(lambda: function(*call_args, **call_kwargs), give_up)

        return call


def open_session(master: str, *, graph: Any, config: Any) -> Session:
    """A session on ``master``: ``""``, ``"local"``, or the address of a server."""
    if not master:
        return Session(master, graph=graph, config=config)
    if master == tasks.LOCAL:
        return RemoteSession(tasks.local_master(), graph=graph, config=tasks.isolated(config))
    return RemoteSession(master, graph=graph, config=tasks.narrowed(config, graph))
