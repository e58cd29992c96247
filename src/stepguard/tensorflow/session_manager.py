"""Creates a session and makes its model ready: by restoring it, by initialising it, or by waiting for the chief."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from stepguard.errors import ModelNotReadyError, add_note
from stepguard.store import Recovery
from stepguard.tensorflow.checkpoint.restore import Restorer, restore_file
from stepguard.tensorflow.cluster import tasks
from stepguard.tensorflow.cluster.remote_session import RemoteSession, open_session
from stepguard.tensorflow.session import Session
from stepguard.words import logger

_log = logger(__name__)
_v1 = tf.compat.v1

# The wait before the first check for a model or a checkpoint, its growth, and its limit (recovery_wait_secs is the
# other limit). The limit is short because a check is cheap, and a worker has nothing to do but to notice its chief.
_FIRST_WAIT_SECS = 0.05
_WAIT_GROWTH = 1.5
_LONGEST_WAIT_SECS = 1.0

PEER_TIMEOUT_SECS = 60.0
# If a server is lost during the wait for the model, the wait goes on until both are there.
_LOST_WHILE_WAITING = (tf.errors.AbortedError, tf.errors.UnavailableError)


class SessionManager(tf.compat.v1.train.SessionManager):
    """Creates sessions and makes the model ready: TensorFlow's ``SessionManager``, for use alone or by a Supervisor.

    It uses nothing of TensorFlow's implementation. It has TensorFlow's type because programs may check for it.

    Args:
        local_init_op: operation run in every new session, for tables and local variables. ``None`` runs nothing.
        ready_op: 1-D string tensor with the names of what is not ready; empty if the model is ready. ``None`` checks
            nothing.
        ready_for_local_init_op: the same, checked before ``local_init_op`` is run.
        graph: the graph of the model; the default graph if ``None``.
        recovery_wait_secs: the longest time between two checks, in seconds, while waiting for a model or a
            checkpoint. The first checks come within milliseconds, later ones each second.
        local_init_run_options: ``RunOptions`` for running ``local_init_op``.
        local_init_feed_dict: feeds for running ``local_init_op``.
        restorer: how a checkpoint directory is searched and restored. Keyword only.
        wait_for_stop: ``wait_for_stop(timeout_secs)`` ends a wait when it returns true. Keyword only.
        peer_timeout_secs: how long a task that the graph needs may be silent, in seconds, before a session on a remote
            master counts as lost; ``None`` waits for ever. Keyword only.
        on_lost: called with the error when a session is lost, on a thread of its own. Keyword only.

    Raises:
        ValueError: ``ready_for_local_init_op`` was given without ``local_init_op``.
    """

    def __init__(
        self,
        local_init_op: Any = None,
        ready_op: Any = None,
        ready_for_local_init_op: Any = None,
        graph: Any = None,
        recovery_wait_secs: float = 30,
        local_init_run_options: Any = None,
        local_init_feed_dict: Any = None,
        *,
        restorer: Restorer | None = None,
        wait_for_stop: Callable[[float], bool] | None = None,
        peer_timeout_secs: float | None = PEER_TIMEOUT_SECS,
        on_lost: Callable[[BaseException], object] | None = None,
    ) -> None:
        if ready_for_local_init_op is not None and local_init_op is None:
            raise ValueError(
                "ready_for_local_init_op says when local_init_op can be run, and local_init_op is None: pass both, "
                f"or neither (found ready_for_local_init_op={ready_for_local_init_op})"
            )
        self._local_init_op = local_init_op
        self._ready_op = ready_op
        self._ready_for_local_init_op = ready_for_local_init_op
        self._graph = _v1.get_default_graph() if graph is None else graph
        # Of TensorFlow's own, for subclasses that open their sessions themselves.
        self._target = None
        self._recovery_wait_secs = recovery_wait_secs
        self._local_init_run_options = local_init_run_options
        self._local_init_feed_dict = local_init_feed_dict
        self.restorer = Restorer() if restorer is None else restorer
        self._wait_for_stop = threading.Event().wait if wait_for_stop is None else wait_for_stop
        self._peer_timeout_secs = peer_timeout_secs
        self._on_lost = on_lost

    def prepare_session(
        self,
        master: str,
        init_op: Any = None,
        saver: Any = None,
        checkpoint_dir: str | None = None,
        checkpoint_filename_with_path: str | None = None,
        wait_for_checkpoint: bool = False,
        max_wait_secs: float | None = 7200,
        config: Any = None,
        init_feed_dict: Any = None,
        init_fn: Callable[[Any], object] | None = None,
    ) -> Session:
        """A session whose model is restored from its newest good checkpoint, or else initialised.

        A model that is already initialised on a remote ``master`` is not changed. Without a checkpoint, ``init_op`` is
        run and then ``init_fn(session)`` is called. ``local_init_op`` is run in every case.

        Raises:
            RuntimeError: there is nothing to initialise the model with, or the model is not ready afterwards.
            ValueError: both ``checkpoint_dir`` and ``checkpoint_filename_with_path`` were given.
            NoGoodCheckpointError: checkpoints exist, and all of them are damaged.
            CheckpointMismatchError: the checkpoint does not fit the graph; nothing was overwritten.
        """
        session, is_ready = self._recover(
            master, saver, checkpoint_dir, checkpoint_filename_with_path, wait_for_checkpoint, max_wait_secs, config
        )
        try:
            if not is_ready:
                self._initialise(session, init_op, init_feed_dict, init_fn)
            self._make_ready(session, init_op, init_fn)
        except BaseException:
            _close(session)
            raise
        return _prepared(session)

    def recover_session(
        self,
        master: str,
        saver: Any = None,
        checkpoint_dir: str | None = None,
        checkpoint_filename_with_path: str | None = None,
        wait_for_checkpoint: bool = False,
        max_wait_secs: float | None = 7200,
        config: Any = None,
    ) -> tuple[Session, bool]:
        """A session, and whether its model was recovered: found alive on a remote master, or restored.

        Raises:
            ValueError: both ``checkpoint_dir`` and ``checkpoint_filename_with_path`` were given.
        """
        session, is_recovered = self._recover(
            master, saver, checkpoint_dir, checkpoint_filename_with_path, wait_for_checkpoint, max_wait_secs, config
        )
        try:
            problem = self._run_local_init(session)
            if not is_recovered:
                return _prepared(session), False
            problem = problem or self._not_ready(session, self._ready_op)
        except BaseException:
            _close(session)
            raise
        source = checkpoint_dir or checkpoint_filename_with_path
        if problem is not None:
            _log.warning("restoring from %s did not make the model ready: %s", source, problem)
            return _prepared(session), False
        return _prepared(session), True

    def wait_for_session(self, master: str, config: Any = None, max_wait_secs: float | None = math.inf) -> Session:
        """Wait until another process has made the model ready, and return a session.

        The wait lasts at most ``max_wait_secs`` seconds; ``None`` waits for ever.

        Raises:
            tf.errors.DeadlineExceededError: the model was not ready in time; the message says what was missing.
        """
        waits = _Waits(self._recovery_wait_secs, max_wait_secs)
        problem: str | None = None
        while True:
            session = self._open(master, config, waits, problem)
            try:
                problem = self._is_ready_problem(session)
            except BaseException:
                _close(session)
                raise
            if problem is None:
                self._contacted(session)
                return _prepared(session)
            _close(session)
            wait_secs = waits.next()
            if wait_secs is None:
                raise waits.without_chief(master, problem)
            _log.info("waiting for the chief to make the model ready: %s", problem)
            if self._wait_for_stop(wait_secs):
                raise tasks.StoppedWhileWaitingError(f"a stop was requested while waiting: {problem}")

    def _open(self, master: str, config: Any, waits: _Waits, problem: str | None = None) -> Session:
        """Open a session whose runs are given up when a stop is requested or the time is over.

        ``problem`` is what the check before has found, for the error.
        """
        session = open_session(master, graph=self._graph, config=config)

        def give_up() -> BaseException | None:
            if self._wait_for_stop(0):
                return tasks.StoppedWhileWaitingError(f"a stop was requested while waiting for {_shown(master)}")
            if waits.are_over:
                needed = ", ".join(tasks.tasks_of(self._graph)) or "its servers"
                if problem is None:
                    return waits.timeout(_shown(master), f"no answer from {needed}: are they all running?")
                # The last check begins when the time is over, and has only a moment for its answer.
                error = waits.without_chief(master, problem)
                add_note(error, f"the last check had no answer from {needed}")
                return error
            return None

        if isinstance(session, RemoteSession):
            session.give_up = give_up
        return session

    def _contacted(self, session: Session) -> None:
        """Watch the servers from now on: all have answered. Runs now have no time limit; only a stop ends them."""
        if isinstance(session, RemoteSession):
            session.watch_peers(self._peer_timeout_secs, self._on_lost)
            session.give_up = self._stopped

    def _stopped(self) -> BaseException | None:
        if self._wait_for_stop(0):
            return tasks.StoppedWhileWaitingError("a stop was requested while the model was made ready")
        return None

    def _is_ready_problem(self, session: Session) -> str | None:
        """The reason why a worker must wait, or ``None``. A lost server is a reason: it returns without a model."""
        try:
            return self._run_local_init(session) or self._not_ready(session, self._ready_op)
        except _LOST_WHILE_WAITING as error:
            if not isinstance(session, RemoteSession):
                raise
            return f"{type(error).__name__}: {tasks.first_line(error)}"

    def _recover(
        self,
        master: str,
        saver: Any,
        checkpoint_dir: str | None,
        checkpoint_file: str | None,
        wait_for_checkpoint: bool,
        max_wait_secs: float | None,
        config: Any,
    ) -> tuple[Session, bool]:
        if checkpoint_dir and checkpoint_file:
            raise ValueError(
                "expected either checkpoint_dir or checkpoint_filename_with_path, found both: "
                f"{checkpoint_dir!r} and {checkpoint_file!r}"
            )
        waits = _Waits(self._recovery_wait_secs, max_wait_secs)
        session = self._open(master, config, waits)
        try:
            if master and self._lives(session):
                _log.info("the model on %s is initialised: going on with it", master)
                self._contacted(session)
                if checkpoint_dir:
                    self.restorer.go_on(saver)
                return session, True
            self._contacted(session)
            waits.begin_again()
            if not saver:
                return session, False
            if checkpoint_file:
                restore_file(session, saver, os.fspath(checkpoint_file))
                return session, True
            if not checkpoint_dir:
                return session, False
            session.recovered = Recovery(None)
            while (found := self.restorer.restore_newest(session, saver, os.fspath(checkpoint_dir))) is None:
                wait_secs = waits.next() if wait_for_checkpoint else None
                if wait_secs is None:
                    if wait_for_checkpoint:
                        _log.warning(
                            "no checkpoint came to %s within max_wait_secs=%g: the model is initialised",
                            checkpoint_dir,
                            max_wait_secs,
                        )
                    return session, False
                _log.info("waiting for a checkpoint in %s", checkpoint_dir)
                if self._wait_for_stop(wait_secs):
                    return session, False
            session.recovered = found
            return session, True
        except BaseException:
            _close(session)
            raise

    def _lives(self, session: Session) -> bool:
        """Whether another process has already made the model in ``session`` ready."""
        if self._ready_op is None:
            return False
        try:
            return (self._run_local_init(session) or self._not_ready(session, self._ready_op)) is None
        except tf.errors.FailedPreconditionError:
            # A local variable whose initial value is a global variable cannot be initialised before that one.
            return False

    def _initialise(
        self, session: Session, init_op: Any, init_feed_dict: Any, init_fn: Callable[[Any], object] | None
    ) -> None:
        if init_op is None and not init_fn and self._local_init_op is None:
            raise ModelNotReadyError(
                "the model is not initialised, no checkpoint was restored, and there is no init_op, init_fn or "
                "local_init_op to initialise it with"
            )
        if init_op is not None:
            session.run(init_op, feed_dict=init_feed_dict)
        if init_fn:
            init_fn(session)

    def _make_ready(self, session: Session, init_op: Any, init_fn: Any) -> None:
        problem = self._run_local_init(session)
        if problem is not None:
            raise ModelNotReadyError(
                f"the model is not ready for local_init_op after init_op={_name(init_op)}, init_fn={init_fn}: {problem}"
            )
        problem = self._not_ready(session, self._ready_op)
        if problem is not None:
            raise ModelNotReadyError(
                f"the model is not ready after init_op={_name(init_op)}, init_fn={init_fn}, "
                f"local_init_op={_name(self._local_init_op)}: {problem}"
            )

    def _run_local_init(self, session: Session) -> str | None:
        """Run ``local_init_op`` if it can be run; otherwise return what it needs first."""
        if self._local_init_op is None:
            return None
        problem = self._not_ready(session, self._ready_for_local_init_op)
        if problem is None:
            session.run(self._local_init_op, feed_dict=self._local_init_feed_dict, options=self._local_init_run_options)
        return problem

    def _not_ready(self, session: Session, ready_op: Any) -> str | None:
        """What is not ready according to ``ready_op``; ``None`` if all is ready."""
        if ready_op is None:
            return None
        try:
            names = session.run(ready_op)
        except tf.errors.FailedPreconditionError as error:
            if "uninitialized" not in str(error):
                raise
            return str(error)
        # Without variables, TensorFlow's default ready_op returns an empty tensor of the default type, int32.
        if names is None or names.dtype == "int32" or names.size == 0:
            return None
        return "variables not initialised: " + ", ".join(name.decode() for name in names)


class _Waits:
    """The waits before each next check: short at first, then growing, and never beyond the deadline."""

    def __init__(self, longest_secs: float, max_wait_secs: float | None) -> None:
        self._longest_secs = min(longest_secs, _LONGEST_WAIT_SECS)
        self._max_wait_secs = math.inf if max_wait_secs is None else max_wait_secs
        self.begin_again()

    def begin_again(self) -> None:
        """Restart the time limit and the short waits, because the next wait is for another thing."""
        self._next_secs = min(_FIRST_WAIT_SECS, self._longest_secs)
        self._began = time.monotonic()

    @property
    def are_over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self._began + self._max_wait_secs

    def timeout(self, what: str, problem: str) -> BaseException:
        """The error of a wait that has taken too long."""
        return tasks.ModelWaitTimeoutError(
            f"{what} was not ready after {time.monotonic() - self._began:.1f} s (max_wait_secs="
            f"{self._max_wait_secs:g}): {problem}"
        )

    def without_chief(self, master: str, problem: str) -> BaseException:
        """The error of a wait for a chief, which has not made the model ready."""
        return self.timeout(
            f"the model on {_shown(master)}",
            f"{problem}. It waits for the chief to initialise or restore it: is the chief running, with the same "
            "graph?",
        )

    def next(self) -> float | None:
        """The seconds to wait now; ``None`` if the time is over."""
        remaining = self._began + self._max_wait_secs - time.monotonic()
        if remaining <= 0:
            return None
        wait_secs = min(self._next_secs, remaining)
        self._next_secs = min(self._next_secs * _WAIT_GROWTH, self._longest_secs)
        return wait_secs


def _prepared(session: Session) -> Session:
    """The session as the program gets it: its runs are no longer given up."""
    if isinstance(session, RemoteSession):
        session.give_up = None
    return session


def _shown(master: str) -> str:
    return repr(master or "this process")


def _close(session: Session) -> None:
    """Close a session because of an error. That error matters more than an error from closing."""
    try:
        session.close()
    except tf.errors.OpError as error:
        _log.debug("closing a session that is given up: %s", error)


def _name(operation: Any) -> Any:
    return getattr(operation, "name", operation)
