"""Waiting for a chief, for servers and for checkpoints: how long, for what, and until which request to stop."""

from __future__ import annotations


def test_a_worker_without_a_chief_says_what_it_waits_for(cluster):
    cluster.serve().wait_for("serving")
    # Long enough for the worker's own server to answer on a busy machine.
    worker = cluster.train(1, retry=False, session={"max_wait_secs": 12})
    lost = worker.wait_for("lost")
    assert lost["type"] == "ModelWaitTimeoutError"
    assert 12 <= lost["time"] - worker.wait_for("asked")["time"] < 12 + 40
    for part in ("variables not initialised: global_step, w0", "max_wait_secs=12", "is the chief running"):
        assert part in lost["message"]
    assert worker.join() == 1


def test_a_worker_without_its_server_says_which_does_not_answer(cluster):
    worker = cluster.train(1, retry=False, session={"max_wait_secs": 1})
    lost = worker.wait_for("lost")
    assert lost["type"] == "ModelWaitTimeoutError"
    assert "no answer from /job:ps/task:0, /job:worker/task:1: are they all running?" in lost["message"]
    assert worker.join() == 1


def test_a_chief_without_its_server_gives_up_after_max_wait_secs(cluster):
    chief = cluster.train(0, retry=False, session={"max_wait_secs": 1})
    lost = chief.wait_for("lost")
    assert lost["type"] == "ModelWaitTimeoutError"
    assert "no answer from /job:ps/task:0" in lost["message"]
    assert chief.join() == 1


def test_waiting_for_a_chief_ends_at_once_when_a_stop_is_requested(cluster):
    cluster.serve()
    worker = cluster.train(1, retry=False, stop_after_secs=3, supervisor={"recovery_wait_secs": 600})
    lost = worker.wait_for("lost")
    assert lost["type"] == "StoppedWhileWaitingError"
    assert 2.5 < lost["time"] - worker.wait_for("asked")["time"] < 60


def test_waiting_for_a_server_ends_at_once_when_a_stop_is_requested(cluster):
    worker = cluster.train(1, retry=False, stop_after_secs=1.5, supervisor={"recovery_wait_secs": 600})
    lost = worker.wait_for("lost")
    assert lost["type"] == "StoppedWhileWaitingError"
    assert lost["time"] - worker.wait_for("asked")["time"] < 60
    assert worker.join() == 1


def test_prepare_or_wait_for_session_serves_both_roles(cluster):
    cluster.serve()
    worker = cluster.train(1, "prepare_by_hand")
    chief = cluster.train(0, "prepare_by_hand")
    for task in (chief, worker):
        task.wait_for("step")
        assert task.join() == 0, task.story()
    assert chief.reports("session")[0]["writer"]
    assert not worker.reports("session")[0]["writer"]
    assert cluster.saved_steps()


def test_a_chief_waits_for_a_checkpoint_if_it_is_told_to(cluster):
    # The first second of a server is its own: the wait is for the server first, and then for a checkpoint.
    cluster.serve().wait_for("serving")
    chief = cluster.train(0, "wait_for_checkpoint", max_wait_secs=10)
    ready = chief.wait_for("session")
    assert ready["waited_secs"] >= 10
    assert ready["step"] == 0
    assert chief.join() == 0, chief.story()


def test_the_readiness_of_a_remote_model_is_asked_as_the_program_says(cluster):
    cluster.serve()
    worker = cluster.train(1, "own_readiness")
    chief = cluster.train(0, "own_readiness")
    for task in (chief, worker):
        found = task.wait_for("session")
        # local_init_op copies the global variable once that is ready, in every task and every session.
        assert found["local"] == [7.0]
        assert task.join() == 0, task.story()
