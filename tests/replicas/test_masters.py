"""The master strings: '' and 'local' in one process, grpc:// for a server."""

from __future__ import annotations


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
