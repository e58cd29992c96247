"""The Supervisor of the loop frameworks: in one process, one session at a time trains and saves in a logdir."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from stepguard.engine import Prepared
from stepguard.errors import LogdirInUseError, described
from stepguard.options import Options, Saving
from stepguard.options.checks import check_local, check_switch, wrong_type
from stepguard.steps.peers_engine import PeersEngine
from stepguard.steps.session import Session
from stepguard.store import CheckpointStore
from stepguard.supervisor import Supervisor
from stepguard.words import logger

_log = logger(__name__)

LoopSessionT = TypeVar("LoopSessionT", bound=Session)


class LoopSupervisor(Supervisor[LoopSessionT]):
    """The core's Supervisor, for engines whose sessions are :class:`stepguard.steps.session.Session`.

    Threads: those of :class:`stepguard.supervisor.Supervisor`.
    """

    _engine: PeersEngine[LoopSessionT]  # type: ignore[assignment]
    _session: LoopSessionT | None = None

    @property
    def save_path(self) -> str | None:
        """The prefix of the paths of the checkpoints, without the step; ``None`` where this process saves none."""
        return None if self._store is None else os.path.join(self._store.root, self._store.basename)

    def summary_computed(self, sess: LoopSessionT, summary: Mapping[str, Any], global_step: int | None = None) -> None:
        """Write values that the program has computed itself: numbers by the names of their curves.

        Raises:
            TypeError: ``summary`` is no dictionary, or a value in it is no number.
            RuntimeError: there is no event log, because there is no ``logdir`` or this process is a worker.
        """
        if self._events is None:
            raise RuntimeError(
                "summary_computed: expected a summary writer, found none: it needs a chief with a logdir (or a "
                "summary_writer)"
            )
        step = sess.global_step if global_step is None else global_step
        self._engine.write_summary(summary, step, where="summary_computed")

    def open_alone(self, prepare: Callable[[], Prepared[LoopSessionT]], start_standard_services: bool) -> LoopSessionT:
        """Open a session as ``open_session`` does, unless another one trains or saves here.

        Raises:
            RuntimeError: the previous session of this supervisor still runs.
            LogdirInUseError: another process, or another supervisor of this process, saves to the logdir.
        """
        self._check_alone()
        session = self.open_session(prepare, start_standard_services)
        self._session = session
        _with_session.add(self)
        return session

    def managed_alone(
        self, open_session: Callable[[], LoopSessionT], *, close_summary_writer: bool
    ) -> AbstractContextManager[LoopSessionT]:
        """The context of ``managed_session``; ``open_session`` opens the session by :meth:`open_alone`."""

        def opened() -> LoopSessionT:
            session = open_session()
            # Only the end of its block ends this session.
            session.is_in_block = True
            return session

        return self.managed(opened, close_summary_writer=close_summary_writer)

    def stop(
        self,
        threads: Sequence[threading.Thread] | None = None,
        close_summary_writer: bool = True,
        ignore_live_threads: bool = False,
    ) -> None:
        """Stop as the base does. In a `finally` or `except`, a step that the error has left is not saved."""
        if sys.exc_info()[1] is not None:
            self._drop_step_left_by_error()
        super().stop(threads, close_summary_writer, ignore_live_threads)

    def _drop_step_left_by_error(self) -> None:
        if self._session is not None and self._session.is_left_by_error:
            self._session.boundary.mark_torn()

    def _check_alone(self) -> None:
        """Refuse a second session, which would train what the first one trains.

        An earlier session of another supervisor that saves to the same logdir and is in no `with` block is ended.
        """
        if self._session is not None and self._session.is_open and not self.should_stop():
            raise RuntimeError(
                "this supervisor has a session that still runs, and both would train the same model: leave its "
                "`with` block first, or stop it with sv.stop(), or build a model and a Supervisor of its own for this"
            )
        for other in list(_with_session):
            if other is self or not self._saving.is_on or not other._saves_to(self._logdir):
                continue
            if other._session is not None and other._session.is_in_block:
                raise LogdirInUseError(
                    f"{self._logdir}: expected no other session that saves here, found one of another Supervisor in "
                    f"this process: leave its `with` block first, or give this one another logdir",
                    logdir=Path(str(self._logdir)),
                    host=os.uname().nodename,
                    pid=os.getpid(),
                    since=None,
                )
            other._give_way()

    def _give_way(self) -> None:
        """End a session that was opened without a `with` block, so that another can start.

        This happens when a cell of a notebook is run again.
        """
        session = self._session
        assert session is not None
        # The next cell of the notebook does not know of the error that has ended the one before.
        self._drop_step_left_by_error()
        _log.warning(
            "%s: an earlier session of this process, at step %d, still saves here: %s",
            self._logdir,
            session.global_step - session.is_cut_short,
            "an error has left its next step, so it is stopped as it is"
            if session.is_cut_short
            else "it is saved and stopped now",
        )
        try:
            self.stop()
        except Exception as error:  # noqa: BLE001 - an error of the old session must not end the new one
            _log.warning("the earlier session has ended with an error: %s", described(error))
        session.close()

    def _saves_to(self, logdir: str | None) -> bool:
        """Whether a session of this supervisor is running and saves to ``logdir``."""
        runs = self._session is not None and self._session.is_open and not self.should_stop()
        return runs and self._saving.is_on and logdir is not None and logdir == self._logdir


_with_session: weakref.WeakSet[LoopSupervisor[Any]] = weakref.WeakSet()


def check_arguments(
    *,
    logdir: Any,
    is_chief: Any,
    init_fn: Any,
    summaries: Any,
    summary_writer: Any,
    takes: str,
) -> None:
    """Check the types of a Supervisor's arguments that are no options, before anything is built or written.

    ``init_fn`` and ``summaries`` are functions; ``takes`` says of what, for the message.

    Raises:
        TypeError, ValueError: the message names the argument, the expected and the found value.
    """
    check_switch("is_chief", is_chief, or_none=True)
    for name, function in (("summaries", summaries), ("init_fn", init_fn)):
        if function is not None and not callable(function):
            raise wrong_type(name, f"a function {takes}", function)
    if summary_writer is not None and not callable(getattr(summary_writer, "add_scalar", None)):
        raise wrong_type("summary_writer", "an object with add_scalar and close", summary_writer)
    if logdir is not None and not isinstance(logdir, (str, os.PathLike)):
        raise wrong_type("logdir", "a path", logdir)
    if logdir:
        check_local("logdir", logdir)
    if logdir and os.path.exists(logdir) and not os.path.isdir(logdir):
        raise NotADirectoryError(f"logdir: expected a directory, found the file {os.fspath(logdir)}; name another one")


def check_world(options: Options, framework: str, processes: int) -> None:
    """Refuse to return to a checkpoint where several processes would have to.

    Raises:
        ValueError: the message names the option.
    """
    if options.guarding.returns and processes > 1:
        raise ValueError(
            f"nan_guard='return' is for a run of one process, and {framework} has {processes}: use "
            f"nan_guard='stop', and have a launcher start the run again from its newest checkpoint"
        )


def store_of(root: str | None, saving: Saving, engine: str) -> CheckpointStore | None:
    """The store in ``root`` as the options say."""
    if root is None:
        return None
    return CheckpointStore(
        root,
        basename=saving.checkpoint_basename,
        engine=engine,
        max_to_keep=saving.max_to_keep,
        keep_every_n_hours=saving.keep_checkpoint_every_n_hours,
        keep_best=saving.keep_best,
    )
