"""Tasks of a cluster start in any order, and train as soon as their chief does."""

from __future__ import annotations

import itertools

import pytest


@pytest.mark.parametrize("order", list(itertools.permutations(["ps", "chief", "worker"])))
def test_tasks_start_in_every_order(cluster, order):
    start = {"ps": cluster.serve, "chief": lambda: cluster.train(0), "worker": lambda: cluster.train(1)}
    for name in order:
        task = start[name]()
        task.wait_for("started")
        if name != "ps":
            task.wait_for("asked")
    for task in cluster.workers:
        task.wait_for_step(20)


def test_a_worker_trains_soon_after_its_chief(cluster):
    cluster.serve()
    worker = cluster.train(1, supervisor={"recovery_wait_secs": 600})
    worker.wait_for("asked")
    # Long enough for the worker's checks to have become as rare as they ever do.
    worker.process.join(4)
    chief = cluster.train(0)
    ready = chief.wait_for("session")["time"]
    # Within a second, as the benchmark measures, where the machine is not busy; TensorFlow's may need all of the ten
    # minutes that it is told to wait between two checks.
    assert worker.wait_for("step")["time"] - ready < 60
