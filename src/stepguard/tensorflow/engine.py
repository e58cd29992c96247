"""The engine of TensorFlow graph programs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import tensorflow as tf

from stepguard.coordination.looper import LooperThread
from stepguard.disk.new_file import NewFile
from stepguard.disk.schema import MOST_DIGITS
from stepguard.engine import Beginning, Prepared, StepsDone, StepTrace, ValueWatch
from stepguard.errors import NoBoundaryError
from stepguard.store import Checkpoint, CheckpointStore, tensorflow_files
from stepguard.tensorflow.boundary import Boundary
from stepguard.tensorflow.checkpoint.files import write_bundle
from stepguard.tensorflow.checkpoint.restore import ENGINE, restore_file
from stepguard.tensorflow.checkpoint.snapshot import SavePlan, TensorSnapshot, WrittenSnapshot, as_step, save_operations
from stepguard.tensorflow.cluster.sync_replicas import gradients_to_come, wait_for_standstill
from stepguard.tensorflow.defaults import Model, summary_tensor
from stepguard.tensorflow.events import TensorFlowEvents, write_graph
from stepguard.tensorflow.run_effects import RunKinds
from stepguard.tensorflow.run_trace import RunTrace
from stepguard.tensorflow.scalars import is_finite, of_summary
from stepguard.tensorflow.session import Session
from stepguard.words import logger

_log = logger(__name__)
_v1 = tf.compat.v1

# A summary may need input that only a training step provides, so steps go on after this time while it is computed.
_SUMMARY_HOLD_SECS = 1.0
# How long a summary keeps other threads from training while one thread is in a long step.
_SUMMARY_PATIENCE_SECS = 1.0
# The operations that save; the last two write the old format (V1).
_SAVES = ("SaveV2", "SaveSlices", "Save")
# How often the export of a meta graph is retried while the program extends the graph.
_EXPORTS = 20
_EXPORT_PAUSE_SECS = 0.005


class TensorFlowEngine:
    """The engine over one graph, its session manager, its saver and its event log.

    ``plan`` says how to take the state out of a session; without a plan the saver writes the checkpoints itself. For
    threads see :class:`stepguard.engine.Engine`. A new thread of a TensorFlow 2 program starts in eager mode, so each
    method that a service thread may call enters the graph first.
    """

    name = ENGINE
    can_return = True
    storage_error_types: tuple[type[BaseException], ...] = (
        tf.errors.InternalError,
        tf.errors.PermissionDeniedError,
        tf.errors.ResourceExhaustedError,
        tf.errors.UnknownError,
    )

    def __init__(
        self,
        model: Model,
        *,
        meta_graph: Any,
        session_manager: Any,
        plan: SavePlan | None,
        events: TensorFlowEvents | None,
        logdir: str | None,
        save_path: str | None,
        init_fn: Any,
        store: CheckpointStore | None,
        not_joined: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._model = model
        self._meta_graph = meta_graph
        self._session_manager = session_manager
        self._plan = plan
        self._events = events
        self._logdir = logdir
        self._save_path = save_path
        self._init_fn = init_fn
        self._store = store
        self._not_joined = not_joined
        # Whether graph.pbtxt is still to be written, once there is room.
        self._is_graph_due = False
        self._kinds: RunKinds | None = None
        self._watch: ValueWatch | None = None
        self._exported_meta: tuple[int, bytes] | None = None
        self._saves: dict[str, bool] = {}

    # --- the session ---

    def prepare(
        self,
        *,
        is_chief: bool = True,
        master: str = "",
        config: Any = None,
        wait_for_checkpoint: bool = False,
        max_wait_secs: float | None = None,
    ) -> Prepared[Any]:
        """Prepare a session by the session manager."""
        if not is_chief:
            return Prepared(self._session_manager.wait_for_session(master, config=config, max_wait_secs=max_wait_secs))
        session = self._session_manager.prepare_session(
            master,
            init_op=self._model.init_op,
            saver=self._model.saver,
            checkpoint_dir=self._logdir,
            wait_for_checkpoint=wait_for_checkpoint,
            max_wait_secs=max_wait_secs,
            config=config,
            init_feed_dict=self._model.init_feed_dict,
            init_fn=self._init_fn,
        )
        # A session of the program's own session manager has no such attribute.
        return Prepared(session, getattr(session, "recovered", None))

    def restore(self, session: Any, checkpoint: Checkpoint, *, in_run: bool = False) -> None:
        """Restore the saver's variables. State that it does not save (queues, local variables) stays as it is."""
        restore_file(session.unmarked() if in_run else session, self._model.saver, str(checkpoint.path))
        if in_run and (trace := session.trace) is not None:
            trace.count_from(self.step(session) or 0)

    def write_graph(self) -> None:
        """Write the graph to the logdir and to the event log, once into each event file."""
        graph = self._model.graph
        if self._logdir:
            self._is_graph_due = not write_graph(graph, self._logdir)
        if self._events is not None:
            self._events.graph(graph, self._meta_graph)

    def is_open(self, session: Any) -> bool:
        """Whether the session can still run. A session that does not say counts as open."""
        return not getattr(session, "_closed", False)

    def close(self, session: Any) -> None:
        """Close the session, which cancels what it runs."""
        if isinstance(session, Session):
            session.unwatch()
        try:
            session.close()
        except tf.errors.OpError as error:
            _log.debug("closing the session: %s", error)
        except Exception as error:  # noqa: BLE001 - of a session of another kind: the run has ended, well or not
            _log.warning("closing the session: %s: %s", type(error).__name__, error)

    # --- steps ---

    def step(self, session: Any) -> int | None:
        """The value of the global step."""
        global_step = self._model.global_step
        if global_step is None:
            return None
        with self._model.graph.as_default():
            return as_step(session.read(global_step) if isinstance(session, Session) else session.run(global_step))

    def total_steps(self, session: Any) -> None:
        """Unknown: a graph does not say how often it will be run."""

    def step_name(self) -> str:
        """The name of the operation that holds the global step."""
        return str(self._model.global_step.op.name)

    def watch(self, session: Any, before_close: Callable[[], None]) -> None:
        """Have the session mark its steps, if it is one of ours. A second call changes nothing."""
        if isinstance(session, Session) and session.boundary is None:
            if self._kinds is None:
                graph = self._model.graph
                saved = [graph.as_graph_element(one) for one in _global_variables(graph)]
                saved = saved if self._plan is None else list(self._plan.fetches)
                self._kinds = RunKinds(graph, [*saved, *gradients_to_come(graph)])
            session.watch(Boundary(self._kinds), before_close, self._around_save, self._not_joined)

    def watch_values(self, session: Any, watch: ValueWatch) -> None:
        """Show ``watch`` the summaries and, for a session of ours, the scalars that steps return."""
        self._watch = watch
        if isinstance(session, Session):
            session.watch_values(watch)
        else:
            _log.warning("this session does not mark its steps: what they return is not looked at by the NaN guard")

    def trace_steps(self, session: Any, trace: StepTrace) -> Beginning | None:
        """Tell ``trace`` the scalars that steps return, and with digests what they are fed.

        Not of a model on a server, which others train too, nor of a program that counts no steps.
        """
        boundary, step = _boundary(session), self.step(session)
        if boundary is None or step is None or self.is_shared(session):
            return None
        session.trace_with(RunTrace(trace, boundary, step))
        return Beginning(step)

    def stop_at_boundary(self, session: Any, main_thread_was_told: Callable[[], bool]) -> None:
        """Have the next run that changes the model raise. A session that is not ours goes on until its loop asks."""
        boundary = _boundary(session)
        if boundary is not None:
            boundary.stop(main_thread_was_told)

    def end_at(self, session: Any, step: int, ask_stop: Callable[[], None]) -> None:
        """Read the global step after each run that changes the model. A session that is not ours does not end there.

        Another thread may be in a step meanwhile, so that a program with several may end some steps later.
        """
        boundary = _boundary(session)
        if boundary is None or self._model.global_step is None:
            _log.warning("this session counts no steps, and does not end at step %d", step)
            return

        def look() -> None:
            done = self.step(session)
            if done is not None and done >= step:
                ask_stop()

        boundary.call_after_each(look)
        look()

    def call_after_steps(self, session: Any, steps: int, callback: Callable[[], int]) -> None:
        """Count the runs that change the model. A session that is not ours reports no runs."""
        boundary = _boundary(session)
        if boundary is None:
            _log.warning("this session does not mark its steps: no checkpoints are taken by steps")
            return
        boundary.call_after_steps(steps, callback)

    def progress(self, session: Any) -> object:
        """The number of runs that may have changed the state, and the global step, which other processes may raise."""
        boundary = _boundary(session)
        return (None if boundary is None else boundary.steps, self.step(session))

    def steps_done(self, session: Any) -> StepsDone | None:
        """The runs of this process that may have changed the state. A session that is not ours does not tell."""
        boundary = _boundary(session)
        return None if boundary is None else StepsDone(*boundary.last_step)

    def is_shared(self, session: Any) -> bool:
        """True for a model on a server, and for a session whose steps are not marked: others may change the model."""
        return _boundary(session) is None or not session.is_local

    def wait_for_others(self, session: Any, timeout_secs: float, *, may_go_on: bool) -> None:
        """Wait for the last steps of the other replicas: they end when they see the step that ended this replica."""
        boundary = _boundary(session)
        if self._model.global_step is None or boundary is None or session.is_local:
            return
        wait_for_standstill(lambda: self.step(session), boundary.usual_secs, timeout_secs, may_go_on=may_go_on)

    def at_boundary(self, session: Any, what: str, patience_secs: float | None = None) -> AbstractContextManager[None]:
        """Hold back the steps of this process. A session that is not ours has no boundary to wait for."""
        boundary = _boundary(session)
        return nullcontext() if boundary is None else boundary.hold(what, patience_secs=patience_secs)

    # --- checkpoints ---

    def snapshot(self, session: Any) -> TensorSnapshot | WrittenSnapshot:
        """Fetch the tensors that the saver would save. If only the saver knows them, have it save."""
        # A sharded saver writes where the variables live. Any other saver brings them to one place, as a fetch does.
        if self._plan is not None and isinstance(session, Session) and (session.is_local or self._plan.is_central):
            taken = self._plan.take(session.read, self._model.global_step)
            if session.trace is not None and taken.step is not None:
                session.trace.saved(taken.step)
            return taken
        with self._model.graph.as_default():
            step = self.step(session)
            # No other arguments: a saver with a save() of its own may know only the oldest ones.
            path = self._model.saver.save(session, self._save_path, global_step=self._model.global_step)
        written = tensorflow_files.without_pattern(os.fspath(path)) if path else self._found(step)
        # The saver has read the step itself, possibly after more steps: its file name has the right step.
        _, dash, digits = os.path.basename(written).rpartition("-")
        return WrittenSnapshot(step=int(digits) if dash and digits.isdigit() else step, written=written)

    def _found(self, step: int | None) -> str:
        """The prefix that the saver has written, if its ``save()`` does not return it.

        That is the last prefix on the saver's own list, else the one with the expected name. If no file of either
        exists, only the directory is known and returned.
        """
        directory = os.path.dirname(str(self._save_path))
        for prefix in (*self._last_checkpoints()[-1:], os.path.join(directory, self.checkpoint_name(step))):
            if any(tf.io.gfile.exists(one) for one in (tensorflow_files.entry_file(prefix), prefix)):
                return prefix
        return directory

    def non_finite(self, snapshot: Any) -> Sequence[str]:
        """The names of variables (optimizer slots included) that hold NaN or infinity."""
        if isinstance(snapshot, WrittenSnapshot):
            reader = _v1.train.NewCheckpointReader(snapshot.written)
            types = reader.get_variable_to_dtype_map()
            floats = [name for name, dtype in types.items() if dtype.is_floating or dtype.is_complex]
            return [name for name in sorted(floats) if not is_finite(reader.get_tensor(name))]
        if self._plan is None:
            raise AssertionError("a snapshot without a plan was written by its saver")
        return self._plan.non_finite(snapshot)

    def checkpoint_name(self, step: int | None) -> str:
        """The saver's own naming: ``model.ckpt-1200``, or zero-padded where the saver pads.

        A step that no name can hold, such as a negative one, is left out.
        """
        basename = os.path.basename(str(self._save_path))
        if step is None or not 0 <= step < 10**MOST_DIGITS:
            return basename
        padded = getattr(self._model.saver, "_pad_step_number", False)
        return f"{basename}-{step:08d}" if padded else f"{basename}-{step}"

    def write(self, snapshot: Any, stage: Path, name: str) -> dict[str, tuple[int, str]]:
        """Write an ordinary TensorFlow checkpoint with its meta graph."""
        if self._plan is None:
            raise AssertionError("a snapshot without a plan was written by its saver")
        digests = write_bundle(stage / name, self._plan.sharded(snapshot))
        with NewFile(stage / tensorflow_files.meta_file(name)) as meta:
            meta.write(self._meta_bytes())
        return {**digests, meta.path.name: (meta.size, meta.digest)}

    def kept_checkpoints(self) -> list[str]:
        """The names on the saver's own list, which includes checkpoints that the program itself has saved by it."""
        kept = [path for path in self._last_checkpoints() if self._is_in_place(path)]
        return [os.path.basename(tensorflow_files.without_pattern(path)) for path in kept]

    def committed(self, kept: Sequence[tuple[str, float]]) -> None:
        """Keep the saver's list true, so that it prunes rightly when the program calls ``saver.save`` itself. There is
        room, now, for what a full disk has held up.
        """
        if self._is_graph_due and self._logdir:
            self._is_graph_due = not write_graph(self._model.graph, self._logdir)
        if kept and hasattr(self._model.saver, "set_last_checkpoints_with_time"):
            # Checkpoints that the program has saved elsewhere stay on the list, for the saver to prune.
            elsewhere = [(path, 0.0) for path in self._last_checkpoints() if not self._is_in_place(path)]
            # Spelt as the program spells them, so that its saver knows them again.
            place = os.path.dirname(str(self._save_path))
            mine = [(os.path.join(place, os.path.basename(path)), time) for path, time in kept]
            self._model.saver.set_last_checkpoints_with_time([*elsewhere, *mine])

    def _last_checkpoints(self) -> list[str]:
        return list(getattr(self._model.saver, "last_checkpoints", ()))

    def _is_in_place(self, path: str) -> bool:
        # The same directory may be written as "logs" and as "./logs".
        return os.path.abspath(os.path.dirname(path)) == os.path.abspath(os.path.dirname(str(self._save_path)))

    def _meta_bytes(self) -> bytes:
        # The graph is finalised, so one export is enough, unless the program un-finalises it and goes on building.
        graph = self._model.graph
        if self._exported_meta is None or self._exported_meta[0] != graph.version:
            with graph.as_default():
                self._exported_meta = (graph.version, self._export_meta())
        return self._exported_meta[1]

    def _export_meta(self) -> bytes:
        for _ in range(_EXPORTS):
            try:
                return bytes(self._model.saver.export_meta_graph().SerializeToString())
            except KeyError:
                # Another thread is just adding an operation, which is not complete yet.
                time.sleep(_EXPORT_PAUSE_SECS)
        return bytes(self._model.saver.export_meta_graph().SerializeToString())

    @contextmanager
    def _around_save(self, fetches: str, feed_dict: Any) -> Iterator[None]:
        """Wrap a run that the program makes by the name of an operation, in case that is a Saver's save operation.

        Meanwhile our own saves wait. A checkpoint that the Saver overwrites loses its commit: it then counts as one
        that TensorFlow's own tools wrote, and its Saver prunes it.
        """
        with contextlib.ExitStack() as saving:
            if feed_dict and self._store is not None and self._is_save(fetches):
                place = os.path.realpath(self._store.root)
                for path in feed_dict.values():
                    if isinstance(path, str) and os.path.realpath(os.path.dirname(path) or os.curdir) == place:
                        saving.enter_context(self._store.program_saves(os.path.basename(path)))
            yield

    def _is_save(self, fetches: str) -> bool:
        """Whether a run of the operation or tensor with that name writes a checkpoint, by any Saver."""
        if fetches not in self._saves:
            try:
                element = self._model.graph.as_graph_element(fetches)
            except (KeyError, ValueError):
                return False  # The run itself reports that no element has that name.
            self._saves[fetches] = bool(save_operations(element, _SAVES))
        return self._saves[fetches]

    # --- summaries ---

    def summarise(self, session: Any) -> None:
        """Run the summary operation together with the global step, and write what it returns."""
        events, model = self._events, self._model
        if events is None:
            return
        with model.graph.as_default(), self._summary_boundary(session):
            fetched = summary_tensor(model.summary_op, model.graph)
            if model.global_step is None:
                summary, step = session.run(fetched), None
            else:
                summary, step = session.run([fetched, model.global_step])
                step = as_step(step)
        _log.info("recording summary at step %s", step)
        self.write_summary(summary, step)

    def write_summary(self, summary: Any, step: int | None) -> None:
        """Write a Summary proto, or the bytes of one, to the event log. Any thread."""
        if self._events is not None:
            self._events.summary(summary, step)
        if self._watch is not None:
            self._watch.look(of_summary(summary), step)

    def trace_summary(self, session: Any, summary: Any) -> None:
        """Tell the trace the scalars of a summary that the program has computed; not those of a service on a timer."""
        trace = session.trace if isinstance(session, Session) else None
        if trace is not None and not isinstance(threading.current_thread(), LooperThread):
            trace.report(of_summary(summary))

    @contextmanager
    def _summary_boundary(self, session: Any) -> Iterator[None]:
        boundary = _boundary(session)
        with contextlib.ExitStack() as held:
            if boundary is not None:
                try:
                    hold = boundary.hold(
                        "a summary", patience_secs=_SUMMARY_PATIENCE_SECS, at_most_secs=_SUMMARY_HOLD_SECS
                    )
                    held.enter_context(hold)
                except NoBoundaryError as error:
                    # A summary that mixes two steps is better than none, and better than the end of the run.
                    _log.info("the summary may mix two steps: %s", error)
            yield


def _boundary(session: Any) -> Boundary | None:
    return session.boundary if isinstance(session, Session) else None


def _global_variables(graph: Any) -> list[Any]:
    return list(graph.get_collection(_v1.GraphKeys.GLOBAL_VARIABLES))
