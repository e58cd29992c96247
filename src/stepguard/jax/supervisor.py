"""The Supervisor for JAX: the core's methods, and a constructor with JAX's terms."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from stepguard.coordination.coordinator import Coordinator
from stepguard.jax.distributed.world import world
from stepguard.jax.engine import JaxEngine
from stepguard.jax.session import STREAMS, Session
from stepguard.loop_supervisor import LoopSupervisor, check_arguments, check_world, store_of
from stepguard.options import Guarding, Mirror, Options, Restoring, Saving, Stopping, Watching, each_option_once, refuse
from stepguard.orbax_files.taken import ENGINE
from stepguard.steps.event_file import EventFile, WriterEvents, event_file
from stepguard.watching import trial


class Supervisor(LoopSupervisor[Session]):
    """Restores or initialises a state, saves it while it is trained, writes its summaries, and ends the run cleanly.

    ::

        sv = Supervisor(logdir="runs/digits")
        with sv.managed_session({"params": params, "opt": opt_state, "key": key}) as sess:
            for batch in sess.steps(loader, max_steps=10_000):
                sess.state, loss = train_step(sess.state, batch)
                sess.summary({"loss": loss})

    The state is any pytree: of dictionaries, tuples, dataclasses, states of optax, modules of Flax and Equinox, with
    arrays, typed keys and plain Python values as its leaves. The global step, the random streams of Python and NumPy
    and the position in the data are saved too.

    Args:
        logdir: the directory for checkpoints and event files; without it nothing is saved.
        is_chief: whether this process restores, saves and logs. By default process 0 of ``jax.distributed`` does;
            initialise that before.
        init_fn: called with the state before the first step, if there is no checkpoint to restore; it returns the
            state to begin with.
        summaries: called with the state between two steps, every ``save_summaries_secs``; it returns numbers by the
            names of their curves. Draws from Python's and NumPy's streams in it do not change the training.
        summary_writer: the program's own writer of summaries, with ``add_scalar``; by default an event file is written.
        save_summaries_secs: seconds between summaries and step rates; 0 or ``None`` writes neither.
        save_model_secs: seconds between checkpoints; 0 or ``None`` takes none on a timer.
        save_model_steps: steps between checkpoints, besides those on the timer; ``None`` takes none by steps.
        max_to_keep: how many checkpoints are kept; 0 or ``None`` keeps all.
        stop_grace_secs: how many seconds the threads have to stop, and the last checkpoint to be written.
        hang_secs: seconds without a step that count as a hang, which is reported; ``None`` looks for none.
        end_on_hang: whether a hang kills the process, for a launcher to start it again.
        progress: whether to show a progress line if standard error is a terminal.
        saving: when and how the state is saved. An option that is also listed above may be given in its group instead.
        stopping: how the run is stopped.
        watching: how the run is watched.
        guarding: what happens if a number is not finite.
        restoring: how the run is restored.
        mirror: where a second copy of the run goes: an address such as ``s3://bucket/runs/x``, a directory, or a
            :class:`stepguard.Mirror`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value; the message names it.
    """

    @each_option_once
    def __init__(
        self,
        logdir: str | os.PathLike[str] | None = None,
        *,
        is_chief: bool | None = None,
        init_fn: Callable[[Any], Any] | None = None,
        summaries: Callable[[Any], Mapping[str, Any]] | None = None,
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
        check_arguments(
            takes="of the state",
            logdir=logdir,
            is_chief=is_chief,
            init_fn=init_fn,
            summaries=summaries,
            summary_writer=summary_writer,
        )
        rank, processes = world()
        refuse(
            watching,
            "peer_timeout_secs",
            because="it is for TensorFlow's servers; with JAX it is the timeout of jax.distributed.initialize",
        )
        refuse(saving, "frozen_apart", because="an array of JAX does not say whether it trains")
        refuse(restoring, "hyperparameters", because="in JAX the optimizer's settings are code, or leaves of the state")
        check_world(options, "jax.distributed", processes)
        is_chief = rank == 0 if is_chief is None else is_chief
        # Absolute, because a program may change its working directory while it trains.
        root = os.path.abspath(logdir) if logdir else None
        found = store_of(root, options.saving, ENGINE)
        store = found if is_chief else None
        options.check_return(commits=store is not None)
        events: EventFile | WriterEvents | None = None
        if is_chief and summary_writer is not None:
            events = WriterEvents(summary_writer)
        elif is_chief and root is not None:
            events = event_file(root, STREAMS)
        coord = Coordinator(clean_stop_exception_types=(StopIteration,))
        self._jax = JaxEngine(
            store=found if is_chief or processes > 1 else None,
            restoring=options.restoring,
            events=events,
            basename=options.saving.checkpoint_basename,
            summaries=summaries,
            init_fn=init_fn,
            coord=coord,
            stop_grace_secs=options.stopping.stop_grace_secs,
        )
        # All processes need this value, not only the chief.
        self._saves_every = options.saving.save_model_steps if root is not None else None
        super().__init__(
            self._jax,
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
        """The program's own writer of summaries, or ``None``."""
        return getattr(self._events, "writer", None)

    # --- sessions ---

    def prepare_or_wait_for_session(self, state: Any, start_standard_services: bool = True) -> Session:
        """Open a session. Its state is restored, in the form and with the shardings of ``state``, or is ``state``.

        Raises:
            RuntimeError: the previous session of this supervisor still runs.
            LogdirInUseError: another process, or another supervisor of this process, saves to the logdir.
            CheckpointMismatchError: the newest good checkpoint does not fit the state.
            NoGoodCheckpointError: checkpoints exist, but all are damaged.
            TypeError: a leaf of the state cannot be saved; the message names it.
        """
        meets_every = self._saves_every if start_standard_services else None
        return self.open_alone(functools.partial(self._jax.prepare, state, meets_every), start_standard_services)

    def managed_session(
        self, state: Any, start_standard_services: bool = True, close_summary_writer: bool = True
    ) -> AbstractContextManager[Session]:
        """A context that returns a session. The end of its block ends the run.

        An error of the block or of a service is raised again after all threads have stopped and the session is
        closed.

        Args:
            state: the state to begin with, if there is no checkpoint; with one, the form of the restored state.
            start_standard_services: whether to start the services: checkpoints, summaries, step rate.
            close_summary_writer: whether to close the summary writer at the end.
        """
        opens = functools.partial(self.prepare_or_wait_for_session, state, start_standard_services)
        return self.managed_alone(opens, close_summary_writer=close_summary_writer)
