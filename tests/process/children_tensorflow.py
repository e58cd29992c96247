"""TensorFlow programs, each run in a process of its own: see ``zygote.py``."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import breaks
import child
import states_at_end
import tensorflow as tf
from model import Model, read, wrong
from zygote import report

from stepguard import Watching
from stepguard.errors import LogdirInUseError
from stepguard.options import Stopping
from stepguard.store import CheckpointStore, tensorflow_files
from stepguard.tensorflow import Supervisor

v1 = tf.compat.v1


def build(
    logdir: str,
    *,
    megabytes: float = 0.01,
    threads: bool = False,
    has_global_step: bool = True,
    max_to_keep: int = 2,
    **options: Any,
) -> tuple[Model, Supervisor]:
    """The model and its Supervisor, in the default graph."""
    model = Model(megabytes=megabytes, threads=threads, has_global_step=has_global_step)
    saver = v1.train.Saver(max_to_keep=max_to_keep)
    options = {"save_summaries_secs": 0, "save_model_secs": 0.002, **options}
    return model, Supervisor(logdir=logdir, saver=saver, **options)


def held(logdir: str) -> list[str]:
    """What is wrong with the committed checkpoints."""
    store = CheckpointStore(logdir, saver_files=tensorflow_files)
    found = []
    for one in store.candidates():
        state = read(store.verify(one).path)
        found += [f"{one.name}: {each}" for each in wrong(int(state["counter0"]), state)]
        if one.step is not None and one.step != state["counter0"]:
            found.append(f"{one.name} holds step {state['counter0']}")
    return found


def train(
    logdir: str,
    *,
    threads: int = 1,
    how: str | None = None,
    at: int | None = None,
    after_saves: int = 2,
    options: dict[str, Any] | None = None,
) -> None:
    """Train for ever, saving again and again."""
    torn = held(logdir) if Path(logdir).exists() else []
    breaking = child.Break(how, at, after_saves)

    def saved(step: int | None, path: str) -> None:
        # Without a global step the name tells nothing. No other save can begin before this returns.
        breaking.saved(int(read(path)["counter0"]) if step is None else step, path)

    child.report_log(saved)
    with tf.Graph().as_default():
        model, sv = build(logdir, threads=threads > 1, **(options or {}))
        with sv.managed_session() as session:
            step = model.step(session)
            report("start", step=step, good=wrong(step, model.state(session)) == [], torn=torn)

            def loop() -> None:
                while not sv.should_stop():
                    session.run(model.train_op)

            others = [threading.Thread(target=loop, daemon=True) for _ in range(threads - 1)]
            for one in others:
                one.start()
            loop()


# ------------------------------------------------------------------------------------------------ signals


def signalled(logdir: str, *, loop: str, stop_on_sigterm: bool = True, **options: Any) -> None:
    """Train in one of several ways until a signal comes, reporting each step that was done."""
    child.report_log()
    _handlers("before")
    with tf.Graph().as_default():
        blocking = _Input() if loop in ("blocked", "fed") else None
        options = {"save_model_secs": 3600, "stopping": Stopping(stop_on_sigterm=stop_on_sigterm), **options}
        model, sv = build(logdir, threads=loop.startswith("threads"), **options)
        try:
            with sv.managed_session() as session:
                _handlers("inside")
                report("start", step=model.step(session))
                _LOOPS[loop](sv, session, model, blocking)
            report("left", by=None)
        except KeyboardInterrupt:
            report("left", by="KeyboardInterrupt")
            raise
        finally:
            _handlers("after")


def _handlers(when: str) -> None:
    descriptor = signal.set_wakeup_fd(-1) if threading.current_thread() is threading.main_thread() else None
    if descriptor not in (None, -1):
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)  # type: ignore[arg-type]
    report(
        "handlers",
        when=when,
        is_default=signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        is_own=signal.getsignal(signal.SIGTERM) is _own_handler,
        wakes=descriptor not in (None, -1),
    )


def _own_handler(number: int, frame: Any) -> None:
    report("own handler")


class _Input:
    """A queue that a program's main thread reads, and that nothing comes out of."""

    def __init__(self) -> None:
        queue = v1.FIFOQueue(2, tf.int64, [[]])
        never = v1.FIFOQueue(2, tf.int64, [[]])
        self.never = never.dequeue()
        self.read = queue.dequeue()
        # The thread of the runner waits for its own input, the main thread for what it would enqueue.
        cancel = tf.group(queue.close(cancel_pending_enqueues=True), never.close(cancel_pending_enqueues=True))
        self.runner = v1.train.QueueRunner(queue, [queue.enqueue(never.dequeue())], cancel_op=cancel)


def _step(session: Any, model: Model) -> None:
    session.run(model.train_op)
    report("stepped")
    time.sleep(0.001)


def _never_asks(sv: Any, session: Any, model: Model, blocking: Any) -> None:
    while True:
        _step(session, model)


def _swallows(sv: Any, session: Any, model: Model, blocking: Any) -> None:
    while True:
        try:
            _step(session, model)
        except Exception:  # noqa: BLE001 - what such programs do
            report("swallowed")


def _asks(sv: Any, session: Any, model: Model, blocking: Any) -> None:
    while not sv.should_stop():
        _step(session, model)


def _reads_at_the_end(sv: Any, session: Any, model: Model, blocking: Any) -> None:
    _asks(sv, session, model, blocking)
    report("read", step=model.step(session))
    # And one more step, which is saved as well.
    _step(session, model)


def _fails_at_the_end(sv: Any, session: Any, model: Model, blocking: Any) -> None:
    _asks(sv, session, model, blocking)
    raise tf.errors.AbortedError(None, None, "a server was told to end as well")


def _threads(sv: Any, session: Any, model: Model, blocking: Any) -> None:
    def train() -> None:
        with sv.stop_on_exception():
            while not sv.should_stop():
                _step(session, model)

    others = [threading.Thread(target=train) for _ in range(3)]
    for one in others:
        one.start()
    sv.coord.join(others)


def _threads_that_never_ask(sv: Any, session: Any, model: Model, blocking: Any) -> None:
    def train() -> None:
        while True:
            _step(session, model)

    for _ in range(3):
        threading.Thread(target=train, daemon=True).start()
    _never_asks(sv, session, model, blocking)


def _fed(sv: Any, session: Any, model: Model, blocking: Any) -> None:
    for _ in range(3):
        _step(session, model)
    sv.start_queue_runners(session, [blocking.runner])
    report("blocking")
    session.run(blocking.read)


def _blocked(sv: Any, session: Any, model: Model, blocking: Any) -> None:
    for _ in range(3):
        _step(session, model)
    report("blocking")
    session.run(blocking.never)


def _sleeps(sv: Any, session: Any, model: Model, blocking: Any) -> None:
    _step(session, model)
    time.sleep(3600)


def _stuck(sv: Any, session: Any, model: Model, blocking: Any) -> None:
    stuck = threading.Thread(target=time.sleep, args=(3600,), daemon=True)
    stuck.start()
    sv.coord.register_thread(stuck)
    _never_asks(sv, session, model, blocking)


def _forks(sv: Any, session: Any, model: Model, blocking: Any) -> None:
    """A worker process of the program's own is ended while training goes on."""
    _step(session, model)
    worker = os.fork()
    if worker == 0:
        while True:
            signal.pause()
    os.kill(worker, signal.SIGTERM)
    _, status = os.waitpid(worker, 0)
    _step(session, model)
    report("worker ended", by=os.WTERMSIG(status), stops=sv.should_stop())


_LOOPS = {
    "forks": _forks,
    "never asks": _never_asks,
    "swallows": _swallows,
    "asks": _asks,
    "reads at the end": _reads_at_the_end,
    "fails at the end": _fails_at_the_end,
    "threads": _threads,
    "threads that never ask": _threads_that_never_ask,
    "fed": _fed,
    "blocked": _blocked,
    "sleeps": _sleeps,
    "stuck": _stuck,
}


def preparing_for_ever(logdir: str) -> None:
    """A program whose ``init_fn`` does not come back."""

    def init(session: Any) -> None:
        report("preparing")
        time.sleep(3600)

    with tf.Graph().as_default():
        _, sv = build(logdir, init_fn=init, stop_grace_secs=0.5)
        with sv.managed_session():
            report("start")


def with_own_handler(logdir: str) -> None:
    """A program with a SIGTERM handler of its own, which only asks for a stop."""
    signal.signal(signal.SIGTERM, _own_handler)
    signalled(logdir, loop="asks")


def outside_the_main_thread(logdir: str) -> None:
    """The Supervisor lives in another thread than the main one."""
    thread = threading.Thread(target=signalled, args=(logdir,), kwargs={"loop": "never asks"})
    thread.start()
    thread.join()


def waiting_worker() -> None:
    """A worker whose chief never makes the model ready."""
    handler = child.ReportingHandler(lambda step, path: None)
    handler.emit = lambda record: report("waiting")  # type: ignore[method-assign]
    log = logging.getLogger("stepguard.tensorflow.session_manager")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    with tf.Graph().as_default(), tf.device("/cpu:0"):
        Model()
        sv = Supervisor(is_chief=False, recovery_wait_secs=30)
        with sv.managed_session():
            report("start")


def catching_ctrl_c(logdir: str) -> None:
    """A program with its own ``except KeyboardInterrupt``, which ends as it likes."""
    try:
        signalled(logdir, loop="never asks")
    except KeyboardInterrupt:
        report("caught")


# ------------------------------------------------------------------------------------------------ ends


def slow_disk(secs: float) -> None:
    """Have every call by which a save changes the disk take this long."""
    slow = breaks.BreakingOs(breaks.wait(secs), at=None, every=True)
    slow.arm()
    breaks.put_under_files(slow)


def ends(logdir: str, *, way: str, managed: bool, call_secs: float, megabytes: float = 0.01, **options: Any) -> None:
    """End in one of several ways, at a moment when a checkpoint is being written."""
    child.report_log()
    slow_disk(call_secs)
    writing = threading.Event()
    begun = CheckpointStore.stage

    def stage(store: CheckpointStore, name: str) -> Path:
        try:
            return begun(store, name)
        finally:
            report("writing", name=name)
            writing.set()

    CheckpointStore.stage = stage  # type: ignore[method-assign]
    with tf.Graph().as_default():
        model, sv = build(logdir, megabytes=megabytes, **options)
        if managed:
            with sv.managed_session() as session:
                _end(way, session, model, writing)
            return
        session = sv.prepare_or_wait_for_session()
        _end(way, session, model, writing)


def _end(way: str, session: Any, model: Model, writing: threading.Event) -> None:
    report("start", step=model.step(session))
    while not writing.is_set():
        session.run(model.train_op)
    writing.clear()
    # The first was that of the beginning; now there is something to lose.
    while not writing.is_set():
        session.run(model.train_op)
    report("ending")
    if way == "sys.exit":
        sys.exit(3)
    if way == "an error":
        raise ZeroDivisionError("this is the end")


def serves(address: str) -> None:
    """Be the parameter server of a cluster of one worker, for ever."""
    server = tf.distribute.Server({"ps": [address], "worker": ["127.0.0.1:0"]}, job_name="ps", task_index=0)
    report("serving")
    server.join()


def ends_in(state: str, logdir: str, *, kind: str, ps: str = "", ps_pid: int = 0) -> None:
    """End in one of the states of ``states_at_end.py``.

    The session is ``local``, with a queue runner that waits for gradients (``sync``) or with partial runs that are not
    ended (``partial``), on a ``server`` of this process, or on one that needs the parameter server ``ps``, a
    ``replica``; with ``silent`` that one is stopped before the end.
    """
    master = ""
    if kind == "server":
        master = tf.distribute.Server.create_local_server().target
    elif kind in ("replica", "silent"):
        spec = {"ps": [ps], "worker": [f"127.0.0.1:{free_port()}"]}
        master = tf.distribute.Server(spec, job_name="worker", task_index=0).target
    with tf.Graph().as_default():
        with tf.device("/job:ps/task:0" if kind in ("replica", "silent") else None):
            step = v1.train.get_or_create_global_step()
            train_op = v1.assign_add(step, 1, use_locking=True)
        queue = v1.FIFOQueue(2, [tf.int64])
        filling = queue.enqueue(v1.constant(1, tf.int64))
        if kind == "sync":
            gradients = v1.ConditionalAccumulator(tf.float32, [])
            filling = v1.assign_add(step, tf.cast(gradients.take_grad(1), tf.int64)).op
            train_op = gradients.apply_grad(1.0, local_step=10**6)
        v1.train.add_queue_runner(v1.train.QueueRunner(queue, [filling]))
        first, second = v1.placeholder(tf.float32, []), v1.placeholder(tf.float32, [])
        half = first + 1
        whole = half + second

        def train(session: Any) -> None:
            session.run(train_op)
            if kind == "partial":
                session.partial_run(session.partial_run_setup([half, whole], [first, second]), half, {first: 1})

        options = {"watching": Watching(peer_timeout_secs=2)} if kind == "silent" else {}
        sv = Supervisor(logdir=logdir, save_summaries_secs=0, summary_op=None, stop_grace_secs=5, **options)
        states_at_end.end(
            state,
            sv,
            lambda **options: sv.prepare_or_wait_for_session(master, **options),
            lambda: sv.managed_session(master),
            train,
            lambda: os.kill(ps_pid, signal.SIGSTOP) if kind == "silent" else None,
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ------------------------------------------------------------------------------------------------ two chiefs


def chief(logdir: str) -> None:
    """Train for ever as the chief of the logdir, or report who is."""
    child.report_log()
    with tf.Graph().as_default():
        model, sv = build(logdir, save_model_secs=0.02)
        try:
            with sv.managed_session() as session:
                step = model.step(session)
                report("start", step=step, good=wrong(step, model.state(session)) == [])
                while True:
                    session.run(model.train_op)
        except LogdirInUseError as error:
            report("refused", host=error.host, pid=error.pid, since=error.since, text=str(error))
            raise


def hangs(logdir: str, *, managed: bool, **options: Any) -> None:
    """End while a checkpoint hangs on its disk for good."""
    child.report_log()
    reached = threading.Event()

    def hang(name: str, arguments: tuple[Any, ...]) -> None:
        reached.set()
        time.sleep(3600)

    hanging = breaks.BreakingOs(hang, at=4)
    breaks.put_under_files(hanging)
    with tf.Graph().as_default():
        model, sv = build(logdir, **options)
        if not managed:
            session = sv.prepare_or_wait_for_session()
            hanging.arm()
            _until(reached, session, model)
            return
        with sv.managed_session() as session:
            hanging.arm()
            _until(reached, session, model)


def _until(reached: threading.Event, session: Any, model: Model) -> None:
    while not reached.is_set():
        session.run(model.train_op)
    report("ending")


# ------------------------------------------------------------------------------------------------ summaries


def summarises(logdir: str, *, is_managed: bool) -> None:
    """Write summaries in a session that a block manages, or that nobody stops, and then train until a signal."""
    with tf.Graph().as_default():
        model, sv = build(logdir, save_model_secs=0)
        if is_managed:
            with sv.managed_session() as session:
                _summarise(sv, session, model)
        else:
            _summarise(sv, sv.prepare_or_wait_for_session(), model)


def _summarise(sv: Any, session: Any, model: Model) -> None:
    for step in range(1, 51):
        session.run(model.train_op)
        summary = v1.Summary(value=[v1.Summary.Value(tag="computed", simple_value=step)])
        sv.summary_computed(session, summary, step)
        sv.summary_writer.add_summary(v1.Summary(value=[v1.Summary.Value(tag="own", simple_value=step)]), step)
    report("wrote")
    while True:
        session.run(model.train_op)
