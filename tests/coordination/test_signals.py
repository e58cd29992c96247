"""Which signals a run takes for requests to stop, and which it leaves to the program."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading

import pytest

from stepguard.coordination.signals import SignalWatch


@pytest.fixture
def watch():
    """A watch that sets an event, not started yet."""
    asked = threading.Event()
    watch = SignalWatch([signal.SIGTERM, signal.SIGUSR1], asked.set)
    watch.asked = asked
    yield watch
    watch.finish()


def test_a_schedulers_warning_is_a_request_to_stop(watch):
    watch.start()
    os.kill(os.getpid(), signal.SIGUSR1)

    assert watch.asked.wait(60)
    assert watch.reason == "sigusr1"
    # The scheduler's SIGTERM after its warning is the first one, and ends nothing at once.
    os.kill(os.getpid(), signal.SIGTERM)
    assert watch.reason == "sigusr1"
    watch.finish()
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)] == [signal.SIG_DFL] * 2


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGUSR2, "sigusr2"), (signal.SIGINT, "interrupt")])
def test_each_signal_that_was_given_is_a_request_with_a_word_of_its_own(number, reason):
    before = [signal.getsignal(one) for one in (signal.SIGTERM, number)]
    asked = threading.Event()
    watch = SignalWatch([number], asked.set)
    watch.start()
    try:
        assert signal.getsignal(signal.SIGTERM) is before[0]
        os.kill(os.getpid(), number)
        assert asked.wait(60)
        assert (watch.reason, watch.name) == (reason, number.name)
    finally:
        watch.finish()
    assert [signal.getsignal(one) for one in (signal.SIGTERM, number)] == before


def test_a_signal_is_watched_although_the_program_handles_another(watch):
    received = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        watch.start()
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert not watch.received
        os.kill(os.getpid(), signal.SIGUSR1)
        assert watch.asked.wait(60)
        watch.finish()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_warning_that_the_program_handles_is_left_to_it(watch):
    received = []
    signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    try:
        watch.start()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert received == [signal.SIGUSR1]
        assert not watch.received
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not say what is caught")
def test_a_warning_that_prints_the_stacks_goes_on_to_do_so(watch, tmp_path):
    with open(tmp_path / "stacks", "w", encoding="utf-8") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks)
        try:
            watch.start()
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            faulthandler.unregister(signal.SIGUSR1)

    assert "test_signals.py" in (tmp_path / "stacks").read_text()
    assert not watch.received
