"""SyncReplicasOptimizer in one process, on a session without a server, as its documentation says to combine the two."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import tensorflow as tf

from stepguard.tensorflow import Supervisor

v1 = tf.compat.v1

PARTS = 3


class Synchronous:
    """A model whose gradients are -1 everywhere: with a rate of 1, each of its parts counts the aggregated steps."""

    def __init__(self, logdir, **options):
        self.step = v1.train.get_or_create_global_step()
        self.parts = [
            v1.get_variable(f"w{number}", [1000], initializer=v1.zeros_initializer()) for number in range(PARTS)
        ]
        optimizer = v1.train.SyncReplicasOptimizer(
            v1.train.GradientDescentOptimizer(1.0), replicas_to_aggregate=1, total_num_replicas=1
        )
        loss = -tf.add_n([tf.reduce_sum(part) for part in self.parts])
        self.train_op = optimizer.minimize(loss, global_step=self.step)
        self.runner = optimizer.get_chief_queue_runner()
        self.tokens = optimizer.get_init_tokens_op()
        self.sv = Supervisor(
            logdir=str(logdir),
            local_init_op=optimizer.chief_init_op,
            ready_for_local_init_op=optimizer.ready_for_local_init_op,
            summary_op=None,
            saver=v1.train.Saver(max_to_keep=0),
            **options,
        )

    def start(self, session):
        session.run(self.tokens)
        return self.sv.start_queue_runners(session, [self.runner])


@pytest.fixture
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


def saved(logdir):
    """The step of each committed checkpoint, and what its parts hold."""
    found = {}
    for manifest in logdir.glob("model.ckpt-*.manifest.json"):
        prefix = str(manifest).removesuffix(".manifest.json")
        reader = tf.train.load_checkpoint(prefix)
        values = {float(value) for number in range(PARTS) for value in set(reader.get_tensor(f"w{number}"))}
        found[int(prefix.rpartition("-")[2])] = (int(reader.get_tensor("global_step")), values)
    return found


def test_checkpoints_are_taken_as_ever_and_hold_one_step_each(graph, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    model = Synchronous(tmp_path, save_model_secs=0.05)
    step_secs = []
    with model.sv.managed_session() as session:
        model.start(session)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.manifest.json"))) < 12 and time.monotonic() < deadline:
            began = time.monotonic()
            session.run(model.train_op)
            step_secs.append(time.monotonic() - began)
    found = saved(tmp_path)
    assert len(found) >= 12
    assert found == {step: (step, {float(step)}) for step in found}
    # What a boundary would have waited for the queue runner is 5 s, at each of them. A busy machine may take one step.
    assert sorted(step_secs)[-3] < 4
    assert "checkpoint skipped" not in caplog.text


def test_the_run_ends_at_once_with_its_last_steps_saved(graph, tmp_path):
    model = Synchronous(tmp_path, save_model_secs=600)
    with model.sv.managed_session() as session:
        threads = model.start(session)
        for _ in range(20):
            session.run(model.train_op)
        last = int(session.run(model.step))
        left = time.monotonic()
    # The grace period is two minutes.
    assert time.monotonic() - left < 60
    assert last >= 1
    assert max(saved(tmp_path)) >= last
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    model.sv.coord.raise_requested_exception()


def test_threads_that_the_program_has_started_itself_are_no_obstacle_either(graph, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    model = Synchronous(tmp_path, save_model_secs=0.05)
    with model.sv.managed_session() as session:
        session.run(model.tokens)
        model.runner.create_threads(session, coord=model.sv.coord, daemon=True, start=True)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.manifest.json"))) < 4 and time.monotonic() < deadline:
            session.run(model.train_op)
        left = time.monotonic()
    assert time.monotonic() - left < 60
    assert len(saved(tmp_path)) >= 4
    assert "checkpoint skipped" not in caplog.text


def test_a_second_session_of_the_same_supervisor_starts_clean(graph, tmp_path):
    """What the closing of the first has cut short is no error of the second."""
    model = Synchronous(tmp_path, save_model_secs=600)
    for _ in range(2):
        with model.sv.managed_session() as session:
            model.start(session)
            for _ in range(5):
                session.run(model.train_op)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("QueueRunner") and alive(thread)]


def alive(thread):
    thread.join(60)
    return thread.is_alive()
