"""The master strings: '' and 'local' in one process, grpc:// for a server."""

from __future__ import annotations

import time


def test_local_is_a_session_behind_the_rpc_interface_that_restores_like_any_other(cluster):
    chief = cluster.train(0, "local_master")
    first, second = chief.wait_for("first"), chief.wait_for("second")
    assert first["step"] == 0
    # A new session on the same server restores the model: it has not inherited the variables of the one before.
    assert second["step"] == 3
    assert first["target"].startswith("grpc://")
    assert first["type"] == "RemoteSession"
    assert chief.join() == 0, chief.story()


def test_the_same_program_runs_alone(cluster):
    chief = cluster.train(0, "alone")
    assert chief.wait_for("session")["step"] == 5
    assert chief.join() == 0, chief.story()


def test_a_master_in_another_process_is_used_like_ones_own(cluster):
    """The chief's server serves the session of a program that has none."""
    cluster.serve()
    cluster.train(0).wait_for_step(10)
    client = cluster.train(1, "client", master=f"grpc://{cluster.spec['worker'][0]}")
    assert client.wait_for("session")["step"] >= 10
    assert client.join() == 0, client.story()


def test_a_master_that_was_started_again_while_the_trainer_was_held_is_an_aborted_error(cluster):
    """The program's own loop catches AbortedError, and nothing else."""
    cluster.serve()
    trainer = cluster.train(0, "train_on_master", master=f"grpc://{cluster.spec['ps'][0]}")
    trainer.wait_for_step(5)
    for _ in range(3):
        trainer.freeze()
        cluster.ps[0].kill()
        cluster.ps[0].restart().wait_for("serving")
        thawed = time.time()
        trainer.thaw()
        trainer.wait_for("lost", after=thawed, type="AbortedError")
        assert trainer.wait_for("session", after=thawed)
        trainer.wait_for("step", after=thawed)
