"""Twenty ways in which programs use the Supervisor, each on TensorFlow's own class or on ours: see ``test_uses.py``.

Every program counts its steps in the variable ``done`` and trains until that is ``STEPS``, wherever it began. It is
written as its kind is written in public programs, and knows nothing of the class that it runs on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from zygote import report

from stepguard.tensorflow import SessionManager, Supervisor

v1 = tf.compat.v1

STEPS = 60
# Where a program that is to get a signal waits until that was sent.
_HOLD_AT = 50
_STEP_SECS = 0.01
_TIMES = {"save_model_secs": 0.15, "save_summaries_secs": 0.15, "stop_grace_secs": 20}


class Side:
    """One of the two implementations."""

    def __init__(self, name: str) -> None:
        theirs = name == "tensorflow"
        self.Supervisor: Any = v1.train.Supervisor if theirs else Supervisor
        self.SessionManager: Any = v1.train.SessionManager if theirs else SessionManager


class Model:
    """A model in the default graph; ``step`` does one step, and counts."""

    def __init__(self, *, has_global_step: bool = True, data: Any = None) -> None:
        self.weights = v1.get_variable("weights", [8], initializer=v1.zeros_initializer())
        self.done = v1.get_variable("done", [], tf.int64, v1.zeros_initializer(), trainable=False)
        target = tf.ones([8]) if data is None else tf.fill([8], tf.cast(data, tf.float32))
        loss = tf.reduce_sum(tf.square(self.weights - target))
        v1.summary.scalar("loss", loss)
        step = v1.train.get_or_create_global_step() if has_global_step else None
        trained = v1.train.AdamOptimizer(0.01).minimize(loss, global_step=step)
        with tf.control_dependencies([trained]):
            self.train_op = v1.assign_add(self.done, 1)

    def begin(self, session: Any) -> int:
        """Report where a session begins."""
        done = int(session.run(self.done))
        report("began", done=done)
        return done

    def step(self, session: Any) -> int:
        """Do one step, and report it."""
        done = int(session.run(self.train_op))
        report("step", done=done)
        time.sleep(_STEP_SECS)
        while done >= _HOLD_AT and not _may_go_on():
            time.sleep(_STEP_SECS)
        return done

    def loop(self, sv: Any, session: Any) -> None:
        """The usual loop."""
        done = self.begin(session)
        while not sv.should_stop() and done < STEPS:
            done = self.step(session)


def managed(side: Side, logdir: str, **options: Any) -> None:
    model = Model()
    sv = side.Supervisor(logdir=logdir, **{**_TIMES, **options})
    with sv.managed_session() as session:
        model.loop(sv, session)


def prepared(side: Side, logdir: str) -> None:
    model = Model()
    sv = side.Supervisor(logdir=logdir, **_TIMES)
    session = sv.prepare_or_wait_for_session()
    model.loop(sv, session)
    sv.stop()


def own_summaries(side: Side, logdir: str) -> None:
    model = Model()
    merged = v1.summary.merge_all()
    sv = side.Supervisor(logdir=logdir, summary_op=None, **_TIMES)
    with sv.managed_session() as session:
        done = model.begin(session)
        while not sv.should_stop() and done < STEPS:
            done = model.step(session)
            if done % 10 == 0:
                sv.summary_computed(session, session.run(merged))


def own_service(side: Side, logdir: str) -> None:
    model = Model()
    sv = side.Supervisor(logdir=logdir, **_TIMES)
    with sv.managed_session() as session:
        sv.loop(0.05, lambda one: report("printed", weight=float(one.run(model.weights)[0])), (session,))
        model.loop(sv, session)


def no_services(side: Side, logdir: str) -> None:
    model = Model()
    sv = side.Supervisor(logdir=logdir, **_TIMES)
    with sv.managed_session(start_standard_services=False) as session:
        done = model.begin(session)
        while not sv.should_stop() and done < STEPS:
            done = model.step(session)
            if done % 10 == 0:
                sv.saver.save(session, sv.save_path, global_step=sv.global_step)


def queue_runners(side: Side, logdir: str, epochs: int | None = None) -> None:
    model = Model(data=v1.train.input_producer(tf.constant([1.0, 2.0]), num_epochs=epochs).dequeue())
    sv = side.Supervisor(logdir=logdir, **_TIMES)
    with sv.managed_session() as session:
        if epochs is None:
            model.loop(sv, session)
            return
        model.begin(session)
        while not sv.should_stop():
            model.step(session)


def queue_until_out_of_range(side: Side, logdir: str) -> None:
    queue_runners(side, logdir, epochs=STEPS // 2)


def dataset_until_out_of_range(side: Side, logdir: str) -> None:
    model = Model(data=v1.data.make_one_shot_iterator(tf.data.Dataset.range(STEPS)).get_next())
    sv = side.Supervisor(logdir=logdir, **_TIMES)
    with sv.managed_session() as session:
        model.begin(session)
        while not sv.should_stop():
            model.step(session)


def retried(side: Side, logdir: str) -> None:
    failures = [tf.errors.AbortedError(None, None, "preempted")]
    while True:
        try:
            with tf.Graph().as_default():
                model = Model()
                sv = side.Supervisor(logdir=logdir, **_TIMES)
                with sv.managed_session() as session:
                    done = model.begin(session)
                    while not sv.should_stop() and done < STEPS:
                        done = model.step(session)
                        if done > 50 and failures:
                            raise failures.pop()
            return
        except tf.errors.AbortedError:
            pass


def pretrained(side: Side, logdir: str) -> None:
    model = Model()
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        weights = v1.train.Saver([model.weights])
        os.makedirs(f"{logdir}-pretrained", exist_ok=True)
        path = weights.save(session, f"{logdir}-pretrained/weights")
    sv = side.Supervisor(logdir=logdir, init_fn=lambda session: weights.restore(session, path), **_TIMES)
    with sv.managed_session() as session:
        model.loop(sv, session)


def session_manager_alone(side: Side, logdir: str) -> None:
    model = Model()
    saver = v1.train.Saver()
    init, ready = v1.global_variables_initializer(), v1.report_uninitialized_variables()
    manager = side.SessionManager(ready_op=ready)
    os.makedirs(logdir, exist_ok=True)
    session = manager.prepare_session("", init_op=init, saver=saver, checkpoint_dir=logdir)
    done = model.begin(session)
    while done < STEPS:
        done = model.step(session)
        if done % 10 == 0:
            saver.save(session, f"{logdir}/model.ckpt", global_step=done)


def subclass(side: Side, logdir: str) -> None:
    class Own(side.Supervisor):  # type: ignore[misc,name-defined]
        def _init_saver(self, saver: Any = side.Supervisor.USE_DEFAULT) -> None:
            self._saver = v1.train.Saver(max_to_keep=2)

        def _write_graph(self) -> None:
            report("no graph")

    model = Model()
    sv = Own(logdir=logdir, **_TIMES)
    with sv.managed_session() as session:
        model.loop(sv, session)


def own_local_init(side: Side, logdir: str) -> None:
    seen = v1.get_variable("seen", [], collections=[v1.GraphKeys.LOCAL_VARIABLES], initializer=v1.ones_initializer())
    managed(side, logdir, local_init_op=seen.initializer)


def own_saver(side: Side, logdir: str) -> None:
    model = Model()
    sv = side.Supervisor(logdir=logdir, saver=v1.train.Saver(max_to_keep=2), **_TIMES)
    with sv.managed_session() as session:
        model.loop(sv, session)


def own_basename(side: Side, logdir: str) -> None:
    managed(side, logdir, checkpoint_basename="net")


def no_global_step(side: Side, logdir: str) -> None:
    model = Model(has_global_step=False)
    sv = side.Supervisor(logdir=logdir, global_step=None, **_TIMES)
    with sv.managed_session() as session:
        model.loop(sv, session)


def two_graphs(side: Side, logdir: str) -> None:
    evaluation = tf.Graph()
    with evaluation.as_default():
        seen = tf.constant(1.0) + 1
    model = Model()
    sv = side.Supervisor(logdir=logdir, **_TIMES)
    with sv.managed_session() as session, v1.Session(graph=evaluation) as other:
        done = model.begin(session)
        while not sv.should_stop() and done < STEPS:
            done = model.step(session)
            if done % 20 == 0:
                other.run(seen)


def stopped_by_a_thread(side: Side, logdir: str) -> None:
    model = Model()
    sv = side.Supervisor(logdir=logdir, **_TIMES)
    with sv.managed_session() as session:
        model.begin(session)

        def watch() -> None:
            while int(session.run(model.done)) < STEPS:
                if sv.coord.wait_for_stop(0.01):
                    return
            sv.request_stop()

        threading.Thread(target=watch, daemon=True).start()
        while not sv.should_stop():
            model.step(session)


def training_threads(side: Side, logdir: str) -> None:
    model = Model()
    sv = side.Supervisor(logdir=logdir, **_TIMES)
    with sv.managed_session() as session:
        model.begin(session)

        def train() -> None:
            with sv.stop_on_exception():
                while not sv.should_stop() and model.step(session) < STEPS:
                    pass
                sv.request_stop()

        threads = [threading.Thread(target=train) for _ in range(2)]
        for one in threads:
            one.start()
        sv.coord.join(threads)


def worker_on_a_server(side: Side, logdir: str) -> None:
    server = v1.train.Server.create_local_server()
    model = Model()
    chief = side.Supervisor(logdir=logdir, **_TIMES)
    worker = side.Supervisor(is_chief=False, recovery_wait_secs=0.1, stop_grace_secs=20)
    with chief.managed_session(server.target), worker.managed_session(server.target) as session:
        model.loop(chief, session)


def ended_by_an_error(side: Side, logdir: str) -> None:
    model = Model()
    sv = side.Supervisor(logdir=logdir, **_TIMES)
    with sv.managed_session() as session:
        done = model.begin(session)
        while not sv.should_stop():
            done = model.step(session)
            if done >= STEPS:
                sv.coord.request_stop(ValueError("the end of the input is damaged"))


def own_sigterm_handler(side: Side, logdir: str) -> None:
    model = Model()
    sv = side.Supervisor(logdir=logdir, **_TIMES)
    signal.signal(signal.SIGTERM, lambda number, frame: sv.request_stop())
    with sv.managed_session() as session:
        model.loop(sv, session)


def float_global_step(side: Side, logdir: str) -> None:
    model = Model(has_global_step=False)
    step = v1.get_variable("global_step", [], initializer=v1.zeros_initializer(), trainable=False)
    with tf.control_dependencies([model.train_op]):
        model.train_op = tf.cast(v1.assign_add(step, 1.0), tf.int64)
    sv = side.Supervisor(logdir=logdir, global_step=step, **_TIMES)
    with sv.managed_session() as session:
        model.loop(sv, session)


def keras_layers(side: Side, logdir: str) -> None:
    model = Model()
    dense = [tf.keras.layers.Dense(16, activation="relu"), tf.keras.layers.Dense(1)]
    output = tf.ones([4, 8])
    for layer in dense:
        output = layer(output)
    loss = tf.reduce_mean(tf.square(output - 1.0))
    with tf.control_dependencies([model.train_op]):
        trained = v1.train.AdamOptimizer(0.01).minimize(loss, var_list=v1.trainable_variables(scope="dense"))
    with tf.control_dependencies([trained]):
        model.train_op = tf.identity(model.done)
    sv = side.Supervisor(logdir=logdir, **_TIMES)
    with sv.managed_session() as session:
        model.loop(sv, session)


USES: dict[str, Callable[[Side, str], None]] = {
    "managed_session and a loop": managed,
    "prepare_or_wait_for_session, a loop, stop()": prepared,
    "summaries by hand": own_summaries,
    "a service of its own with loop()": own_service,
    "no services, saves by hand": no_services,
    "queue runners": queue_runners,
    "a queue until OutOfRange": queue_until_out_of_range,
    "a dataset until OutOfRange": dataset_until_out_of_range,
    "a retry on AbortedError": retried,
    "init_fn from pretrained weights": pretrained,
    "SessionManager alone": session_manager_alone,
    "a subclass": subclass,
    "a local_init_op of its own": own_local_init,
    "a saver of its own": own_saver,
    "a checkpoint_basename of its own": own_basename,
    "no global step": no_global_step,
    "a float global step": float_global_step,
    "two graphs": two_graphs,
    "stopped by a thread": stopped_by_a_thread,
    "two training threads": training_threads,
    "a worker on a server": worker_on_a_server,
    "ended by an error": ended_by_an_error,
    "Keras layers": keras_layers,
    "a SIGTERM handler of its own": own_sigterm_handler,
}


_hold_until: str | None = None


def _may_go_on() -> bool:
    return _hold_until is None or os.path.exists(_hold_until)


def use(name: str, side: str, logdir: str, hold_until: str | None) -> None:
    """Run one of the programs; it does its last steps when the file ``hold_until`` is there."""
    global _hold_until
    _hold_until = hold_until
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    v1.disable_eager_execution()
    with tf.Graph().as_default():
        USES[name](Side(side), logdir)
    report("returned")
