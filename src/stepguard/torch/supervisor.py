"""The Supervisor for PyTorch: the core's verbs, and a constructor in PyTorch's words."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from stepguard.coordination.coordinator import Coordinator
from stepguard.errors import LogdirInUseError
from stepguard.saving.nan_guard import RETURN, check_options
from stepguard.store import CheckpointStore
from stepguard.supervisor import MAX_UNPROTECTED_SECS
from stepguard.supervisor import Supervisor as CoreSupervisor
from stepguard.torch import arguments
from stepguard.torch.checkpoint.restore import ENGINE, Restorer
from stepguard.torch.checkpoint.state import components
from stepguard.torch.distributed.world import world
from stepguard.torch.engine import TorchEngine
from stepguard.torch.events import TorchEvents, open_writer
from stepguard.torch.session import Session
from stepguard.watching.observer import Observation


class Supervisor(CoreSupervisor[Session]):
    """Restores or initialises a model, saves it while it trains, writes its summaries, and ends the run cleanly.

    ::

        sv = Supervisor({"model": model, "optimizer": optimizer}, logdir="runs/digits")
        with sv.managed_session() as sess:
            for batch in sess.steps(loader, max_steps=10_000):
                loss = train_step(batch)
                sess.summary({"loss": loss})

    Args:
        state: what is saved, by name: anything with ``state_dict`` and ``load_state_dict``, generators of random
            numbers, and plain values in a :class:`stepguard.torch.Values`. The global step, the random states of the
            process and the position in the data are saved with it.
        logdir: where checkpoints and event files go; without it nothing is saved.
        is_chief: whether this process restores, saves and logs; by default rank 0 of ``torch.distributed`` does, which
            is to be initialised before.
        init_fn: called without arguments when there is no checkpoint to restore, before the first step.
        summaries: called without arguments between two steps, every ``save_summaries_secs``, without gradients; it
            returns numbers by the names of their curves. What it draws at random does not change the training.
        summary_writer: a ``SummaryWriter`` of the program's own; by default one for ``logdir``.
        save_summaries_secs: seconds between summaries and step rates; 0 switches both off.
        save_model_secs: seconds between checkpoints; 0 takes none on a timer.
        save_model_steps: steps between checkpoints, besides those on the timer; ``None`` takes none by steps.
        save_at_end: whether the last step is saved when the run ends without an error. By default it is when
            ``save_model_secs`` or ``save_model_steps`` asks for checkpoints at all.
        max_to_keep: how many checkpoints are kept; 0 or ``None`` keeps all.
        keep_checkpoint_every_n_hours: of those that are not kept, one for each so many hours stays.
        checkpoint_basename: what the names of the checkpoints begin with.
        stop_grace_secs: how long, in seconds, threads may take to stop, and the last checkpoint to be written.
        max_unprotected_secs: how long saves may fail, in seconds, before that stops the run.
        stop_on_sigterm: whether ``managed_session`` answers SIGTERM with a stop at the next step, a last checkpoint
            and an end by that signal; a handler of the program's own is left alone in any case.
        start_over_when_all_damaged: whether to begin at step 0 when checkpoints exist and none is good. By default
            that is an error, since it throws the run away.
        progress: whether to show a progress line where standard error is a terminal.
        total_steps: the step that the program trains to, for the progress line and ``stepguard status``; nothing is
            stopped there. By default what ``steps`` was given as ``max_steps``.
        hang_secs: seconds without a step boundary after which the stacks of all threads are written to a file in
            ``logdir/stacks``; more than the longest step, the first included. ``None`` does not watch.
        end_on_hang: whether the process is then killed, so that ``stepguard run`` starts it again.
        metrics_port: the port for ``/metrics``; 0 takes a free one, ``None`` serves none.
        metrics_host: the address to serve it on; by default this machine alone can reach it.
        nan_guard: what happens when a loss, a summary or the state to be saved is not finite: ``"stop"`` ends the run
            with a :class:`stepguard.NonFiniteError`; ``"return"`` puts the model back to the newest good checkpoint,
            and goes on with the data that comes next, in a run of one process. ``None`` looks at nothing.
        nan_returns: how often, at most, a process returns before it stops all the same; with ``"return"`` only.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value, or a part of the state cannot be saved; the
            message names it.
    """

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
        save_at_end: bool | None = None,
        max_to_keep: int | None = 5,
        keep_checkpoint_every_n_hours: float | None = None,
        checkpoint_basename: str = "model.ckpt",
        stop_grace_secs: float = 120,
        max_unprotected_secs: float = MAX_UNPROTECTED_SECS,
        stop_on_sigterm: bool = True,
        start_over_when_all_damaged: bool = False,
        progress: bool = False,
        total_steps: int | None = None,
        hang_secs: float | None = None,
        end_on_hang: bool = False,
        metrics_port: int | None = None,
        metrics_host: str = "127.0.0.1",
        nan_guard: str | None = None,
        nan_returns: int = 3,
    ) -> None:
        arguments.check(
            logdir=logdir,
            is_chief=is_chief,
            init_fn=init_fn,
            summaries=summaries,
            summary_writer=summary_writer,
            save_summaries_secs=save_summaries_secs,
            save_model_secs=save_model_secs,
            save_model_steps=save_model_steps,
            max_to_keep=max_to_keep,
            stop_grace_secs=stop_grace_secs,
            max_unprotected_secs=max_unprotected_secs,
            save_at_end=save_at_end,
            stop_on_sigterm=stop_on_sigterm,
            start_over_when_all_damaged=start_over_when_all_damaged,
            progress=progress,
            end_on_hang=end_on_hang,
        )
        if nan_guard == RETURN and world()[1] > 1:
            raise ValueError(
                f"nan_guard='return' is for a run of one process, and torch.distributed has {world()[1]}: use "
                f"nan_guard='stop', and have a launcher start the run again from its newest checkpoint"
            )
        parts = components(state)
        if is_chief is None:
            is_chief = world()[0] == 0
        # A program may change its directory while it trains.
        everyones_root = os.path.abspath(logdir) if logdir else None
        root = everyones_root if is_chief else None
        found = None
        if everyones_root is not None:
            found = CheckpointStore(
                everyones_root,
                basename=checkpoint_basename,
                engine=ENGINE,
                max_to_keep=max_to_keep,
                keep_every_n_hours=keep_checkpoint_every_n_hours,
            )
        store = found if is_chief else None
        saves = bool(save_model_secs or save_model_steps or save_at_end)
        check_options(nan_guard, nan_returns, saves=store is not None and saves)
        restorer = None
        if found is not None and (is_chief or world()[1] > 1):
            restorer = Restorer(found, parts, start_over_when_all_damaged=start_over_when_all_damaged)
        self._save_path = None if root is None else os.path.join(root, checkpoint_basename)
        is_own = False
        if summary_writer is None and root is not None:
            summary_writer, is_own = open_writer(root), True
        events = None if summary_writer is None or not is_chief else TorchEvents(summary_writer, is_own=is_own)
        self._torch_events = events
        # What `next(batches)` raises in a loop of the program's own when there are no more.
        coord = Coordinator(clean_stop_exception_types=(StopIteration,))
        self._torch = TorchEngine(
            parts,
            root=None if found is None else found.root,
            restorer=restorer,
            events=events,
            basename=checkpoint_basename,
            summaries=summaries,
            init_fn=init_fn,
            coord=coord,
            stop_grace_secs=stop_grace_secs,
        )
        self._session: Session | None = None
        # Known to all processes, and not to the chief only.
        self._saves_every = save_model_steps if everyones_root is not None else None
        super().__init__(
            self._torch,
            coord=coord,
            is_chief=bool(is_chief),
            logdir=root,
            store=store,
            events=events,
            has_summaries=summaries is not None,
            saves_model=store is not None,
            save_summaries_secs=save_summaries_secs,
            save_model_secs=save_model_secs,
            save_model_steps=save_model_steps,
            save_at_end=save_at_end,
            stop_grace_secs=stop_grace_secs,
            max_unprotected_secs=max_unprotected_secs,
            stop_on_sigterm=stop_on_sigterm,
            observation=Observation(
                progress=progress,
                total_steps=total_steps,
                hang_secs=hang_secs,
                end_on_hang=end_on_hang,
                metrics_port=metrics_port,
                metrics_host=metrics_host,
            ),
            nan_guard=nan_guard,
            nan_returns=nan_returns,
            watched_logdir=everyones_root,
            role=f"worker-{world()[0]}",
        )

    @property
    def save_path(self) -> str | None:
        """The beginning of the paths of the checkpoints, without the step; ``None`` without a logdir."""
        return self._save_path

    @property
    def summary_writer(self) -> Any:
        """The SummaryWriter, or ``None``."""
        return None if self._torch_events is None else self._torch_events.writer

    # --- sessions ---

    def prepare_or_wait_for_session(self, start_standard_services: bool = True) -> Session:
        """A session whose state is restored, or as the program has built it.

        Raises:
            RuntimeError: the session before this one still runs.
            LogdirInUseError: another process, or another supervisor of this one, saves to the logdir.
            CheckpointMismatchError: the newest good checkpoint does not fit the program. Nothing was changed.
            NoGoodCheckpointError: checkpoints exist, and every one is damaged.
        """
        self._check_alone()
        meets_every = self._saves_every if start_standard_services else None
        session = self._open_session(lambda: self._torch.prepare(meets_every), start_standard_services)
        self._session = session
        return session

    def managed_session(
        self, start_standard_services: bool = True, close_summary_writer: bool = True
    ) -> AbstractContextManager[Session]:
        """A context that gives a session, and ends the run when it is left.

        An error of the block or of a service is raised again after all threads have stopped and the session is
        closed.

        Args:
            start_standard_services: whether to start the services: checkpoints, summaries, step rate.
            close_summary_writer: whether to close the summary writer at the end.
        """

        def open_session() -> Session:
            session = self.prepare_or_wait_for_session(start_standard_services)
            # One that was opened by hand, and never stopped, is no obstacle: nobody may have it any more.
            _in_a_block.add(self)
            return session

        return self._supervised(open_session, close_summary_writer=close_summary_writer)

    def summary_computed(self, sess: Session, summary: Mapping[str, Any], global_step: int | None = None) -> None:
        """Write values that the program has computed itself: numbers by the names of their curves.

        Raises:
            TypeError: ``summary`` is no dictionary, or a value in it is no number.
            RuntimeError: there is no summary writer: no ``logdir``, or a worker.
        """
        if self._torch_events is None:
            raise RuntimeError(
                "summary_computed: expected a summary writer, found none: it needs a chief with a logdir (or a "
                "summary_writer)"
            )
        step = sess.global_step if global_step is None else global_step
        self._torch.write_summary(summary, step, where="summary_computed")

    def _check_alone(self) -> None:
        """A second session would be restored over the model that the first one trains."""
        if self._session is not None and self._session.is_open and not self.should_stop():
            raise RuntimeError(
                "this supervisor has a session that still runs, and both would train the same model: leave its "
                "`with` block first, or stop it with sv.stop(), or build a model and a Supervisor of its own for this"
            )
        for other in list(_in_a_block):
            if other is not self and other._saves_to(self._logdir) and self._saving.is_on:
                raise LogdirInUseError(
                    f"{self._logdir}: expected no other session that saves here, found one of another Supervisor in "
                    f"this process: leave its `with` block first, or give this one another logdir",
                    logdir=Path(str(self._logdir)),
                    host=os.uname().nodename,
                    pid=os.getpid(),
                    since=None,
                )

    def _saves_to(self, logdir: str | None) -> bool:
        """Whether a session of this supervisor runs that saves there."""
        runs = self._session is not None and self._session.is_open and not self.should_stop()
        return runs and self._saving.is_on and logdir is not None and logdir == self._logdir


_in_a_block: weakref.WeakSet[Supervisor] = weakref.WeakSet()
