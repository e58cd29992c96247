"""Synchronous training, combined with a Supervisor as the documentation of SyncReplicasOptimizer says."""

from __future__ import annotations

import statistics
import time

import tensorflow as tf
from cluster import restored_step


def test_replicas_train_in_step_and_end_together(cluster):
    cluster.serve()
    chief = cluster.train(0, "train_sync", steps=200, supervisor={"save_model_secs": 0.3})
    worker = cluster.train(1, "train_sync", steps=10**9)
    assert chief.join() == 0, chief.story()
    # The end of the chief closes the token queue: that is the end of the input for a worker.
    assert worker.join() == 0, worker.story()
    assert worker.reports("left")
    assert not worker.reports("lost")
    last = cluster.saved_steps()[-1]
    assert last >= 200
    reader = tf.train.load_checkpoint(str(cluster.logdir / f"model.ckpt-{last}"))
    assert set(reader.get_tensor("w")) == {float(last)}


def test_checkpoints_are_taken_while_the_queue_runner_waits_for_gradients(cluster):
    cluster.serve()
    chief = cluster.train(0, "train_sync", steps=10**9, supervisor={"save_model_secs": 0.3})
    cluster.train(1, "train_sync", steps=10**9)
    chief.wait_for_step(20)
    first = cluster.wait_for_saved()[-1]
    chief.wait_for_step(chief.step + 300)
    cluster.wait_for_saved(after=first)
    assert "checkpoint skipped" not in chief.output


def test_a_killed_worker_comes_back(cluster):
    cluster.serve()
    chief = cluster.train(0, "train_sync", steps=10**9)
    worker = cluster.train(1, "train_sync", steps=10**9)
    worker.wait_for_step(50)
    worker.kill()
    worker.restart()
    assert worker.wait_for("session")["step"] >= 50
    chief.wait_for_step(worker.wait_for("session")["step"] + 50)


def test_a_killed_chief_comes_back(cluster):
    cluster.serve()
    chief = cluster.train(0, "train_sync", steps=10**9)
    worker = cluster.train(1, "train_sync", steps=10**9)
    worker.wait_for_step(50)
    chief.kill()
    before = worker.step
    chief.restart()
    assert chief.wait_for("session")["step"] >= before
    worker.wait_for_step(before + 50)


def test_a_killed_parameter_server_costs_the_steps_since_the_last_commit(cluster):
    cluster.serve()
    chief = cluster.train(0, "train_sync", steps=10**9, supervisor={"save_model_secs": 0.3})
    worker = cluster.train(1, "train_sync", steps=10**9)
    worker.wait_for_step(100)
    cluster.wait_for_saved()
    cluster.ps[0].kill()
    killed = time.time()
    chief.wait_for("lost")
    committed = cluster.saved_steps()[-1]
    cluster.ps[0].restart()
    assert chief.wait_for("session", after=killed)["step"] >= restored_step(cluster) == committed
    worker.wait_for("session", after=killed)
    worker.wait_for_step(committed + 100)
    # A look while a step is being applied may be one off; of a torn checkpoint all would be.
    assert (
        statistics.mode(line["weight"] - line["step"] for line in worker.reports("step") if line["time"] > killed) == 0
    )
