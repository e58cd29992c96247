"""How programs really use a session: from many threads, wrapped, closed early, with a graph that is changed again."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from graphs import committed, counting_step, wait_until
from tensorflow.core.protobuf.config_pb2 import CallableOptions

from stepguard.options import Saving
from stepguard.tensorflow import SessionManager, Supervisor
from stepguard.tensorflow import boundary as boundary_module
from stepguard.tensorflow import session_manager as session_manager_module

v1 = tf.compat.v1


def newest_values(logdir: Path) -> tuple[int, list[float]]:
    """The global step, and the values of ``w``, in the newest checkpoint."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(logdir)))
    return int(reader.get_tensor("global_step")), np.unique(reader.get_tensor("w")).tolist()


class TestBlockedThreads:
    """A thread that waits in a queue is no step: it holds up no checkpoint, and no checkpoint holds it up."""

    def test_a_blocked_dequeue_and_a_blocked_enqueue_hold_up_no_checkpoint(self, graph, tmp_path):
        step = counting_step()
        empty, full = v1.FIFOQueue(1, tf.int32, name="empty"), v1.FIFOQueue(1, tf.int32, name="full")
        take, put = empty.dequeue(), full.enqueue(1)
        cancel = [empty.close(cancel_pending_enqueues=True), full.close(cancel_pending_enqueues=True)]
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0, saving=Saving(save_model_steps=1))

        with ThreadPoolExecutor(2) as pool, supervisor.managed_session() as session:
            session.run(put)
            blocked = [pool.submit(session.run, operation) for operation in (take, put)]
            wait_until(lambda: all(one.running() for one in blocked), "the blocked threads")
            for number in range(1, 4):
                session.run(step)
                wait_until(
                    lambda due=number: committed(tmp_path)[-1:] == [due] and not supervisor._saving.writer.busy,
                    "a checkpoint",
                )
            assert not any(one.done() for one in blocked)
            session.run(cancel)
            for one in blocked:
                assert isinstance(one.exception(20), (tf.errors.OutOfRangeError, tf.errors.CancelledError))

    def test_a_checkpoint_holds_up_no_feeding_thread(self, graph, tmp_path):
        step = counting_step()
        queue = v1.FIFOQueue(100, tf.int32)
        put, size = queue.enqueue(1), queue.size()
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0, saving=Saving(save_at_end=True))

        with ThreadPoolExecutor(1) as pool, supervisor.managed_session() as session:
            with session.boundary.hold("a checkpoint that takes long"):
                pool.submit(session.run, put).result(60)
                assert session.run(size) == 1
                training = pool.submit(session.run, step)
                wait_until(training.running, "the training step")
                assert not training.done()
            training.result(60)

    def test_an_input_pipeline_of_queue_runners_trains_to_its_end_while_checkpoints_are_taken(self, graph, tmp_path):
        numbers = v1.train.limit_epochs(tf.constant([1.0]), 300)
        queue = v1.FIFOQueue(4, tf.float32, shapes=[(1,)])
        v1.train.add_queue_runner(v1.train.QueueRunner(queue, [queue.enqueue([numbers])] * 2))
        w = v1.get_variable("w", [1], tf.float32, v1.zeros_initializer())
        with tf.control_dependencies([w.assign_add(queue.dequeue())]):
            step = v1.assign_add(v1.train.get_or_create_global_step(), 1).op
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0.02)

        with supervisor.managed_session() as session:
            while True:
                session.run(step)

        assert newest_values(tmp_path) == (300, [300.0])

    def test_a_run_that_blocks_inside_a_step_costs_a_checkpoint_and_is_named(
        self, graph, tmp_path, monkeypatch, caplog
    ):
        """It takes its input and trains in one run: nobody can tell whether it has begun to change the model."""
        monkeypatch.setattr(boundary_module, "_PATIENCE_SECS", 0.1)
        queue = v1.FIFOQueue(1, tf.float32, shapes=[()])
        w = v1.get_variable("w", [], tf.float32, v1.zeros_initializer())
        train, put = w.assign_add(queue.dequeue(), name="train_on_input"), queue.enqueue(1.0)
        raised = w.assign_add(1.0)
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0.05)

        with ThreadPoolExecutor(1) as pool, supervisor.managed_session() as session:
            training = pool.submit(session.run, train)
            wait_until(lambda: session.boundary._running, "the step")
            session.run(raised)
            wait_until(lambda: "train_on_input" in caplog.text, "the warning")
            session.run(put)
            assert training.result(60) == 2

        assert "checkpoint skipped" in caplog.text

    def test_a_step_that_never_ends_is_named_at_the_end_and_no_error(self, graph, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(boundary_module, "_PATIENCE_SECS", 0.1)
        queue = v1.FIFOQueue(1, tf.float32, shapes=[()])
        w = v1.get_variable("w", [], tf.float32, v1.zeros_initializer())
        train, raised = w.assign_add(queue.dequeue(), name="train_on_input"), w.assign_add(1.0)
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0, saving=Saving(save_at_end=True))

        with ThreadPoolExecutor(1) as pool:
            with supervisor.managed_session() as session:
                session.run(raised)
                training = pool.submit(session.run, train)
                wait_until(lambda: session.boundary._running, "the step")
            assert "the last steps are not saved" in caplog.text
            assert "train_on_input" in caplog.text
            # The end of the session is the end of what it blocks.
            assert isinstance(training.exception(60), (tf.errors.CancelledError, RuntimeError))

    def test_a_summary_that_waits_for_input_holds_up_no_checkpoint(self, graph, tmp_path):
        step = counting_step()
        queue = v1.FIFOQueue(1, tf.float32, shapes=[()])
        v1.summary.scalar("input", queue.dequeue())
        close = queue.close(cancel_pending_enqueues=True)
        supervisor = Supervisor(
            logdir=str(tmp_path),
            save_model_secs=0,
            saving=Saving(save_model_steps=1),
            save_summaries_secs=0.01,
            stop_grace_secs=20,
        )

        with supervisor.managed_session() as session:
            for number in range(1, 3):
                session.run(step)
                wait_until(
                    lambda due=number: committed(tmp_path)[-1:] == [due] and not supervisor._saving.writer.busy,
                    "a checkpoint",
                )
            session.run(close)

        assert newest_values(tmp_path)[0] == 2


class TestWaysToRun:
    """Whatever way a program runs its steps, a checkpoint waits for their end."""

    @pytest.mark.parametrize(
        "way", ["run", "eval", "make_callable", "as Keras does", "name", "partial_run", "options", "wrapper"]
    )
    def test_each_is_counted_as_a_step(self, way, graph, tmp_path):
        fed = v1.placeholder_with_default(1.0, [], name="fed")
        w = v1.get_variable("w", [], tf.float32, v1.zeros_initializer(), use_resource=False)
        train = v1.assign_add(w, fed, name="train")
        supervisor = Supervisor(
            logdir=str(tmp_path), save_model_secs=0, saving=Saving(save_at_end=True), global_step=None
        )

        with supervisor.managed_session() as session:
            steps_before = session.boundary.steps
            if way == "run":
                session.run(train)
            elif way == "eval":
                train.eval(session=session)
            elif way == "make_callable":
                session.make_callable(train)()
            elif way == "as Keras does":
                session._make_callable_from_options(CallableOptions(target=["train"]))()
            elif way == "name":
                session.run("train:0")
            elif way == "partial_run":
                handle = session.partial_run_setup([train], [fed])
                session.partial_run(handle, train, {fed: 1.0})
            elif way == "options":
                metadata = v1.RunMetadata()
                session.run(train, options=v1.RunOptions(trace_level=v1.RunOptions.FULL_TRACE), run_metadata=metadata)
                assert metadata.step_stats.dev_stats
            else:
                DelegatingWrapper(session).run(train)
            assert session.boundary.steps == steps_before + 1

        assert tf.train.load_checkpoint(str(tmp_path)).get_tensor("w") == 1

    def test_a_failing_step_ends_as_well(self, graph, tmp_path):
        counting_step()
        fails = v1.global_variables()[0].assign_add(tf.zeros([2]) / v1.placeholder(tf.float32, [2]))
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0, saving=Saving(save_at_end=True))

        with supervisor.managed_session() as session:
            with pytest.raises(tf.errors.InvalidArgumentError):
                session.run(fails)
            with session.boundary.hold("a checkpoint"):
                pass

    def test_goes_on_where_ctrl_c_has_left_a_lock_of_tensorflows_locked(self, graph, tmp_path):
        step = counting_step()
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0, saving=Saving(save_at_end=True))

        with ThreadPoolExecutor(1) as pool:
            with supervisor.managed_session() as session:
                graph._group_lock._ready.acquire()
                pool.submit(session.run, step).result(60)
                pool.submit(session.make_callable(step)).result(60)
            graph._group_lock._ready.release()

        assert newest_values(tmp_path)[0] == 2

    def test_the_session_is_the_default_one_in_its_block(self, graph, tmp_path):
        step = counting_step()

        with Supervisor(logdir=str(tmp_path)).managed_session() as session, session.as_default():
            step.run()
            assert v1.train.get_global_step().eval() == 1


class DelegatingWrapper:
    """What a program's own debugger may look like."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *arguments: Any, **options: Any) -> Any:
        return self._session.run(*arguments, **options)


def test_a_session_wrapped_by_tensorflows_debugger_trains_and_is_saved(graph, tmp_path):
    debug = pytest.importorskip("tensorflow.python.debug")
    step = counting_step()
    supervisor = Supervisor(logdir=str(tmp_path / "logdir"))

    with supervisor.managed_session() as session:
        wrapped = debug.DumpingDebugWrapperSession(session, str(tmp_path / "dumps"))
        for _ in range(3):
            wrapped.run(step)

    assert newest_values(tmp_path / "logdir") == (3, [3.0])
    assert list((tmp_path / "dumps").iterdir())


def test_a_graph_that_is_unfinalised_and_extended_goes_on_being_saved(graph, tmp_path):
    step = counting_step()
    supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0, saving=Saving(save_model_steps=1))

    with supervisor.managed_session() as session:
        session.run(step)
        with pytest.raises(RuntimeError, match="finalized"):
            tf.constant(1)
        graph._unsafe_unfinalize()
        w = next(variable for variable in v1.global_variables() if variable.op.name == "w")
        with tf.control_dependencies([w.assign_add([10.0, 10.0])]):
            later = v1.assign_add(v1.train.get_global_step(), 1).op
        steps_before = session.boundary.steps
        session.run(later)
        assert session.boundary.steps == steps_before + 1

    assert newest_values(tmp_path) == (2, [11.0])


class TestTheEndOfASession:
    def test_used_as_a_context_and_closed_before_the_stop(self, graph, tmp_path):
        step = counting_step()
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0.01, save_summaries_secs=0.01)

        with supervisor.prepare_or_wait_for_session() as session:
            for _ in range(5):
                session.run(step)
        supervisor.stop()

        assert newest_values(tmp_path) == (5, [5.0])

    def test_used_as_a_context_that_an_error_leaves(self, graph, tmp_path):
        step = counting_step()
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=3600)

        with pytest.raises(ZeroDivisionError), supervisor.prepare_or_wait_for_session() as session:
            wait_until(lambda: committed(tmp_path) == [0], "the first checkpoint")
            session.run(step)
            raise ZeroDivisionError
        supervisor.stop()

        assert committed(tmp_path) == [0]

    def test_used_again_after_it_was_closed_is_an_error(self, graph, tmp_path):
        step = counting_step()
        with Supervisor(logdir=str(tmp_path)).managed_session() as session:
            pass

        with pytest.raises(RuntimeError, match="closed"):
            session.run(step)

    def test_a_lost_peer_is_answered_by_a_new_session(self, graph, tmp_path):
        step = counting_step()
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=3600)
        begun_at = []

        def train(losses: int) -> None:
            with supervisor.managed_session() as session:
                begun_at.append(int(session.run(v1.train.get_global_step())))
                session.run(step)
                if len(begun_at) <= losses:
                    supervisor.saver.save(session, supervisor.save_path, global_step=v1.train.get_global_step())
                    raise tf.errors.AbortedError(None, None, "the peer is gone")

        while True:
            try:
                train(losses=2)
                break
            except tf.errors.AbortedError:
                continue

        assert begun_at == [0, 1, 2]
        assert newest_values(tmp_path)[0] == 3

    def test_the_graph_may_be_trained_by_a_session_of_the_programs_own_afterwards(self, graph, tmp_path):
        step = counting_step()
        with Supervisor(logdir=str(tmp_path)).managed_session() as session:
            session.run(step)

        with v1.Session() as own:
            own.run(v1.get_collection(v1.GraphKeys.INIT_OP)[0])
            own.run(step)


class TestManyThreads:
    def test_each_checkpoint_of_a_run_of_many_threads_holds_one_step(self, graph, tmp_path):
        """Reference variables and resource variables, and four threads that run steps at once."""
        count = 12
        variables = [
            v1.get_variable(f"v{index}", [64], tf.float32, v1.zeros_initializer(), use_resource=index % 2 == 0)
            for index in range(count)
        ]
        raised: Any = tf.no_op()
        for variable in variables:
            with tf.control_dependencies([raised]):
                # With locks, since steps of several threads that overlap would else lose updates of each other.
                raised = v1.assign_add(variable, tf.ones([64]), use_locking=True)
        with tf.control_dependencies([raised]):
            step = v1.assign_add(v1.train.get_or_create_global_step(), 1).op
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0.01, saver=v1.train.Saver(max_to_keep=0))
        stop = threading.Event()

        with ThreadPoolExecutor(4) as pool, supervisor.managed_session() as session:

            def train() -> None:
                while not stop.is_set():
                    session.run(step)

            training = [pool.submit(train) for _ in range(4)]
            wait_until(lambda: len(committed(tmp_path)) >= 12, "twelve checkpoints")
            stop.set()
            for thread in training:
                thread.result(60)

        for number in committed(tmp_path):
            reader = tf.train.load_checkpoint(str(tmp_path / f"model.ckpt-{number}"))
            assert reader.get_tensor("global_step") == number
            for index in range(count):
                assert np.unique(reader.get_tensor(f"v{index}")).tolist() == [number]


@pytest.mark.parametrize(("longest_secs", "waits"), [(0.1, [0.05, 0.075, 0.1, 0.1]), (0.01, [0.01] * 4)])
def test_no_wait_between_two_checks_is_longer_than_it_may_be(graph, longest_secs, waits):
    counting_step()
    waited = []

    def wait_for_stop(secs: float) -> bool:
        waited.append(secs)
        return len(waited) == 4

    manager = SessionManager(
        ready_op=v1.report_uninitialized_variables(), recovery_wait_secs=longest_secs, wait_for_stop=wait_for_stop
    )
    with pytest.raises(tf.errors.CancelledError, match="a stop was requested while waiting"):
        manager.wait_for_session("", max_wait_secs=None)

    assert waited == pytest.approx(waits)


def test_a_wait_that_ends_in_the_middle_of_a_check_says_what_the_check_before_has_found(graph, monkeypatch):
    checks, is_over = [], threading.Event()

    def look():
        checks.append(len(checks))
        if len(checks) > 1:
            is_over.wait(60)
        return np.array([b"w"], dtype=object)

    # An hour passes as the second check begins.
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + (3600 if len(checks) > 1 else 0))
    monkeypatch.setattr(session_manager_module, "time", clock)
    server = v1.train.Server.create_local_server()
    manager = SessionManager(ready_op=v1.py_func(look, [], tf.string), recovery_wait_secs=0.02)
    try:
        with pytest.raises(tf.errors.DeadlineExceededError) as told:
            manager.wait_for_session(server.target, max_wait_secs=600)
    finally:
        is_over.set()

    assert len(checks) == 2
    assert "variables not initialised: w" in str(told.value)
    assert "max_wait_secs=600" in str(told.value)
    assert "is the chief running" in str(told.value)
    assert any("the last check had no answer from" in note for note in told.value.__notes__)
