"""The contract: a Supervisor for TensorFlow graph programs, a drop-in for ``tf.compat.v1.train.Supervisor``."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from stepguard.engine import Prepared
from stepguard.options import Guarding, Mirror, Options, Restoring, Saving, Stopping, Watching, each_option_once, refuse
from stepguard.store import CheckpointStore, tensorflow_files
from stepguard.supervisor import Supervisor as CoreSupervisor
from stepguard.tensorflow import arguments, defaults
from stepguard.tensorflow.checkpoint.restore import ENGINE, Restorer
from stepguard.tensorflow.checkpoint.snapshot import as_step, plan
from stepguard.tensorflow.cluster.remote_session import RemoteSession
from stepguard.tensorflow.coordinator import Coordinator
from stepguard.tensorflow.engine import TensorFlowEngine
from stepguard.tensorflow.events import TensorFlowEvents, open_writer
from stepguard.tensorflow.session import Session
from stepguard.tensorflow.session_manager import SessionManager
from stepguard.tensorflow.subclassing import Subclassable, is_same, refuse_names
from stepguard.watching import trial
from stepguard.words import logger

_log = logger(__name__)
_v1 = tf.compat.v1

_MAX_WAIT_SECS = 7200

# The attributes that the core needs as long as the Supervisor lives; a subclass must not set them.
_CORE = (
    "_built_from",
    "_built_in",
    "_engine",
    "_events",
    "_everyones_logdir",
    "_given_options",
    "_guard",
    "_has_summaries",
    "_life",
    "_observer",
    "_options",
    "_own_manager",
    "_own_writer",
    "_saved_plan",
    "_saved_store",
    "_saving",
    "_store",
    "_tensorflow",
    "_tensorflow_events",
    "_worker_role",
)


class Supervisor(Subclassable, CoreSupervisor[Any]):
    """Initialises or restores a model, saves it, writes its summaries, stops cleanly, and comes back after a crash.

    The arguments up to ``local_init_run_options`` are those of ``tf.compat.v1.train.Supervisor``, in its order and
    with its defaults. ``USE_DEFAULT`` takes the part from the graph's collections, or builds it and adds it there. The
    constructor finalises the graph.

    Args:
        graph: the graph of the model; the default graph if ``None``.
        ready_op: 1-D string tensor with the names of what is not ready. ``None`` checks nothing.
        ready_for_local_init_op: the same, checked before ``local_init_op`` is run.
        is_chief: whether this process initialises, restores, saves and logs; the other processes wait for it.
        init_op: run by the chief when nothing can be restored. ``None`` initialises only through ``init_fn``.
        init_feed_dict: feeds for ``init_op``.
        local_init_op: run in every new session: tables and local variables. ``None`` runs nothing.
        logdir: directory for checkpoints and events, created if missing. ``None`` writes no files.
        summary_op: returns a serialised Summary. ``None`` computes no summaries.
        saver: saves and restores the model. ``None`` does neither.
        global_step: integer tensor of rank 0, or of rank 1 and size 1, that counts steps. ``None`` counts none.
        save_summaries_secs: seconds between summaries; 0 or ``None`` computes none.
        save_model_secs: seconds between checkpoints; 0 or ``None`` takes none.
        recovery_wait_secs: the longest time between two checks while waiting for the chief, in seconds.
        stop_grace_secs: how long threads may take to stop, in seconds.
        checkpoint_basename: basename of the checkpoints.
        session_manager: creates the sessions, in place of one made from these arguments.
        summary_writer: writes the events, in place of one made for ``logdir``. ``None`` writes none.
        init_fn: ``init_fn(session)``, called after ``init_op`` when nothing could be restored.
        local_init_run_options: ``RunOptions`` for ``local_init_op``.
        saving: when the model is saved. Keyword only, like all that follow; these groups are Stepguard's own. An option
            that is also listed above may be given in its group instead. The Saver says how many checkpoints are kept.
        stopping: how the run is stopped.
        watching: how the run is watched.
        guarding: what happens if a number is not finite.
        restoring: how the run is restored.
        mirror: where a second copy of the run goes: an address such as ``s3://bucket/runs/x``, a directory, or a
            :class:`stepguard.Mirror`.

    Raises:
        RuntimeError: eager execution is enabled.
        TypeError, ValueError: an argument is of the wrong type or value; the message names it.
    """

    USE_DEFAULT = defaults.USE_DEFAULT

    # Those of a subclass whose constructor does not call ours.
    _given_options = Options.of()
    _everyones_logdir: str | None = None
    _own_writer: Any = None
    _own_manager: SessionManager | None = None

    @each_option_once
    def __init__(
        self,
        graph: Any = None,
        ready_op: Any = USE_DEFAULT,
        ready_for_local_init_op: Any = USE_DEFAULT,
        is_chief: bool = True,
        init_op: Any = USE_DEFAULT,
        init_feed_dict: Any = None,
        local_init_op: Any = USE_DEFAULT,
        logdir: Any = None,
        summary_op: Any = USE_DEFAULT,
        saver: Any = USE_DEFAULT,
        global_step: Any = USE_DEFAULT,
        save_summaries_secs: Any = 120,
        save_model_secs: Any = 600,
        recovery_wait_secs: Any = 30,
        stop_grace_secs: Any = 120,
        checkpoint_basename: str = "model.ckpt",
        session_manager: Any = None,
        summary_writer: Any = USE_DEFAULT,
        init_fn: Callable[[Any], object] | None = None,
        local_init_run_options: Any = None,
        *,
        saving: Saving | None = None,
        stopping: Stopping | None = None,
        watching: Watching | None = None,
        guarding: Guarding | None = None,
        restoring: Restoring | None = None,
        mirror: str | os.PathLike[str] | Mirror | None = None,
    ) -> None:
        if tf.executing_eagerly():
            raise RuntimeError(
                "stepguard.tensorflow.Supervisor supervises graph programs, and eager execution is enabled here: "
                "build the model and the Supervisor inside `with tf.Graph().as_default():`, or call "
                "tf.compat.v1.disable_eager_execution() first"
            )
        options = Options.of(
            **arguments.forgiving(
                is_chief=bool(is_chief),
                logdir=logdir,
                save_summaries_secs=save_summaries_secs,
                save_model_secs=save_model_secs,
                stop_grace_secs=stop_grace_secs,
                checkpoint_basename=checkpoint_basename,
            ),
            saving=saving,
            stopping=stopping,
            watching=watching,
            guarding=guarding,
            restoring=restoring,
            mirror=mirror,
        )
        logdir, options = trial.applied(logdir, options)
        if trial.is_deterministic():
            tf.config.experimental.enable_op_determinism()
        refuse(
            saving,
            "max_to_keep",
            "keep_checkpoint_every_n_hours",
            because="TensorFlow's Saver has this option: pass saver=tf.compat.v1.train.Saver(...) with it",
        )
        refuse(saving, "frozen_apart", because="it is for PyTorch; TensorFlow's Saver writes all variables to one file")
        refuse(
            restoring,
            *("hyperparameters", "only", "leave_out", "init_from", "init_fit"),
            because="it is for PyTorch; with TensorFlow a Saver's var_list says what is restored, and init_fn is "
            "called when nothing was",
        )
        if session_manager is not None:
            because = "the session manager that was given waits and restores by its own rules"
            refuse(watching, "peer_timeout_secs", because=because)
            refuse(restoring, "start_over_when_all_damaged", "step", because=because)
        graph = _v1.get_default_graph() if graph is None else graph
        given = arguments.checked(
            options,
            is_chief=bool(is_chief),
            graph=graph,
            ready_op=ready_op,
            ready_for_local_init_op=ready_for_local_init_op,
            init_op=init_op,
            init_feed_dict=init_feed_dict,
            local_init_op=local_init_op,
            logdir=logdir,
            summary_op=summary_op,
            saver=saver,
            global_step=global_step,
            recovery_wait_secs=recovery_wait_secs,
            session_manager=session_manager,
            summary_writer=summary_writer,
            init_fn=init_fn,
            local_init_run_options=local_init_run_options,
        )
        before = dict(vars(self))
        self._given_options = options
        self._everyones_logdir = os.fspath(given["logdir"]) if given["logdir"] else None
        with graph.as_default():
            self._init_ready_op(ready_op=given["ready_op"], ready_for_local_init_op=given["ready_for_local_init_op"])
            self._init_init_op(init_op=given["init_op"], init_feed_dict=given["init_feed_dict"])
            self._init_local_init_op(local_init_op=given["local_init_op"])
            self._init_saver(saver=given["saver"])
            self._init_summary_op(summary_op=given["summary_op"])
            self._init_global_step(global_step=given["global_step"])
        self._graph = graph
        self._is_chief = is_chief
        self._coord = Coordinator()
        self._recovery_wait_secs = given["recovery_wait_secs"]
        self._stop_grace_secs = options.stopping.stop_grace_secs
        self._init_fn = given["init_fn"]
        self._local_init_run_options = given["local_init_run_options"]
        self._logdir = self._everyones_logdir if is_chief else None
        self._save_summaries_secs = options.watching.save_summaries_secs if is_chief else None
        self._save_model_secs = options.saving.save_model_secs if is_chief else None
        self._save_path = os.path.join(self._logdir, options.saving.checkpoint_basename) if self._logdir else None
        self._plan_saving()
        with graph.as_default():
            self._meta_graph_def = _v1.train.export_meta_graph(
                graph_def=graph.as_graph_def(add_shapes=True), saver_def=getattr(self._saver, "saver_def", None)
            )
        self._graph_added_to_summary = False
        self._own_writer = self._own_manager = None
        self._summary_writer = given["summary_writer"] if is_chief else None
        self._init_session_manager(session_manager=session_manager)
        self._verify_setup()
        if defaults.is_default(self._summary_writer):
            self._summary_writer = self._own_writer = open_writer(self._logdir) if self._logdir else None
        self._build_core()
        refuse_names(type(self), sorted(name for name in before if vars(self)[name] is not before[name]))
        # From here on the graph must not change: every session, thread and checkpoint relies on it.
        graph.finalize()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Only what is missing is looked for here.
            if name not in (*_CORE, "_core_as_built") or "_session_manager" not in vars(self):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            self._complete_core()
            return vars(self)[name]

    def _complete_core(self) -> None:
        """Build what is missing in an object whose own constructor has set TensorFlow's attributes, and no others."""
        self._given_options, self._everyones_logdir = Options.of(), self._logdir
        self._own_writer, self._own_manager = None, self._own_manager
        self._plan_saving()
        self._build_core()

    def _init_session_manager(self, session_manager: Any = None) -> None:
        if session_manager is None:
            session_manager = self._own_manager = SessionManager(
                local_init_op=self._local_init_op,
                ready_op=self._ready_op,
                ready_for_local_init_op=self._ready_for_local_init_op,
                graph=self._graph,
                recovery_wait_secs=self._recovery_wait_secs,
                local_init_run_options=self._local_init_run_options,
                wait_for_stop=self._coord.wait_for_stop,
                peer_timeout_secs=self._given_options.watching.peer_timeout_secs,
                on_lost=self._coord.report,
            )
        self._session_manager = session_manager

    def _write_graph(self) -> None:
        """Write the graph to the logdir and to the event log."""
        self._tensorflow.write_graph()
        self._graph_added_to_summary = self._tensorflow_events is not None

    def _plan_saving(self) -> None:
        """Find out where and how the saver saves. Errors in that are raised before anything is written."""
        saver, path, options = self._part("saver"), self._part("save_path"), self._given_options
        saves_model = bool(saver) and path is not None
        self._saved_store = _open_store(path, saver, options.saving.keep_best) if saves_model else None
        self._saved_plan = plan(saver, self._graph) if self._saved_store is not None else None
        options.check_return(commits=self._saved_store is not None)
        if options.guarding.nan_guard is not None and saves_model and options.saving.is_on and self._saved_plan is None:
            raise ValueError(
                "nan_guard looks at the state before it is saved, and this saver writes by means of its own (a "
                "subclass of Saver, an old format, or a place that only TensorFlow can reach): use a "
                "tf.compat.v1.train.Saver and a logdir on this machine's file systems, saver=None, or nan_guard=None"
            )

    def _build_core(self) -> None:
        """Make the engine and the core from the attributes. Called again if a subclass has set other values."""
        parts, options = self._parts(), self._given_options
        writer, manager, own_manager = parts["summary_writer"], parts["session_manager"], self._own_manager
        if own_manager is not None and own_manager is manager:
            own_manager.restorer = Restorer(self._saved_store, options.restoring)
        if self._is_chief:
            options = replace(
                options,
                saving=replace(options.saving, save_model_secs=parts["save_model_secs"]),
                watching=replace(options.watching, save_summaries_secs=parts["save_summaries_secs"]),
            )
        options = replace(options, stopping=replace(options.stopping, stop_grace_secs=parts["stop_grace_secs"]))
        self._tensorflow_events = TensorFlowEvents(writer, is_ours=writer is self._own_writer) if writer else None
        self._tensorflow = TensorFlowEngine(
            defaults.Model(**{name: parts[name] for name in defaults.Model.__dataclass_fields__}),
            meta_graph=parts["meta_graph_def"],
            session_manager=manager,
            plan=self._saved_plan,
            events=self._tensorflow_events,
            logdir=parts["logdir"],
            save_path=parts["save_path"],
            init_fn=parts["init_fn"],
            store=self._saved_store,
            not_joined=self._coord.not_joined,
        )
        super().__init__(
            self._tensorflow,
            coord=self._coord,
            is_chief=bool(self._is_chief),
            logdir=parts["logdir"] if self._is_chief else self._everyones_logdir,
            store=self._saved_store,
            events=self._tensorflow_events,
            has_summaries=parts["summary_op"] is not None,
            saves_model=bool(parts["saver"]) and parts["save_path"] is not None,
            options=options,
            role=arguments.worker_role(),
        )
        self._built_from = parts
        self._core_as_built = {name: vars(self)[name] for name in _CORE}

    def _refuse_changes(self) -> None:
        """Refuse attributes of the core that a subclass or the program has set. Raises TypeError."""
        built = self._core_as_built
        refuse_names(type(self), sorted(name for name in built if vars(self)[name] is not built[name]))

    def _take_changes(self) -> None:
        """Use the attributes that a subclass or the program has set since the last session."""
        self._refuse_changes()
        parts = self._parts()
        if is_same(parts, self._built_from):
            return
        if not is_same(parts, self._built_from, ("saver", "save_path")):
            self._plan_saving()
        self._build_core()

    # --- the parts of the supervisor ---

    @property
    def session_manager(self) -> Any:
        """The SessionManager that creates the sessions."""
        return self._session_manager

    @property
    def init_op(self) -> Any:
        """The operation that initialises the model, or ``None``."""
        return self._init_op

    @property
    def init_feed_dict(self) -> Any:
        """The feeds for ``init_op``, or ``None``."""
        return self._init_feed_dict

    @property
    def ready_op(self) -> Any:
        """The tensor with the names of what is not ready, or ``None``."""
        return self._ready_op

    @property
    def ready_for_local_init_op(self) -> Any:
        """The tensor with the names of what must be ready before ``local_init_op`` is run, or ``None``."""
        return self._ready_for_local_init_op

    @property
    def saver(self) -> Any:
        """The Saver, or ``None``."""
        return self._saver

    @property
    def save_path(self) -> str | None:
        """The prefix of the checkpoints, without the step; ``None`` in a worker, or without a logdir."""
        return self._save_path

    @property
    def save_model_secs(self) -> float | None:
        """Seconds between timed checkpoints; ``None`` in a worker."""
        return self._save_model_secs

    @property
    def save_summaries_secs(self) -> float | None:
        """Seconds between summaries; ``None`` in a worker."""
        return self._save_summaries_secs

    @property
    def summary_op(self) -> Any:
        """The tensor of the serialised Summary, or ``None``."""
        return self._summary_op

    @property
    def summary_writer(self) -> Any:
        """The writer of the event file, or ``None``."""
        return self._summary_writer

    @property
    def global_step(self) -> Any:
        """The integer tensor that counts steps, or ``None``."""
        return self._global_step

    # --- sessions ---

    def prepare_or_wait_for_session(
        self,
        master: str = "",
        config: Any = None,
        wait_for_checkpoint: bool = False,
        max_wait_secs: float | None = _MAX_WAIT_SECS,
        start_standard_services: bool = True,
    ) -> Any:
        """A session on ``master`` with a ready model. The chief restores or initialises it; a worker waits for that.

        Args:
            master: ``""`` for this process, ``"local"``, or ``"grpc://host:port"``.
            config: ``ConfigProto`` for the session.
            wait_for_checkpoint: whether the chief waits for a checkpoint to appear rather than initialise.
            max_wait_secs: how long to wait for a checkpoint or for the model, in seconds; ``None`` for ever.
            start_standard_services: whether to start the services and the queue runners.

        Raises:
            RuntimeError: the model could not be made ready; or ``nan_guard="return"`` was given and the model is on a
                server, or the session does not mark its steps.
            tf.errors.DeadlineExceededError: a worker has waited ``max_wait_secs`` for its chief.
        """
        if self._given_options.guarding.returns and master:
            raise RuntimeError(
                f"nan_guard='return' is for a model in this process, and the master is {master!r}: others may train "
                f"the same model; use nan_guard='stop', and start the run again from its newest checkpoint"
            )

        self._take_changes()

        def prepare() -> Prepared[Any]:
            prepared = self._tensorflow.prepare(
                is_chief=self._is_chief,
                master=master,
                config=config,
                wait_for_checkpoint=wait_for_checkpoint,
                max_wait_secs=max_wait_secs,
            )
            session = prepared.session
            try:
                if self._is_chief:
                    self._write_graph()
            except BaseException:
                session.close()
                raise
            if self._given_options.guarding.returns and not isinstance(session, Session):
                session.close()
                raise RuntimeError(
                    f"nan_guard='return' needs to know the step boundaries, and a {type(session).__name__} of the "
                    f"program's own session manager does not mark them; use nan_guard='stop'"
                )
            return prepared

        def start_queue_runners(session: Any) -> None:
            with self._graph.as_default():
                self.start_queue_runners(session)

        return self.open_session(
            prepare,
            start_standard_services,
            waits_for_another=wait_for_checkpoint,
            on_open=start_queue_runners if start_standard_services else None,
        )

    def managed_session(
        self,
        master: str = "",
        config: Any = None,
        start_standard_services: bool = True,
        close_summary_writer: bool = True,
        *,
        max_wait_secs: float | None = _MAX_WAIT_SECS,
    ) -> AbstractContextManager[Any]:
        """A context that returns a prepared session. The end of its block ends the run.

        An error of the block or of a service is raised again after all threads have stopped and the session is
        closed. ``OutOfRangeError`` means the end of the input: the run ends cleanly.

        Args:
            master: see :meth:`prepare_or_wait_for_session`, also for ``config`` and ``max_wait_secs``.
            config: ``ConfigProto`` for the session.
            start_standard_services: whether to start the services and the queue runners.
            close_summary_writer: whether to close the summary writer at the end.
            max_wait_secs: keyword only; how long to wait for the model, in seconds.
        """
        # Like TensorFlow's class, so that a subclass may override the method with fewer arguments.
        others: dict[str, Any] = {} if max_wait_secs == _MAX_WAIT_SECS else {"max_wait_secs": max_wait_secs}

        def open_session() -> Any:
            return self.prepare_or_wait_for_session(
                master=master, config=config, start_standard_services=start_standard_services, **others
            )

        self._refuse_changes()
        return self.managed(open_session, close_summary_writer=close_summary_writer)

    def start_queue_runners(self, sess: Any, queue_runners: Iterable[Any] | None = None) -> list[threading.Thread]:
        """Start the threads of ``queue_runners`` (by default those in the graph's collection) and return the threads.

        Raises:
            RuntimeError: eager execution is enabled.
        """
        if tf.executing_eagerly():
            raise RuntimeError(
                "start_queue_runners: queues belong to graph programs, and eager execution is enabled here; call it "
                "inside `with graph.as_default():`, or read the input with tf.data"
            )
        if queue_runners is None:
            queue_runners = self._graph.get_collection(_v1.GraphKeys.QUEUE_RUNNERS)
        if isinstance(sess, RemoteSession):
            sess = sess.for_queue_runners(self._coord.should_stop)
        threads: list[threading.Thread] = []
        for runner in queue_runners:
            threads.extend(runner.create_threads(sess, coord=self._coord, daemon=True, start=True))
        return threads

    def summary_computed(self, sess: Any, summary: Any, global_step: int | None = None) -> None:
        """Write a summary that the program has computed itself.

        Args:
            sess: the session, from which the step is fetched when ``global_step`` is ``None``.
            summary: a Summary proto, or the bytes of one.
            global_step: the step of the summary.

        Raises:
            TypeError: ``summary`` is neither a Summary proto nor bytes.
            RuntimeError: there is no summary writer, because there is no ``logdir`` or this process is a worker.
        """
        if self._tensorflow_events is None:
            raise RuntimeError(
                "summary_computed: expected a summary writer, found none: it needs a chief with a logdir (or a "
                "summary_writer)"
            )
        if not isinstance(summary, (bytes, _v1.Summary)):
            raise TypeError(
                f"summary_computed: expected a Summary proto or its serialised bytes, found "
                f"{type(summary).__name__}: {summary!r:.80}"
            )
        if global_step is None:
            global_step = self._engine.step(sess)
        self._tensorflow.write_summary(summary, None if global_step is None else as_step(global_step))
        self._tensorflow.trace_summary(sess, summary)

    # --- beside the contract ---

    def metrics(self, sess: Any, values: Mapping[str, Any]) -> None:
        """Note numbers that were measured of the state of the last step, such as a loss on held-out data.

        They are in the manifest of that step's checkpoint. With ``Saving(keep_best=...)`` the step is saved now if
        it is one of the best. It is a method of the Supervisor, as `summary_computed` is, because a session may be one
        of the program's own. Call it from the thread that trains, before its next step.

        Raises:
            TypeError: a value is no number; the message names it.
        """
        self.keep_metrics(sess, values)

    def save(self, sess: Any, name: str | None = None) -> None:
        """Save the state of the last step now; with a ``name``, it is kept until ``stepguard unkeep`` takes that away.

        The files are written in the background. A name that another checkpoint has moves to this one.

        Raises:
            TypeError, ValueError: ``name`` is no word.
        """
        self.keep_checkpoint(sess, name)

    # --- the aliases of the contract ---

    PrepareSession = prepare_or_wait_for_session
    StartQueueRunners = start_queue_runners
    StartStandardServices = CoreSupervisor.start_standard_services
    Stop = CoreSupervisor.stop
    RequestStop = CoreSupervisor.request_stop
    Loop = CoreSupervisor.loop
    ShouldStop = CoreSupervisor.should_stop
    StopOnException = CoreSupervisor.stop_on_exception
    WaitForStop = CoreSupervisor.wait_for_stop
    SummaryComputed = summary_computed


def _open_store(save_path: str | None, saver: Any, keep_best: tuple[str, str, int] | None) -> CheckpointStore | None:
    """The store for ``save_path``; ``None`` if only TensorFlow can reach its file system."""
    if save_path is None or "://" in save_path:
        return None
    definition = getattr(saver, "saver_def", None)
    hours = getattr(definition, "keep_checkpoint_every_n_hours", 0)
    max_to_keep = getattr(definition, "max_to_keep", None)
    if max_to_keep is not None and max_to_keep < 0:
        _log.warning("saver: expected max_to_keep >= 0, found %d: all checkpoints are kept", max_to_keep)
        max_to_keep = None
    root, basename = os.path.split(save_path)
    return CheckpointStore(
        root or os.curdir,
        basename=basename,
        engine=ENGINE,
        saver_files=tensorflow_files,
        relative_paths=bool(getattr(saver, "_save_relative_paths", False)),
        max_to_keep=max_to_keep,
        # The Saver's own default of 10,000 hours means never.
        keep_every_n_hours=hours if 0 < hours < 10_000 else None,
        keep_best=keep_best,
    )
