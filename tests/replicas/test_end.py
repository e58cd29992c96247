"""The end of a run: nobody is stranded, nobody hangs, and the chief saves the last step."""

from __future__ import annotations

import time
from signal import SIGTERM

import tensorflow as tf

from stepguard.options import Watching
from stepguard.tensorflow.cluster.sync_replicas import wait_for_standstill


def test_a_chief_that_finishes_first_leaves_the_workers_to_finish(cluster):
    cluster.serve()
    chief = cluster.train(0, steps=100)
    worker = cluster.train(1, steps=500)
    assert chief.join() == 0, chief.story()
    assert cluster.saved_steps()[-1] >= 100
    assert worker.join() == 0, worker.story()
    assert worker.step >= 500
    assert not worker.reports("lost")


def test_workers_that_finish_first_leave_the_chief_to_save_the_last_step(cluster):
    cluster.serve()
    chief = cluster.train(0, steps=400, supervisor={"save_model_secs": 600})
    worker = cluster.train(1, steps=100)
    assert worker.join() == 0, worker.story()
    assert chief.join() == 0, chief.story()
    assert cluster.saved_steps()[-1] == chief.step >= 400
    reader = tf.train.load_checkpoint(str(cluster.logdir))
    assert reader.get_tensor("global_step") == chief.step
    assert set(reader.get_tensor("w0")) == {float(chief.step)}


def test_the_last_steps_of_the_workers_are_in_the_last_checkpoint(cluster):
    """They all stop at the same step: the chief waits a moment for those that are still under way."""
    cluster.serve()
    # Longer than usual: on a busy machine the worker may pause in its last step.
    chief = cluster.train(0, steps=300, supervisor={"save_model_secs": 600}, still_secs=6.0)
    worker = cluster.train(1, steps=300, step_secs=0.02)
    for task in (chief, worker):
        assert task.join() == 0, task.story()
    assert cluster.saved_steps()[-1] == max(chief.step, worker.step)


def test_a_chief_that_a_signal_ends_saves_and_leaves_although_the_others_go_on(cluster):
    cluster.serve()
    chief = cluster.train(0, "agent", supervisor={"save_model_secs": 600})
    worker = cluster.train(1, "agent")
    for task in (chief, worker):
        task.wait_for_step(50)
    chief.signal(SIGTERM)
    told_at = time.time()
    assert chief.join(60) == 128 + SIGTERM, chief.story()
    # The others' steps are waited for no longer than they take: a chief that waited until they rest would be there for
    # its whole grace period of 120 s. How long it is exactly, the next test says.
    assert chief.wait_for("left")["time"] - told_at < 60
    assert cluster.saved_steps()[-1] >= chief.step
    last = worker.step
    worker.wait_for_step(last + 50)


def test_the_steps_of_others_are_waited_for_only_until_they_rest_or_go_on():
    now = 0.0

    def watched(*, step_secs, until=1e9, **options):
        """How long it waits for others whose steps of 0.1 s go on until then."""
        nonlocal now
        now = 0.0

        def wait(secs):
            nonlocal now
            now += secs

        wait_for_standstill(lambda: int(min(now, until) / 0.1), step_secs, 60, clock=lambda: now, wait=wait, **options)
        return round(now, 1)

    assert watched(step_secs=0.1, until=0.2) == 0.7
    assert watched(step_secs=0.1) == 1.5
    assert watched(step_secs=0.5) == 3.0
    assert watched(step_secs=10) == 5.0
    assert watched(step_secs=0.01, may_go_on=True) == 0.2
    assert watched(step_secs=1, may_go_on=True) == 2.0
    assert watched(step_secs=10, may_go_on=True) == 5.0


def test_a_task_ends_in_time_when_its_server_died_for_good(cluster):
    cluster.serve()
    chief = cluster.train(0, retry=False)
    worker = cluster.train(1, retry=False)
    worker.wait_for_step(50)
    cluster.ps[0].kill()
    for task in (chief, worker):
        assert task.join(60) == 1, task.story()
        assert task.reports("failed")[0]["type"] in ("UnavailableError", "AbortedError")


def test_a_task_ends_in_time_when_its_server_is_silent_for_good(cluster):
    cluster.serve()
    bound = {"watching": Watching(peer_timeout_secs=5)}
    chief = cluster.train(0, retry=False, supervisor=bound)
    worker = cluster.train(1, retry=False, supervisor=bound)
    worker.wait_for_step(50)
    cluster.ps[0].freeze()
    for task in (chief, worker):
        assert task.join(60) == 1, task.story()
        assert task.reports("failed")[0]["type"] == "UnavailableError"
