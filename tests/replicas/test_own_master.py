"""Runs on a server of the same process: made on the caller's thread, and freed by closing the session."""

from __future__ import annotations

import threading
from typing import ClassVar

import pytest
import tensorflow as tf

from stepguard.tensorflow.cluster import remote_session, tasks

v1 = tf.compat.v1
SOON_SECS = 60.0


class SilentPing:
    """In place of the one that watches a server: the test says when that is lost."""

    made: ClassVar[list[SilentPing]] = []

    def __init__(self, master, task, timeout_secs, on_lost):
        self.on_lost = on_lost
        self.made.append(self)

    def end(self):
        pass

    def join(self, timeout_secs):
        pass


@pytest.fixture(scope="module")
def server():
    return tf.distribute.Server.create_local_server()


@pytest.fixture
def queue():
    with tf.Graph().as_default():
        yield v1.FIFOQueue(10, [tf.int64], shapes=[[]])


@pytest.fixture
def session(server, queue, monkeypatch):
    monkeypatch.setattr(remote_session, "Heartbeat", SilentPing)
    session = remote_session.open_session(server.target, graph=queue.queue_ref.graph, config=None)
    session.watch_peers(1.0, None)
    yield session
    session.close()


def carried(session, monkeypatch):
    """The calls that are made on another thread from now on."""
    calls = []
    call = session._calls.call
    monkeypatch.setattr(session._calls, "call", lambda *args: calls.append(args) or call(*args))
    return calls


def test_a_server_of_this_process_is_known_by_its_target(server):
    port = server.target.rpartition(":")[2]
    assert tasks.is_own_master(server.target)
    assert not tasks.is_own_master(f"grpc://127.0.0.1:{port}")
    assert not tasks.is_own_master("grpc://localhost:1")
    assert not tasks.is_own_master("grpc://localhost")


def test_only_the_first_run_of_something_is_made_on_another_thread(session, queue, monkeypatch):
    step = queue.size()
    calls = carried(session, monkeypatch)
    assert [int(session.run(step)) for _ in range(3)] == [0, 0, 0]
    assert len(calls) == 1
    assert session.run([step]) == [0]
    call = session.make_callable(step)
    before = len(calls)
    assert [int(call()) for _ in range(3)] == [0, 0, 0]
    assert len(calls) == before + 1


def test_another_feed_is_another_run(session, queue, monkeypatch):
    with session.graph.as_default():
        first, second = v1.placeholder(tf.int64, []), v1.placeholder(tf.int64, [])
        total = v1.placeholder_with_default(first, []) + v1.placeholder_with_default(second, [])
    calls = carried(session, monkeypatch)
    for _ in range(2):
        assert session.run(total, {first: 1, second: 2}) == 3
    assert len(calls) == 1
    between = total.op.inputs[0]
    assert session.run(total, {between: 5, second: 2}) == 7
    assert len(calls) == 2


@pytest.mark.parametrize("how", ["run", "make_callable"])
def test_who_is_stuck_in_such_a_run_is_freed_with_the_error_of_the_loss(session, queue, how):
    take, put = queue.dequeue(), queue.enqueue(1)
    waits = session.make_callable(take) if how == "make_callable" else lambda: session.run(take)
    session.run(put)
    assert int(waits()) == 1
    raised = []

    def stuck():
        try:
            waits()
        except tf.errors.OpError as error:
            raised.append(error)

    thread = threading.Thread(target=stuck, daemon=True)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    error = tf.errors.UnavailableError(None, None, "silent")
    SilentPing.made[-1].on_lost(error)
    thread.join(SOON_SECS)
    assert raised == [error]
    with pytest.raises(tf.errors.UnavailableError):
        waits()
