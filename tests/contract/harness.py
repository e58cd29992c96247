"""Runs one scenario on TensorFlow's own Supervisor and on ours, and compares what can be seen of the two.

A scenario is a function ``scenario(side, logdir)``. It is called inside a new graph, builds its model, drives
``side.Supervisor`` and returns a record: plain values in which paths are written relative to the logdir and nothing
depends on time. ``assert_same`` runs it on both sides and compares the records. What is known to differ is listed in
``departures.py`` and shown by ``test_departures.py``; the records leave out those differences and no others.

TensorFlow's services only work in threads that are in graph mode, which new threads are after
``tf.compat.v1.disable_eager_execution()``. That cannot be undone within a process, so its side runs with the one
setting of it that matters. Ours runs in plain TensorFlow 2.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context as eager_context

v1 = tf.compat.v1

DEADLINE_SECS = 60.0

# What stands in a logdir of ours and not in one of TensorFlow's: departure "our-files".
_OUR_FILES = (".manifest.json", ".stepguard.lock", "run.jsonl")
_OUR_FOLDERS = ("quarantine", "heartbeats/", "traces/")


@dataclass(frozen=True)
class Side:
    """One of the two implementations that are compared."""

    name: str
    Supervisor: Any
    SessionManager: Any


THEIRS = Side("tensorflow", v1.train.Supervisor, v1.train.SessionManager)

if os.environ.get("STEPGUARD_CONTRACT_SELF_CHECK"):
    # The reference against itself: shows that the scenarios are deterministic and the records comparable.
    OURS = Side("itself", THEIRS.Supervisor, THEIRS.SessionManager)
else:
    from stepguard.tensorflow import SessionManager, Supervisor

    OURS = Side("stepguard", Supervisor, SessionManager)

SIDES = (THEIRS, OURS)

Scenario = Callable[[Side, str], Any]


@contextmanager
def threads_in_graph_mode() -> Iterator[None]:
    """New threads start in graph mode, as after ``tf.compat.v1.disable_eager_execution()``."""
    eager_context.context().executing_eagerly()  # this thread's own mode is settled by now, and stays
    before = eager_context.default_execution_mode
    eager_context.default_execution_mode = eager_context.GRAPH_MODE
    try:
        yield
    finally:
        eager_context.default_execution_mode = before


def run(scenario: Scenario, side: Side, folder: Path, *, eager_threads: bool | None = None) -> Any:
    """The record of ``scenario`` on ``side``; ``eager_threads``: whether new threads are as in plain TensorFlow 2."""
    if eager_threads is None:
        eager_threads = side.Supervisor is not THEIRS.Supervisor
    logdir = folder / side.name
    if eager_threads:
        with tf.Graph().as_default():
            return scenario(side, str(logdir))
    with threads_in_graph_mode(), tf.Graph().as_default():
        return scenario(side, str(logdir))


def assert_same(scenario: Scenario, folder: Path) -> Any:
    """Both sides leave the same record. Returns it, so that a test can also say what it must contain."""
    theirs = run(scenario, THEIRS, folder)
    ours = run(scenario, OURS, folder)
    assert ours == theirs
    return theirs


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model whose state says how many steps it has done: each step adds one to every weight, and counts."""

    train_op: Any
    weights: Any
    global_step: Any


def counting_model(*, step: bool = True, summary: bool = True, resource: bool = True) -> Model:
    """Build the model in the default graph."""
    weights = v1.get_variable("weights", shape=[2], initializer=v1.zeros_initializer(), use_resource=resource)
    updates = [v1.assign_add(weights, [1.0, 1.0])]
    global_step = None
    if step:
        global_step = v1.get_variable(
            "global_step",
            shape=[],
            dtype=tf.int64,
            initializer=v1.zeros_initializer(),
            trainable=False,
            use_resource=resource,
            collections=[v1.GraphKeys.GLOBAL_VARIABLES, v1.GraphKeys.GLOBAL_STEP],
        )
        updates.append(v1.assign_add(global_step, 1))
    if summary:
        v1.summary.scalar("loss", tf.reduce_sum(weights))
    return Model(tf.group(*updates, name="train"), weights, global_step)


# --- waiting ---------------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], Any], what: Callable[[], str] = lambda: "the condition") -> Any:
    """Wait for ``condition()`` to be true, and return it; fail after a deadline that no healthy run comes near."""
    deadline = time.monotonic() + DEADLINE_SECS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {DEADLINE_SECS:.0f} s in vain for {what()}"
        time.sleep(0.005)
    return value


def wait_for_ticks(sv: Any, logdir: str) -> None:
    """Wait until each of the standard services has done its first work, and it can be read."""
    writer = sv.summary_writer
    missing = set()
    # Not for the rate, which comes with the first tick on one side and with the second on the other: "first_rate".
    if sv.save_summaries_secs and writer and sv.summary_op is not None:
        missing.add("summary")
    if sv.save_model_secs and sv.saver:
        missing.add("checkpoint")
        if writer and sv.global_step is not None:
            missing.add("checkpoint record")

    def done() -> bool:
        if writer:
            writer.flush()
            records = (events(writer.get_logdir()) or [[]])[-1]
            if any(record[:2] == ("session_log", "STOP") for record in records):
                return False  # still the file of the session before
            for record in records:
                if record[:2] == ("session_log", "CHECKPOINT"):
                    missing.discard("checkpoint record")
                elif record[0] == "summary" and not is_rate(record):
                    missing.discard("summary")
        if tf.train.latest_checkpoint(logdir):
            missing.discard("checkpoint")
        return not missing

    wait_until(done, lambda: f"the first {sorted(missing)}")


def wait_for_next_second() -> None:
    """TensorFlow names event files by whole seconds, and overwrites: a second session has to begin in another one."""
    now = int(time.time())
    wait_until(lambda: int(time.time()) > now)


# --- records ---------------------------------------------------------------------------------------------------------


def outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    """What became of a call: ``("returned", value)`` or ``("raised", name of the type)``.

    An error of ours counts as the type that a program written for TensorFlow would catch it by.
    """
    try:
        return "returned", call()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what the two sides are compared by
        return "raised", next(
            kind for kind in type(error).__mro__ if not kind.__module__.startswith("stepguard")
        ).__name__


def relative(path: str | None, logdir: str) -> str | None:
    """The path with the logdir written as ``LOGDIR``."""
    return path if path is None else path.replace(logdir, "LOGDIR")


def files(logdir: str) -> list[str]:
    """The files below the logdir, event files without their time and host."""
    found = []
    root = Path(logdir)
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir() or name.endswith(_OUR_FILES) or name.startswith(_OUR_FOLDERS):
            continue
        found.append(name.split(".tfevents.")[0] + ".tfevents" if ".tfevents." in name else name)
    return found


def checkpoint_state(logdir: str) -> Any:
    """What the state file names as newest and as kept."""
    state = tf.train.get_checkpoint_state(logdir)
    if state is None:
        return None
    return (
        relative(state.model_checkpoint_path, logdir),
        [relative(path, logdir) for path in state.all_model_checkpoint_paths],
    )


def saved_values(prefix: str) -> dict[str, Any]:
    """The tensors of a checkpoint."""
    reader = tf.train.load_checkpoint(prefix)
    return {name: reader.get_tensor(name).tolist() for name in sorted(reader.get_variable_to_shape_map())}


def event_files(logdir: str) -> list[str]:
    """The event files of the logdir, oldest first."""
    return [str(path) for path in sorted(Path(logdir).glob("*.tfevents.*"))]


def events(logdir: str) -> list[list[tuple[Any, ...]]]:
    """Every record of every event file, in the order written: (kind, detail, step)."""
    return [list(_records(path, logdir)) for path in event_files(logdir)]


def _records(path: str, logdir: str) -> Iterator[tuple[Any, ...]]:
    try:
        for event in v1.train.summary_iterator(path):
            yield _record(event, logdir)
    except tf.errors.DataLossError:
        return  # the last record is still being written


def _record(event: Any, logdir: str) -> tuple[Any, ...]:
    kind = event.WhichOneof("what")
    if kind == "session_log":
        log = event.session_log
        path = relative(log.checkpoint_path, logdir)
        return kind, v1.SessionLog.SessionStatus.Name(log.status), event.step, path, log.msg
    if kind == "summary":
        values = tuple((value.tag, round(_scalar(value), 6)) for value in event.summary.value)
        return kind, values, event.step
    if kind == "file_version":
        return kind, event.file_version, event.step
    if kind == "tagged_run_metadata":
        return kind, event.tagged_run_metadata.tag, event.step
    return kind, "", event.step


def is_rate(record: tuple[Any, ...]) -> bool:
    """Whether a record is one of the curve of steps per second."""
    return record[0] == "summary" and any(tag.endswith("/sec") for tag, _ in record[1])


def rates(logdir: str) -> list[tuple[float, int]]:
    """Steps per second, and the step at which they were written, from every event file."""
    return [(record[1][0][1], record[2]) for one in events(logdir) for record in one if is_rate(record)]


def _scalar(value: Any) -> float:
    if value.HasField("simple_value"):
        return float(value.simple_value)
    return float(tf.make_ndarray(value.tensor).reshape(-1)[0]) if value.HasField("tensor") else 0.0


def life(logdir: str) -> list[list[Any]]:
    """The records of each event file in their order, where order is meant.

    The services write from their own threads: what they write between two other records is put together as a set.
    The path, step and number of CHECKPOINT records are left out: departures "checkpoint-path" and "final-checkpoint".
    So are the rates, which are a matter of time: departure "first_rate".
    """
    lives = []
    for records in events(logdir):
        told: list[Any] = []
        services: set[Any] = set()
        for record in records:
            is_checkpoint = record[:2] == ("session_log", "CHECKPOINT")
            if is_rate(record):
                continue
            if record[0] == "summary" or is_checkpoint:
                services.add("CHECKPOINT" if is_checkpoint else record)
                continue
            if services:
                told.append(frozenset(services))
                services = set()
            told.append(record)
        if services:
            told.append(frozenset(services))
        lives.append(told)
    return lives


PROPERTIES = (
    "global_step",
    "init_feed_dict",
    "init_op",
    "is_chief",
    "ready_for_local_init_op",
    "ready_op",
    "save_model_secs",
    "save_path",
    "save_summaries_secs",
    "saver",
    "summary_op",
    "summary_writer",
)


def properties(sv: Any, logdir: str) -> dict[str, Any]:
    """Every property, in words."""
    words = {name: shown(getattr(sv, name), logdir) for name in PROPERTIES}
    words["coord"] = isinstance(sv.coord, tf.train.Coordinator)
    words["session_manager"] = isinstance(sv.session_manager, tf.compat.v1.train.SessionManager)
    return words


def shown(value: Any, logdir: str = "") -> Any:
    """A value in words that do not depend on the side: plain values as they are, parts of a graph by their name."""
    if isinstance(value, str):
        return relative(value, logdir) if logdir else value
    if value is None or isinstance(value, (bool, int, float, dict, bytes)):
        return value
    if isinstance(value, (list, tuple)):
        return [shown(item, logdir) for item in value]
    name = getattr(value, "name", None)
    if isinstance(name, str):
        return f"{name}"
    return type(value).__name__


def collections(graph: Any) -> dict[str, Any]:
    """What the collections of a graph hold, in words."""
    return {key: shown(graph.get_collection(key)) for key in sorted(graph.get_all_collection_keys())}


def operations(graph: Any) -> list[str]:
    """The names of the operations of a graph, in the order in which they were made."""
    return [operation.name for operation in graph.get_operations()]


# --- parts that tell what was asked of them: the real ones, with a list ----------------------------------------------


class RecordingManager:
    """A session manager that is the real one of its side, and remembers how the Supervisor called it."""

    def __init__(self, manager: Any, logdir: str) -> None:
        self._manager = manager
        self._logdir = logdir
        self.calls: list[Any] = []

    def prepare_session(self, *args: Any, **kwargs: Any) -> Any:
        self._remember("prepare_session", args, kwargs)
        return self._manager.prepare_session(*args, **kwargs)

    def wait_for_session(self, *args: Any, **kwargs: Any) -> Any:
        self._remember("wait_for_session", args, kwargs)
        return self._manager.wait_for_session(*args, **kwargs)

    def _remember(self, method: str, args: Any, kwargs: Any) -> None:
        words = {name: shown(value, self._logdir) for name, value in kwargs.items()}
        self.calls.append((method, shown(args, self._logdir), words))


class RecordingWriter(v1.summary.FileWriter):
    """A summary writer that is the real one, and remembers what it was given."""

    def __init__(self, logdir: str) -> None:
        self.calls: list[Any] = []
        super().__init__(logdir)

    def add_summary(self, summary: Any, global_step: Any = None) -> None:
        self.calls.append(("add_summary", global_step))
        super().add_summary(summary, global_step)

    def add_session_log(self, session_log: Any, global_step: Any = None) -> None:
        name = v1.SessionLog.SessionStatus.Name(session_log.status)
        self.calls.append(("add_session_log", name, global_step))
        super().add_session_log(session_log, global_step)

    def add_graph(self, graph: Any, global_step: Any = None, graph_def: Any = None) -> None:
        self.calls.append(("add_graph", graph is v1.get_default_graph(), global_step))
        super().add_graph(graph, global_step, graph_def)

    def add_meta_graph(self, meta_graph_def: Any, global_step: Any = None) -> None:
        self.calls.append(("add_meta_graph", global_step))
        super().add_meta_graph(meta_graph_def, global_step)

    def reopen(self) -> None:
        self.calls.append(("reopen",))
        super().reopen()

    def close(self) -> None:
        self.calls.append(("close",))
        super().close()

    @property
    def order(self) -> list[str]:
        """The calls that are not a service's, in words."""
        words = []
        for name, *details in self.calls:
            if name == "add_summary" or "CHECKPOINT" in details:
                continue
            words.append(" ".join([name, *map(str, details)]))
        return words
