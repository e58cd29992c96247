"""Where our Coordinator and LooperThread differ from TensorFlow's on purpose: each test asserts both sides."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from coordinators import (
    SOON_SECS,
    AwaitedThread,
    BoomError,
    OurCoordinator,
    TheirCoordinator,
    TheirLooper,
    end_of_input,
    in_block,
    outcome,
    report,
    started,
)

import stepguard.coordination.coordinator
import stepguard.coordination.looper
import stepguard.tensorflow


def test_departure_an_error_made_outside_an_except_block_stops() -> None:
    theirs, ours = TheirCoordinator(), OurCoordinator()
    with pytest.raises(TypeError):
        theirs.request_stop(BoomError("x"))
    assert not theirs.should_stop()
    ours.request_stop(BoomError("x"))
    assert ours.should_stop()
    with pytest.raises(BoomError):
        ours.join()


def test_departure_later_errors_are_notes() -> None:
    notes = []
    for coord in (TheirCoordinator(), OurCoordinator()):
        report(coord, BoomError("1"))
        report(coord, ValueError("2"))
        with pytest.raises(BoomError) as caught:
            coord.join()
        notes.append(getattr(caught.value, "__notes__", []))
    thread = threading.current_thread().name
    assert notes == [[], [f"later error: ValueError: 2 (in thread {thread})"]]


@pytest.mark.parametrize("why", [None, end_of_input()])
def test_departure_an_error_after_a_clean_stop_is_raised(why: Exception | None) -> None:
    outcomes = []
    for coord in (TheirCoordinator(), OurCoordinator()):
        coord.request_stop() if why is None else report(coord, why)
        report(coord, BoomError("late"))
        outcomes.append(outcome(coord.join))
    assert outcomes == [None, (BoomError, "late")]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_departure_what_is_no_error_goes_on_after_the_stop(kind: type[BaseException]) -> None:
    theirs, ours = TheirCoordinator(), OurCoordinator()
    assert outcome(in_block, theirs, kind("x")) is None
    assert outcome(in_block, ours, kind("x")) == (kind, "x")
    assert outcome(theirs.join) == outcome(ours.join) == (kind, "x")


def test_departure_an_error_after_join_is_kept_and_stops() -> None:
    theirs, ours = TheirCoordinator(), OurCoordinator()
    for coord in (theirs, ours):
        coord.join()
        assert outcome(report, coord, BoomError("x")) == (BoomError, "x")
    assert outcome(theirs.raise_requested_exception) is None
    assert outcome(ours.raise_requested_exception) == (BoomError, "x")
    assert (theirs.should_stop(), ours.should_stop()) == (False, True)


def test_departure_a_finished_thread_is_noticed_at_once() -> None:
    def late_secs(coord: Any) -> float:
        thread = AwaitedThread()
        thread.start()
        coord.join([thread])
        return time.monotonic() - thread.found_alive_at

    assert late_secs(TheirCoordinator()) >= 1
    assert min(late_secs(OurCoordinator()) for _ in range(3)) < 0.5, "a machine has pauses of its own"


def test_departure_a_live_registered_thread_is_not_forgotten_by_join(hold: threading.Event) -> None:
    theirs, ours = TheirCoordinator(), OurCoordinator()
    for coord in (theirs, ours):
        coord.register_thread(started(hold.wait, name="the-laggard"))
        coord.request_stop()
        with pytest.raises(RuntimeError, match="the-laggard"):
            coord.join(stop_grace_period_secs=0.05)
    theirs.join(stop_grace_period_secs=0.05)
    with pytest.raises(RuntimeError, match="the-laggard"):
        ours.join(stop_grace_period_secs=0.05)


def test_departure_a_thread_registered_while_joining_is_waited_for(hold: threading.Event) -> None:
    waited = []
    for coord in (TheirCoordinator(), OurCoordinator()):
        seconds: list[threading.Thread] = []

        def register(coord: Any = coord, seconds: list[threading.Thread] = seconds) -> None:
            seconds.append(started(hold.wait, 2.5))
            coord.register_thread(seconds[0])

        first = AwaitedThread(register)
        first.start()
        coord.join([first])
        waited.append(not seconds[0].is_alive())
    assert waited == [False, True]


def test_departure_a_thread_does_not_wait_for_itself() -> None:
    theirs, ours = TheirCoordinator(), OurCoordinator()
    for coord in (theirs, ours):
        coord.request_stop()
    with pytest.raises(RuntimeError):
        theirs.join([threading.current_thread()], stop_grace_period_secs=0.05)
    ours.join([threading.current_thread()], stop_grace_period_secs=0.05)


@pytest.mark.parametrize("junk", [0, False])
def test_departure_what_is_false_is_no_exception_either(junk: object) -> None:
    TheirCoordinator().request_stop(junk)
    with pytest.raises(TypeError):
        OurCoordinator().request_stop(junk)


@pytest.mark.parametrize("junk", [5, "x", BoomError, (1, 2)])
def test_departure_a_wrong_argument_stops_too(junk: object) -> None:
    theirs, ours = TheirCoordinator(), OurCoordinator()
    for coord in (theirs, ours):
        with pytest.raises(TypeError):
            coord.request_stop(junk)
    assert (theirs.should_stop(), ours.should_stop()) == (False, True)


def test_departure_arguments_of_a_wrong_kind_are_refused_at_once() -> None:
    TheirCoordinator().register_thread(5)
    TheirCoordinator((5,))
    TheirLooper(TheirCoordinator(), -1, print)
    TheirLooper(TheirCoordinator(), "x", print)
    with pytest.raises(TypeError):
        OurCoordinator().register_thread(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        OurCoordinator((5,))  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        stepguard.coordination.looper.LooperThread(OurCoordinator(), -1, print)
    with pytest.raises(TypeError):
        stepguard.coordination.looper.LooperThread(OurCoordinator(), "x", print)  # type: ignore[arg-type]


def test_departure_an_exception_in_stop_loop_is_raised() -> None:
    outcomes = []
    for looper_kind, coord in (
        (TheirLooper, TheirCoordinator()),
        (stepguard.coordination.looper.LooperThread, OurCoordinator()),
    ):

        class Failing(looper_kind):  # type: ignore[misc,valid-type]
            def stop_loop(self) -> None:
                raise BoomError("while stopping")

        Failing(coord, 3600, print).start()
        coord.request_stop()
        outcomes.append(outcome(coord.join))
    # Theirs forgets every error after the stop request.
    assert outcomes == [None, (BoomError, "while stopping")]


def test_departure_missed_ticks_are_skipped() -> None:
    def burst(looper_kind: Any, coord: Any) -> tuple[float, Any]:
        """How long calls two, three and four take after a first one that was too long, and the looper."""
        calls: list[float] = []

        def work() -> None:
            calls.append(time.monotonic())
            if len(calls) == 1:
                time.sleep(1.8)
            if len(calls) == 4:
                coord.request_stop()

        looper = looper_kind.loop(coord, 0.4, work)
        coord.join()
        return calls[3] - calls[1], looper

    # At once. One of three is enough: a machine has pauses of its own.
    assert any(burst(TheirLooper, TheirCoordinator())[0] < 0.4 for _ in range(3))
    _, looper = burst(stepguard.coordination.looper.LooperThread, OurCoordinator())
    assert looper.skipped_ticks >= 4


@pytest.mark.parametrize("kind", [TheirCoordinator, stepguard.tensorflow.Coordinator], ids=["tensorflow", "stepguard"])
@pytest.mark.parametrize(
    "change",
    [
        lambda coord: coord.request_stop(),
        lambda coord: report(coord, BoomError()),
        lambda coord: coord.clear_stop(),
        lambda coord: coord.register_thread(threading.Thread(target=print)),
    ],
    ids=["request_stop", "request_stop with an error", "clear_stop", "register_thread"],
)
def test_who_holds_the_lock_keeps_others_from_changing_anything(kind: Any, change: Callable[[Any], object]) -> None:
    coord = kind()
    with coord._lock:
        changing = threading.Thread(target=change, args=(coord,), daemon=True)
        changing.start()
        changing.join(0.2)
        assert changing.is_alive()
        assert not coord.should_stop()
    changing.join(SOON_SECS)
    assert not changing.is_alive()


@pytest.mark.parametrize("kind", [TheirCoordinator, stepguard.tensorflow.Coordinator], ids=["tensorflow", "stepguard"])
def test_the_threads_that_have_registered_are_counted_under_the_lock(kind: Any) -> None:
    """Programs wait in this way until all of their threads run; so do TensorFlow's own tests."""
    coord = kind()
    threads = [threading.Thread(target=coord.wait_for_stop) for _ in range(2)]
    for thread in threads:
        coord.register_thread(thread)
        thread.start()
    with coord._lock:
        assert len(coord._registered_threads) == 2
    coord.request_stop()
    coord.join()
    assert not any(thread.is_alive() for thread in threads)
