"""What a process of a test cluster runs: a parameter server, or a task that trains a small model on it."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import Any

import tensorflow as tf

v1 = tf.compat.v1

_out = -1


def report(kind: str, **fields: Any) -> None:
    """Say something to the test: one JSON object a line, in the kernel's hands before this returns."""
    line = json.dumps({"kind": kind, "time": time.time(), **fields}) + "\n"
    os.write(_out, line.encode())


def main(function: str, place: str, arguments: dict[str, Any]) -> None:
    """Run ``function(**arguments)`` with its reports and output in the directory ``place``."""
    global _out
    _out = os.open(os.path.join(place, "reports"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    output = os.open(os.path.join(place, "output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import logging

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    if arguments.get("kind") == "tensorflow":
        # Its services run on threads of their own, which TensorFlow 2 would start in eager mode.
        v1.disable_v2_behavior()
    report("started", pid=os.getpid())
    try:
        globals()[function](**arguments)
    except SystemExit:
        report("left")
        raise
    except BaseException as error:  # noqa: BLE001 - the edge of the process: the test reads it
        traceback.print_exc()
        report("failed", type=type(error).__name__, message=str(error))
        sys.stderr.flush()
        os._exit(1)
    report("ended", threads=sorted(thread.name for thread in threading.enumerate()))


def enter_network(namespace: str) -> None:
    """Move this thread, and all that it starts, into a network namespace; os.setns is newer than Python 3.11."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), 0x40000000) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def server_for(cluster: dict[str, list[str]], job: str, index: int) -> Any:
    return tf.distribute.Server(tf.train.ClusterSpec(cluster), job_name=job, task_index=index)


def serve(cluster: dict[str, list[str]], index: int, namespace: str | None = None) -> None:
    if namespace is not None:
        enter_network(namespace)
    server = server_for(cluster, "ps", index)
    report("serving")
    server.join()


class Model:
    """Counts its steps in ``w`` and in the global step; every variable lives on a parameter server.

    ``parts`` is the number of variables, shared out over the parameter servers. One step adds 1 to all of them.
    """

    def __init__(self, cluster: dict[str, list[str]], index: int, *, parts: int = 1, resource: bool = False) -> None:
        setter = v1.train.replica_device_setter(
            worker_device=f"/job:worker/task:{index}", cluster=tf.train.ClusterSpec(cluster)
        )
        with v1.device(setter):
            self.global_step = v1.train.get_or_create_global_step()
            self.parts = [
                v1.get_variable(f"w{number}", [10], initializer=v1.zeros_initializer(), use_resource=resource)
                for number in range(parts)
            ]
            added = [part.assign_add(tf.ones([10]), use_locking=True) for part in self.parts]
            with tf.control_dependencies(added):
                self.train_op = v1.assign_add(self.global_step, 1, use_locking=True)


def supervisor_class(name: str) -> Any:
    if name == "tensorflow":
        return v1.train.Supervisor
    from stepguard.tensorflow import Supervisor

    return Supervisor


def train(
    cluster: dict[str, list[str]],
    index: int,
    *,
    kind: str = "stepguard",
    steps: int = 10**9,
    step_secs: float = 0.005,
    retry: bool = True,
    parts: int = 1,
    sharded: bool = False,
    supervisor: dict[str, Any] | None = None,
    session: dict[str, Any] | None = None,
    narrow: bool = False,
    stop_after_secs: float | None = None,
    still_secs: float | None = None,
) -> None:
    """Train until the global step is ``steps``; a retry has a graph, a supervisor and a session of its own.

    At its end a chief waits until the step has not changed for ``still_secs``, and not for as short as usual.
    """
    server = server_for(cluster, "worker", index)
    if still_secs is not None:
        from stepguard.tensorflow.cluster import sync_replicas

        sync_replicas._SHORTEST_STILL_SECS = still_secs
        sync_replicas._SHORTEST_SETTLE_SECS = 10 * still_secs

    def once() -> None:
        with tf.Graph().as_default():
            model = Model(cluster, index, parts=parts)
            given = dict(supervisor or {})
            if sharded:
                given["saver"] = v1.train.Saver(sharded=True)
            sv = supervisor_class(kind)(is_chief=index == 0, **given)
            report("asked")
            if stop_after_secs is not None:
                threading.Timer(stop_after_secs, sv.request_stop).start()
            options = dict(session or {})
            if narrow:
                options["config"] = v1.ConfigProto(device_filters=["/job:ps", f"/job:worker/task:{index}"])
            with sv.managed_session(server.target, **options) as sess:
                step = int(sess.run(model.global_step))
                report("session", step=step)
                while not sv.should_stop() and step < steps:
                    step = int(sess.run(model.train_op))
                    report("step", step=step)
                    time.sleep(step_secs)
                report("finished", step=step)
        report("left")

    def reported() -> None:
        try:
            once()
        except Exception as error:
            report("lost", type=type(error).__name__, message=str(error)[:500])
            raise

    if not retry:
        reported()
    elif kind == "stepguard":
        from stepguard.tensorflow import retry_on_lost_peer

        retry_on_lost_peer(reported, max_losses=None, longest_wait_secs=1.0)
    else:
        while True:
            try:
                reported()
                return
            except (tf.errors.AbortedError, tf.errors.UnavailableError):
                time.sleep(0.5)


class Runner(threading.Thread):
    """Plays with the newest model and queues what it has seen, until its process ends."""

    def __init__(self, session: Any, model: Model) -> None:
        super().__init__(daemon=True)
        self.seen: queue.Queue[float] = queue.Queue(5)
        self._session, self._model = session, model

    def run(self) -> None:
        while True:
            self.seen.put(float(self._session.run(self._model.parts[0])[0]), timeout=600)


class FastSaver(v1.train.Saver):
    """Leaves the graph out, and returns nothing."""

    def save(self, sess: Any, save_path: str, global_step: Any = None, *args: Any, **kwargs: Any) -> None:
        super().save(sess, save_path, global_step, write_meta_graph=False)


def agent(
    cluster: dict[str, list[str]], index: int, *, kind: str = "stepguard", supervisor: dict[str, Any] | None = None
) -> None:
    """The shape of asynchronous agents (A3C): a thread that plays, a loop that trains, and signals that exit."""
    server = server_for(cluster, "worker", index)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with tf.Graph().as_default():
        model = Model(cluster, index)
        writer = None
        if supervisor and supervisor.get("logdir"):
            writer = v1.summary.FileWriter(f"{supervisor['logdir']}_{index}", graph=v1.get_default_graph())
        sv = supervisor_class(kind)(
            is_chief=index == 0,
            saver=FastSaver(),
            summary_op=None,
            summary_writer=writer,
            ready_op=v1.report_uninitialized_variables(),
            global_step=model.global_step,
            **(supervisor or {}),
        )
        config = v1.ConfigProto(device_filters=["/job:ps", f"/job:worker/task:{index}"])
        with sv.managed_session(server.target, config=config) as sess, sess.as_default():
            runner = Runner(sess, model)
            runner.start()
            while not sv.should_stop():
                runner.seen.get(timeout=600)
                report("step", step=int(sess.run(model.train_op)))
        sv.stop()


def prepare_by_hand(cluster: dict[str, list[str]], index: int, *, supervisor: dict[str, Any]) -> None:
    """Use prepare_or_wait_for_session as a program without managed_session does."""
    from stepguard.tensorflow import Supervisor

    server = server_for(cluster, "worker", index)
    with tf.Graph().as_default():
        model = Model(cluster, index)
        sv = Supervisor(is_chief=index == 0, **supervisor)
        report("asked")
        sess = sv.prepare_or_wait_for_session(server.target)
        with sess:
            report("session", step=int(sess.run(model.global_step)), writer=sv.summary_writer is not None)
            report("step", step=int(sess.run(model.train_op)))
        sv.stop()


def wait_for_checkpoint(
    cluster: dict[str, list[str]], index: int, *, max_wait_secs: float, supervisor: dict[str, Any]
) -> None:
    from stepguard.tensorflow import Supervisor

    server = server_for(cluster, "worker", index)
    with tf.Graph().as_default():
        model = Model(cluster, index)
        sv = Supervisor(is_chief=True, **supervisor)
        began = time.monotonic()
        sess = sv.prepare_or_wait_for_session(server.target, wait_for_checkpoint=True, max_wait_secs=max_wait_secs)
        report("session", step=int(sess.run(model.global_step)), waited_secs=time.monotonic() - began)
        sv.stop()


def own_readiness(cluster: dict[str, list[str]], index: int, *, supervisor: dict[str, Any]) -> None:
    """A local variable that starts from a global one, as synchronous training has it."""
    from stepguard.tensorflow import Supervisor

    server = server_for(cluster, "worker", index)
    with tf.Graph().as_default():
        with tf.device("/job:ps/task:0"):
            step = v1.train.get_or_create_global_step()
            shared = v1.get_variable("shared", [1], initializer=v1.constant_initializer(7.0))
        with tf.device(f"/job:worker/task:{index}"):
            local = v1.get_variable(
                "local", [1], initializer=v1.zeros_initializer(), collections=[v1.GraphKeys.LOCAL_VARIABLES]
            )
        sv = Supervisor(
            is_chief=index == 0,
            local_init_op=v1.assign(local, shared),
            ready_op=v1.report_uninitialized_variables([*v1.global_variables(), local]),
            ready_for_local_init_op=v1.report_uninitialized_variables(v1.global_variables()),
            local_init_run_options=v1.RunOptions(timeout_in_ms=20_000),
            **supervisor,
        )
        with sv.managed_session(server.target) as sess:
            report("session", local=sess.run(local).tolist(), step=int(sess.run(step)))


def slow_step(cluster: dict[str, list[str]], index: int, *, secs: float, supervisor: dict[str, Any]) -> None:
    """A step that waits on the parameter server for longer than a silent server would be waited for."""
    from stepguard.tensorflow import Supervisor

    server = server_for(cluster, "worker", index)
    with tf.Graph().as_default():
        model = Model(cluster, index)
        with tf.device("/job:ps/task:0"):
            queue = tf.queue.FIFOQueue(1, [tf.int64], shapes=[[]], shared_name="slow")
            put = queue.enqueue(1)
            with tf.control_dependencies([queue.dequeue()]):
                slow = v1.assign_add(model.global_step, 1)
        sv = Supervisor(is_chief=True, **supervisor)
        with sv.managed_session(server.target) as sess:
            began = time.monotonic()
            threading.Timer(secs, lambda: sess.run(put)).start()
            sess.run(slow)
            report("step", step=1, took_secs=time.monotonic() - began)


def second_chief(cluster: dict[str, list[str]], index: int, *, logdir: str, supervisor: dict[str, Any]) -> None:
    from stepguard.tensorflow import Supervisor

    server = server_for(cluster, "worker", index)
    with tf.Graph().as_default():
        Model(cluster, index)
        with Supervisor(is_chief=True, logdir=logdir, **supervisor).managed_session(server.target):
            report("session", step=0)


def broken(cluster: dict[str, list[str]], index: int, *, supervisor: dict[str, Any]) -> None:
    from stepguard.tensorflow import Supervisor, retry_on_lost_peer

    server = server_for(cluster, "worker", index)

    def once() -> None:
        report("tried")
        with tf.Graph().as_default():
            model = Model(cluster, index)
            fails = tf.debugging.assert_equal(model.parts[0], tf.ones([10]), message="broken")
            with Supervisor(is_chief=True, **supervisor).managed_session(server.target) as sess:
                sess.run(fails)

    retry_on_lost_peer(once)


def train_sync(
    cluster: dict[str, list[str]],
    index: int,
    *,
    steps: int,
    kind: str = "stepguard",
    replicas: int = 2,
    supervisor: dict[str, Any] | None = None,
) -> None:
    """Synchronous training as SyncReplicasOptimizer's documentation says to combine it with a Supervisor."""
    server = server_for(cluster, "worker", index)
    is_chief = index == 0
    setter = v1.train.replica_device_setter(
        worker_device=f"/job:worker/task:{index}", cluster=tf.train.ClusterSpec(cluster)
    )

    def once() -> None:
        with tf.Graph().as_default():
            with v1.device(setter):
                global_step = v1.train.get_or_create_global_step()
                weight = v1.get_variable("w", [10], initializer=v1.zeros_initializer())
                # The gradient is -1 everywhere: with a rate of 1, the weights count the aggregated steps.
                optimizer = v1.train.SyncReplicasOptimizer(
                    v1.train.GradientDescentOptimizer(1.0), replicas_to_aggregate=replicas, total_num_replicas=replicas
                )
                train_op = optimizer.minimize(-tf.reduce_sum(weight), global_step=global_step)
                runner = optimizer.get_chief_queue_runner()
                init_tokens = optimizer.get_init_tokens_op()
            sv = supervisor_class(kind)(
                is_chief=is_chief,
                local_init_op=optimizer.chief_init_op if is_chief else optimizer.local_step_init_op,
                ready_for_local_init_op=optimizer.ready_for_local_init_op,
                **(supervisor or {}),
            )
            report("asked")
            options = {"config": v1.ConfigProto(device_filters=["/job:ps", f"/job:worker/task:{index}"])}
            with sv.managed_session(server.target, **(options if kind == "tensorflow" else {})) as sess:
                step = int(sess.run(global_step))
                report("session", step=step)
                if is_chief:
                    sv.start_queue_runners(sess, [runner])
                    sess.run(init_tokens)
                while not sv.should_stop() and step < steps:
                    sess.run(train_op)
                    step, found = sess.run([global_step, weight])
                    step = int(step)
                    report("step", step=step, weight=float(found[0]))
                report("finished", step=step)
        report("left")

    def reported() -> None:
        try:
            once()
        except Exception as error:
            report("lost", type=type(error).__name__, message=str(error)[:500])
            raise

    if kind == "tensorflow":
        reported()
        return
    from stepguard.tensorflow import retry_on_lost_peer

    retry_on_lost_peer(reported, max_losses=None, longest_wait_secs=1.0)


def local_master(cluster: dict[str, list[str]], index: int, *, supervisor: dict[str, Any]) -> None:
    from stepguard.tensorflow import Supervisor

    for which in ("first", "second"):
        with tf.Graph().as_default():
            step = v1.train.get_or_create_global_step()
            train_op = v1.assign_add(step, 1)
            with Supervisor(**supervisor).managed_session("local") as sess:
                found = int(sess.run(step))
                for _ in range(3):
                    sess.run(train_op)
                report(which, step=found, target=sess.sess_str.decode(), type=type(sess).__name__)


def alone(cluster: dict[str, list[str]], index: int, *, supervisor: dict[str, Any]) -> None:
    """No server, no parameter server: the program marks itself as the chief."""
    from stepguard.tensorflow import Supervisor

    with tf.Graph().as_default():
        with v1.device(v1.train.replica_device_setter(0)):
            step = v1.train.get_or_create_global_step()
            train_op = v1.assign_add(step, 1)
        with Supervisor(is_chief=True, **supervisor).managed_session("") as sess:
            for _ in range(5):
                sess.run(train_op)
            report("session", step=int(sess.run(step)))


def client(cluster: dict[str, list[str]], index: int, *, master: str, supervisor: dict[str, Any]) -> None:
    from stepguard.tensorflow import Supervisor

    with tf.Graph().as_default():
        with tf.device("/job:ps/task:0"):
            step = v1.train.get_or_create_global_step()
        with Supervisor(is_chief=False, **supervisor).managed_session(master) as sess:
            report("session", step=int(sess.run(step)))


def train_on_master(cluster: dict[str, list[str]], index: int, *, master: str, supervisor: dict[str, Any]) -> None:
    """A trainer on the server of another process, with the loop of TensorFlow's documentation for lost masters."""
    from stepguard.tensorflow import Supervisor

    def once() -> None:
        with tf.Graph().as_default():
            inputs = v1.train.input_producer(tf.constant([1.0, 2.0]))
            step = v1.train.get_or_create_global_step()
            with tf.control_dependencies([inputs.dequeue()]):
                train_op = v1.assign_add(step, 1)
            sv = Supervisor(**supervisor)
            config = v1.ConfigProto(device_filters=["/job:ps"])
            with sv.managed_session(master, config=config) as sess:
                report("session", step=int(sess.run(step)))
                while not sv.coord.should_stop():
                    report("step", step=int(sess.run(train_op)))

    while True:
        try:
            once()
        except tf.errors.AbortedError as error:
            report("lost", type=type(error).__name__, message=str(error)[:500])


def measure(cluster: dict[str, list[str]], index: int, *, secs: float, kind: str, supervisor: dict[str, Any]) -> None:
    """Report steps per second, over a model of about a millisecond a step; ``bare`` has no supervisor at all."""
    server = server_for(cluster, "worker", index)
    setter = v1.train.replica_device_setter(
        worker_device=f"/job:worker/task:{index}", cluster=tf.train.ClusterSpec(cluster)
    )
    with tf.Graph().as_default():
        with v1.device(setter):
            step = v1.train.get_or_create_global_step()
            weights = v1.get_variable("w", [256, 256], initializer=v1.glorot_uniform_initializer(seed=1))
            batch = tf.random.stateless_uniform([128, 256], seed=[1, 2])
            loss = tf.reduce_mean(tf.square(tf.matmul(batch, weights)))
            train_op = v1.train.GradientDescentOptimizer(1e-3).minimize(loss, global_step=step)

        def run(sess: Any) -> None:
            for _ in range(100):
                sess.run(train_op)
            done, began = 0, time.monotonic()
            while time.monotonic() - began < secs:
                sess.run(train_op)
                done += 1
            report("rate", rate=done / (time.monotonic() - began))
            # The other is still measuring.
            for _ in range(10**9):
                sess.run(train_op)

        if kind != "bare":
            with supervisor_class(kind)(is_chief=index == 0, **supervisor).managed_session(server.target) as sess:
                run(sess)
            return
        init, missing = v1.global_variables_initializer(), v1.report_uninitialized_variables()
        with v1.Session(server.target) as sess:
            if index == 0:
                sess.run(init)
            while sess.run(missing).size:
                time.sleep(0.05)
            run(sess)
