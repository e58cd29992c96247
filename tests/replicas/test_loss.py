"""Tasks are killed, stopped and started again: the run goes on, and nothing is lost that still lives somewhere."""

from __future__ import annotations

import time

import pytest
from cluster import restored_step

from stepguard.options import Watching


def test_a_killed_chief_joins_the_live_model_and_does_not_roll_it_back(cluster):
    cluster.serve()
    chief = cluster.train(0, supervisor={"save_model_secs": 600})
    worker = cluster.train(1)
    worker.wait_for_step(100)
    chief.kill()
    before = worker.step
    worker.wait_for_step(before + 50)  # training goes on without it
    chief.restart()
    assert chief.wait_for("session")["step"] >= before + 50
    assert not worker.reports("lost")


def test_a_killed_worker_joins_the_live_model(cluster):
    cluster.serve()
    chief = cluster.train(0)
    worker = cluster.train(1)
    worker.wait_for_step(50)
    worker.kill()
    before = chief.step
    chief.wait_for_step(before + 50)
    worker.restart()
    assert worker.wait_for("session")["step"] >= before
    assert not chief.reports("lost")


def test_a_task_comes_back_while_the_others_are_dead(make_cluster):
    cluster = make_cluster(workers=3)
    cluster.serve()
    chief = cluster.train(0)
    chief.wait_for_step(10)
    # Without filters a session waits for every server of the cluster, of which worker 2 never was there.
    assert cluster.train(1).wait_for_step(20)


def test_a_killed_parameter_server_costs_the_steps_since_the_last_commit(cluster):
    cluster.serve()
    chief = cluster.train(0, supervisor={"save_model_secs": 0.5})
    worker = cluster.train(1)
    worker.wait_for_step(200)
    saved = cluster.wait_for_saved(after=0)[-1]
    cluster.ps[0].kill()
    killed = time.time()
    assert chief.wait_for("lost")["type"] in ("AbortedError", "UnavailableError")
    assert worker.wait_for("lost")["type"] in ("AbortedError", "UnavailableError")
    committed = cluster.saved_steps()[-1]
    assert committed >= saved
    cluster.ps[0].restart()
    restored = chief.wait_for("session", after=killed)
    assert restored["step"] >= restored_step(cluster) == committed
    assert worker.wait_for("session", after=killed)["step"] >= committed
    steps = [line["step"] for line in worker.reports("step") if line["time"] > restored["time"]]
    worker.wait_for_step(committed + 50)
    assert all(step > committed for step in steps)


def test_a_worker_does_not_initialise_what_the_chief_will_restore(cluster):
    cluster.serve()
    chief = cluster.train(0, supervisor={"save_model_secs": 0.5})
    worker = cluster.train(1)
    worker.wait_for_step(100)
    cluster.wait_for_saved()
    chief.kill()
    committed = cluster.saved_steps()[-1]
    cluster.ps[0].kill()
    worker.wait_for("lost")
    cluster.ps[0].restart()
    worker.process.join(2)
    assert len(worker.reports("session")) == 1
    chief.restart()
    restored = chief.wait_for("session")
    # Newer where the chief was killed after it had written one, and before its manifest.
    assert restored["step"] >= restored_step(cluster) >= committed
    assert worker.wait_for("session", after=restored["time"] - 1)["step"] >= committed


def test_everything_killed_at_once_resumes_from_the_newest_commit(cluster):
    cluster.serve()
    cluster.train(0, supervisor={"save_model_secs": 0.5})
    cluster.train(1).wait_for_step(150)
    cluster.wait_for_saved()
    for task in cluster.tasks:
        task.kill()
    committed = cluster.saved_steps()[-1]
    for task in cluster.tasks:
        task.restart()
    # Before the chief can look, its worker may have trained.
    assert cluster.chief.wait_for("session")["step"] >= committed
    assert restored_step(cluster) >= committed
    assert cluster.workers[1].wait_for_step(committed + 10)


@pytest.mark.parametrize("role", ["chief", "worker"])
def test_a_silent_server_is_noticed_within_the_bound(cluster, role):
    cluster.serve()
    bound = {"watching": Watching(peer_timeout_secs=4)}
    chief = cluster.train(0, supervisor=bound)
    worker = cluster.train(1, supervisor=bound)
    worker.wait_for_step(50)
    task = chief if role == "chief" else worker
    frozen = time.time()
    cluster.ps[0].freeze()
    lost = task.wait_for("lost")
    assert lost["type"] == "UnavailableError"
    assert "/job:ps/task:0 gave no answer for 4 s" in lost["message"]
    # A ping each second: the last answer may have come a second before. Without the bound it would wait for ever.
    assert 2.9 < lost["time"] - frozen < 60
    step = task.step
    cluster.ps[0].thaw()
    # It was only silent: the model is as it was, and nobody rolls it back.
    assert task.wait_for("session", after=lost["time"])["step"] >= step
    task.wait_for_step(step + 20)


def test_a_frozen_worker_blames_nobody_when_it_goes_on(cluster):
    cluster.serve()
    cluster.train(0)
    worker = cluster.train(1, supervisor={"watching": Watching(peer_timeout_secs=3)})
    worker.wait_for_step(50)
    worker.freeze()
    cluster.chief.process.join(5)
    worker.thaw()
    worker.wait_for_step(worker.step + 100)
    assert not worker.reports("lost")


def test_a_slow_step_is_no_silent_server(cluster):
    cluster.serve()
    chief = cluster.train(0, "slow_step", secs=5.0, supervisor={"watching": Watching(peer_timeout_secs=3)})
    assert chief.wait_for("step")["took_secs"] >= 5
    assert chief.join() == 0, chief.story()


def test_a_second_chief_is_told_of_the_first(cluster):
    cluster.serve()
    cluster.train(0).wait_for_step(10)
    second = cluster.train(1, "second_chief", logdir=str(cluster.logdir))
    failed = second.wait_for("failed")
    assert failed["type"] == "LogdirInUseError"
    assert f"process {cluster.chief.process.pid} " in failed["message"]
    assert not cluster.chief.reports("lost")


def test_an_error_of_the_program_is_not_tried_again(cluster):
    cluster.serve()
    chief = cluster.train(0, "broken", supervisor={})
    assert chief.wait_for("failed")["type"] == "InvalidArgumentError"
    assert len(chief.reports("tried")) == 1
