"""Calls that may never return, and callers that do."""

from __future__ import annotations

import gc
import threading
import time
from contextlib import nullcontext

import pytest
import tensorflow as tf

from stepguard.tensorflow.cluster import calls as module
from stepguard.tensorflow.cluster import tasks
from stepguard.tensorflow.cluster.calls import ReleasableCalls
from stepguard.tensorflow.cluster.remote_session import open_session


@pytest.fixture
def calls():
    return ReleasableCalls(nullcontext)


def couriers():
    return [thread for thread in threading.enumerate() if thread.name == "stepguard-run"]


def test_a_call_returns_what_it_returns_and_raises_what_it_raises(calls):
    assert calls.call(lambda: 3) == 3
    with pytest.raises(KeyError):
        calls.call(lambda: {}["missing"])
    assert not calls.left_behind


def refuse(thread):
    raise RuntimeError("can't create new thread at interpreter shutdown")


def test_where_no_thread_can_be_started_the_caller_makes_the_call(calls, monkeypatch):
    """From the end of the main thread on, Python 3.12 and newer start none."""
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert calls.call(threading.current_thread) is threading.current_thread()
    with pytest.raises(KeyError):
        calls.call(lambda: {}["missing"])
    assert not calls.left_behind


def test_where_no_thread_can_be_started_a_session_runs_and_its_end_is_left_to_the_kernel(monkeypatch):
    server = tf.compat.v1.train.Server.create_local_server()
    with tf.Graph().as_default() as graph:
        one = tf.constant(1)
    session = open_session(server.target, graph=graph, config=None)
    with monkeypatch.context() as exiting:
        exiting.setattr(threading.Thread, "start", refuse)
        assert session.run(one) == 1
        session.close()


def test_a_stuck_caller_is_freed_when_the_session_is_lost(calls):
    stuck = threading.Event()
    error = ConnectionError("silent")
    threading.Timer(0.1, calls.lose, [error]).start()
    with pytest.raises(ConnectionError) as raised:
        calls.call(stuck.wait)
    assert raised.value is error
    assert calls.left_behind
    with pytest.raises(ConnectionError):
        calls.call(lambda: 3)
    stuck.set()


def test_a_caller_may_give_up(calls):
    stuck = threading.Event()
    with pytest.raises(TimeoutError):
        calls.call(stuck.wait, TimeoutError)
    stuck.set()


def test_a_caller_that_a_signal_interrupts_at_the_end_of_its_call_does_not_wait_for_another_end(calls, monkeypatch):
    """Between the end of the wait and the next line: on a busy machine one of five signals came there."""
    wait = module._Call.wait

    def interrupted(call, give_up):
        wait(call, give_up)
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Call, "wait", interrupted)
    monkeypatch.setattr(module, "_INTERRUPTED_SECS", 600.0)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        calls.call(lambda: 3)
    assert time.monotonic() - began < 60


def test_a_caller_that_a_signal_interrupts_during_its_call_waits_for_the_end_of_that(calls, monkeypatch):
    done = []

    def interrupted(call, give_up):
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Call, "wait", interrupted)
    monkeypatch.setattr(module, "_INTERRUPTED_SECS", 60.0)
    with pytest.raises(KeyboardInterrupt):
        calls.call(lambda: time.sleep(0.2) or done.append("done"))
    assert done == ["done"]


def test_each_thread_has_a_courier_that_ends_with_it(calls):
    before = len(couriers())
    threads = [threading.Thread(target=calls.call, args=(lambda: time.sleep(0.05),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del thread, threads
    gc.collect()
    deadline = time.monotonic() + 60
    while len(couriers()) > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_call_after_close_is_made_all_the_same(calls):
    assert calls.call(lambda: 1) == 1
    calls.close()
    assert calls.call(lambda: 2) == 2


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Graph execution error:\n\nSession 12ab is not found.\n\nOriginal stack trace:", "Session 12ab is not found"),
        ("\nSocket closed", "Socket closed"),
        ("", "AbortedError"),
    ],
)
def test_what_is_told_of_a_lost_server_is_what_the_server_has_said(message, said):
    assert tasks.first_line(tf.errors.AbortedError(None, None, message)) == said
