"""The Supervisor for PyTorch: the core's methods, and a constructor with PyTorch's terms."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from stepguard.coordination.coordinator import Coordinator
from stepguard.errors import LogdirInUseError
from stepguard.loop_supervisor import LoopSupervisor, check_arguments, check_world, store_of
from stepguard.options import Guarding, Mirror, Options, Restoring, Saving, Stopping, Watching, each_option_once, refuse
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


class Supervisor(LoopSupervisor[Session]):
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
        mirror: where a second copy of the run goes: an address such as ``s3://bucket/runs/x``, a directory, or a
            :class:`stepguard.Mirror`.

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
        mirror: str | os.PathLike[str] | Mirror | None = None,
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
            mirror=mirror,
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
        check_arguments(
            takes="without arguments",
            logdir=logdir,
            is_chief=is_chief,
            init_fn=init_fn,
            summaries=summaries,
            summary_writer=summary_writer,
        )
        rank, processes = world()
        self._is_alone = processes == 1
        check_world(options, "torch.distributed", processes)
        program = Program(components(state))
        is_chief = rank == 0 if is_chief is None else is_chief
        # Absolute, because a program may change its working directory while it trains.
        self._root = root = os.path.abspath(logdir) if logdir else None
        found = store_of(root, options.saving, ENGINE)
        store = found if is_chief else None
        options.check_return(commits=store is not None)
        restorer = None
        if found is not None and (is_chief or processes > 1):
            restorer = Restorer(found, program, options.restoring)
        is_own = False
        if summary_writer is None and store is not None:
            summary_writer, is_own = open_writer(str(root)), True
        events = None if summary_writer is None or not is_chief else TorchEvents(summary_writer, is_own=is_own)
        # `next(batches)` in the program's own loop raises StopIteration at the end of the batches.
        coord = Coordinator(clean_stop_exception_types=(StopIteration,))
        self._torch = TorchEngine(
            program,
            root=None if found is None else found.root,
            restoring=options.restoring,
            restorer=restorer,
            events=events,
            basename=options.saving.checkpoint_basename,
            summaries=summaries,
            init_fn=init_fn,
            coord=coord,
            stop_grace_secs=options.stopping.stop_grace_secs,
            frozen_apart=options.saving.frozen_apart,
        )
        # All processes need this value, not only the chief.
        self._saves_every = options.saving.save_model_steps if root is not None else None
        super().__init__(
            self._torch,
            coord=coord,
            is_chief=bool(is_chief),
            logdir=root,
            store=store,
            events=events,
            has_summaries=summaries is not None,
            saves_model=store is not None,
            options=options,
            role=f"worker-{rank}",
        )

    @property
    def summary_writer(self) -> Any:
        """The SummaryWriter, or ``None``."""
        return getattr(self._events, "writer", None)

    def newest_step(self) -> int | None:
        """The step of the newest good checkpoint, where the next session continues; ``None`` without a checkpoint.

        This reads and verifies the checkpoint. :func:`stepguard.torch.newest` also returns what it contains, and needs
        no Supervisor.

        Raises:
            NoGoodCheckpointError: checkpoints exist, but all are damaged.
        """
        found = None if self._root is None else newest(self._root)
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
        meets_every = self._saves_every if start_standard_services else None
        try:
            return self.open_alone(functools.partial(self._torch.prepare, meets_every), start_standard_services)
        except LogdirInUseError as error:
            processes = os.environ.get("WORLD_SIZE", "1")
            if not self._is_alone or processes == "1" or error.pid == os.getpid():
                raise
            raise LogdirInUseError(
                f"{error}; or, as this is one of {processes} processes that a launcher has started (WORLD_SIZE), call "
                f"torch.distributed.init_process_group() before the Supervisor is made, so that they train together",
                logdir=error.logdir,
                host=error.host,
                pid=error.pid,
                since=error.since,
            ) from None

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
        opens = functools.partial(self.prepare_or_wait_for_session, start_standard_services)
        return self.managed_alone(opens, close_summary_writer=close_summary_writer)
