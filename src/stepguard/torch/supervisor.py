"""The Supervisor for PyTorch: the core's methods, and a constructor with PyTorch's terms."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from stepguard.coordination.coordinator import Coordinator
from stepguard.errors import LogdirInUseError, described
from stepguard.options import Guarding, Options, Restoring, Saving, Stopping, Watching, each_option_once, refuse
from stepguard.store import CheckpointStore
from stepguard.supervisor import Supervisor as CoreSupervisor
from stepguard.torch import arguments
from stepguard.torch.checkpoint.files import ENGINE
from stepguard.torch.checkpoint.program import Program
from stepguard.torch.checkpoint.reading import newest
from stepguard.torch.checkpoint.restore import Restorer
from stepguard.torch.checkpoint.state import components
from stepguard.torch.distributed.world import world
from stepguard.torch.engine import TorchEngine
from stepguard.torch.events import TorchEvents, open_writer
from stepguard.torch.session import Session
from stepguard.watching import trial
from stepguard.words import logger

_log = logger(__name__)


class Supervisor(CoreSupervisor[Session]):
    """Restores or initialises a model, saves it while it trains, writes its summaries, and ends the run cleanly.

    ::

        sv = Supervisor({"model": model, "optimizer": optimizer}, logdir="runs/digits")
        with sv.managed_session() as sess:
            for batch in sess.steps(loader, max_steps=10_000):
                loss = train_step(batch)
                sess.summary({"loss": loss})

    Args:
        state: the objects to save, by name: anything with ``state_dict`` and ``load_state_dict``, random number
            generators, and plain values in a :class:`stepguard.torch.Values`. The global step, the random states of
            the process and the position in the data are saved too.
        logdir: the directory for checkpoints and event files; without it nothing is saved.
        is_chief: whether this process restores, saves and logs. By default rank 0 of ``torch.distributed`` does;
            initialise that before.
        init_fn: called without arguments before the first step, if there is no checkpoint to restore.
        summaries: called without arguments between two steps, every ``save_summaries_secs``, without gradients; it
            returns numbers by the names of their curves. Random numbers that it draws do not change the training.
        summary_writer: the program's own ``SummaryWriter``; by default one is made for ``logdir``.
        save_summaries_secs: seconds between summaries and step rates; 0 or ``None`` writes neither.
        save_model_secs: seconds between checkpoints; 0 or ``None`` takes none on a timer.
        save_model_steps: steps between checkpoints, besides those on the timer; ``None`` takes none by steps.
        max_to_keep: how many checkpoints are kept; 0 or ``None`` keeps all.
        stop_grace_secs: how many seconds the threads have to stop, and the last checkpoint to be written.
        hang_secs: seconds without a step that count as a hang, which is reported; ``None`` looks for none.
        end_on_hang: whether a hang kills the process, for a launcher to start it again.
        progress: whether to show a progress line if standard error is a terminal.
        saving: when and how the model is saved. An option that is also listed above may be given in its group instead.
        stopping: how the run is stopped.
        watching: how the run is watched.
        guarding: what happens if a number is not finite.
        restoring: how the run is restored.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value, or a part of the state cannot be saved; the
            message names it.
    """

    @each_option_once
    def __init__(
        self,
        state: Mapping[str, Any],
        logdir: str | os.PathLike[str] | None = None,
        *,
        is_chief: bool | None = None,
        init_fn: Callable[[], object] | None = None,
        summaries: Callable[[], Mapping[str, Any]] | None = None,
        summary_writer: Any = None,
        save_summaries_secs: float | None = 120,
        save_model_secs: float | None = 600,
        save_model_steps: int | None = None,
        max_to_keep: int | None = 5,
        stop_grace_secs: float = 120,
        hang_secs: float | None = None,
        end_on_hang: bool = False,
        progress: bool = False,
        saving: Saving | None = None,
        stopping: Stopping | None = None,
        watching: Watching | None = None,
        guarding: Guarding | None = None,
        restoring: Restoring | None = None,
    ) -> None:
        options = Options.of(
            save_summaries_secs=save_summaries_secs,
            save_model_secs=save_model_secs,
            save_model_steps=save_model_steps,
            max_to_keep=max_to_keep,
            stop_grace_secs=stop_grace_secs,
            hang_secs=hang_secs,
            end_on_hang=end_on_hang,
            progress=progress,
            saving=saving,
            stopping=stopping,
            watching=watching,
            guarding=guarding,
            restoring=restoring,
        )
        logdir, options = trial.applied(logdir, options)
        if trial.is_deterministic():
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        refuse(
            watching,
            "peer_timeout_secs",
            because="it is for TensorFlow's servers; with PyTorch it is init_process_group's timeout",
        )
        arguments.check(
            logdir=logdir, is_chief=is_chief, init_fn=init_fn, summaries=summaries, summary_writer=summary_writer
        )
        if options.guarding.returns and world()[1] > 1:
            raise ValueError(
                f"nan_guard='return' is for a run of one process, and torch.distributed has {world()[1]}: use "
                f"nan_guard='stop', and have a launcher start the run again from its newest checkpoint"
            )
        program = Program(components(state))
        if is_chief is None:
            is_chief = world()[0] == 0
        # Absolute, because a program may change its working directory while it trains.
        self._everyones_root = everyones_root = os.path.abspath(logdir) if logdir else None
        root = everyones_root if is_chief else None
        basename = options.saving.checkpoint_basename
        found = None
        if everyones_root is not None:
            found = CheckpointStore(
                everyones_root,
                basename=basename,
                engine=ENGINE,
                max_to_keep=options.saving.max_to_keep,
                keep_every_n_hours=options.saving.keep_checkpoint_every_n_hours,
            )
        store = found if is_chief else None
        options.check_return(commits=store is not None)
        restorer = None
        if found is not None and (is_chief or world()[1] > 1):
            restorer = Restorer(found, program, options.restoring)
        self._save_path = None if root is None else os.path.join(root, basename)
        is_own = False
        if summary_writer is None and root is not None:
            summary_writer, is_own = open_writer(root), True
        events = None if summary_writer is None or not is_chief else TorchEvents(summary_writer, is_own=is_own)
        self._torch_events = events
        # `next(batches)` in the program's own loop raises StopIteration at the end of the batches.
        coord = Coordinator(clean_stop_exception_types=(StopIteration,))
        self._torch = TorchEngine(
            program,
            root=None if found is None else found.root,
            restoring=options.restoring,
            restorer=restorer,
            events=events,
            basename=basename,
            summaries=summaries,
            init_fn=init_fn,
            coord=coord,
            stop_grace_secs=options.stopping.stop_grace_secs,
        )
        self._session: Session | None = None
        self._is_in_block = False
        # All processes need this value, not only the chief.
        self._saves_every = options.saving.save_model_steps if everyones_root is not None else None
        super().__init__(
            self._torch,
            coord=coord,
            is_chief=bool(is_chief),
            logdir=everyones_root,
            store=store,
            events=events,
            has_summaries=summaries is not None,
            saves_model=store is not None,
            options=options,
            role=f"worker-{world()[0]}",
        )

    @property
    def save_path(self) -> str | None:
        """The prefix of the paths of the checkpoints, without the step; ``None`` without a logdir."""
        return self._save_path

    @property
    def summary_writer(self) -> Any:
        """The SummaryWriter, or ``None``."""
        return None if self._torch_events is None else self._torch_events.writer

    def newest_step(self) -> int | None:
        """The step of the newest good checkpoint, where the next session continues; ``None`` without a checkpoint.

        This reads and verifies the checkpoint. :func:`stepguard.torch.newest` also returns what it contains, and needs
        no Supervisor.

        Raises:
            NoGoodCheckpointError: checkpoints exist, but all are damaged.
        """
        found = None if self._everyones_root is None else newest(self._everyones_root)
        return None if found is None else found.step

    # --- sessions ---

    def prepare_or_wait_for_session(self, start_standard_services: bool = True) -> Session:
        """Open a session. Its state is restored, or is the one that the program has built.

        Raises:
            RuntimeError: the previous session of this supervisor still runs.
            LogdirInUseError: another process, or another supervisor of this process, saves to the logdir.
            CheckpointMismatchError: the newest good checkpoint does not fit the program. Nothing was changed.
            NoGoodCheckpointError: checkpoints exist, but all are damaged.
        """
        self._check_alone()
        meets_every = self._saves_every if start_standard_services else None
        session = self.open_session(lambda: self._torch.prepare(meets_every), start_standard_services)
        self._session, self._is_in_block = session, False
        _with_session.add(self)
        return session

    def managed_session(
        self, start_standard_services: bool = True, close_summary_writer: bool = True
    ) -> AbstractContextManager[Session]:
        """A context that returns a session. The end of its block ends the run.

        An error of the block or of a service is raised again after all threads have stopped and the session is
        closed.

        Args:
            start_standard_services: whether to start the services: checkpoints, summaries, step rate.
            close_summary_writer: whether to close the summary writer at the end.
        """

        def open_session() -> Session:
            session = self.prepare_or_wait_for_session(start_standard_services)
            # Only the end of its block ends this session.
            self._is_in_block = True
            return session

        return self.managed(open_session, close_summary_writer=close_summary_writer)

    def summary_computed(self, sess: Session, summary: Mapping[str, Any], global_step: int | None = None) -> None:
        """Write values that the program has computed itself: numbers by the names of their curves.

        Raises:
            TypeError: ``summary`` is no dictionary, or a value in it is no number.
            RuntimeError: there is no summary writer, because there is no ``logdir`` or this process is a worker.
        """
        if self._torch_events is None:
            raise RuntimeError(
                "summary_computed: expected a summary writer, found none: it needs a chief with a logdir (or a "
                "summary_writer)"
            )
        step = sess.global_step if global_step is None else global_step
        self._torch.write_summary(summary, step, where="summary_computed")

    def _check_alone(self) -> None:
        """Refuse a second session: it would be restored into the model that the first session trains.

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
            if other._is_in_block:
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
        _log.warning(
            "%s: an earlier session of this process, at step %d, still saves here: it is saved and stopped now",
            self._logdir,
            session.global_step,
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


_with_session: weakref.WeakSet[Supervisor] = weakref.WeakSet()
