"""Our Coordinator and LooperThread beside TensorFlow's own: the same scenario on both, and the same outcome."""

from __future__ import annotations

import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import tensorflow as tf
from coordinators import (
    SOON_SECS,
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

BOTH = pytest.mark.parametrize("kind", [TheirCoordinator, OurCoordinator], ids=["tensorflow", "stepguard"])


def cancelled() -> Exception:
    return tf.errors.CancelledError(None, None, "cancelled")


def report_exc_info(coord: Any, error: BaseException) -> None:
    try:
        raise error
    except BaseException:  # noqa: BLE001
        coord.request_stop(sys.exc_info())


# --- the interface ---


def public_names(kind: type) -> list[str]:
    return [name for name in dir(kind) if not name.startswith("_")]


def test_nothing_public_is_left_to_tensorflows_implementation() -> None:
    for name in public_names(TheirCoordinator):
        assert inspect.getattr_static(OurCoordinator, name) is inspect.getattr_static(
            stepguard.coordination.coordinator.Coordinator, name
        ), name


@pytest.mark.parametrize("name", public_names(TheirCoordinator))
def test_the_methods_take_the_same_arguments(name: str) -> None:
    theirs, ours = getattr(TheirCoordinator, name), getattr(OurCoordinator, name)
    if isinstance(theirs, property):
        assert isinstance(ours, property)
    else:
        assert arguments(ours) == arguments(theirs)


@pytest.mark.parametrize("name", ["__init__", "loop", "run", "start_loop", "run_loop", "stop_loop"])
def test_the_looper_takes_the_same_arguments_and_more_by_keyword_only(name: str) -> None:
    theirs, ours = getattr(TheirLooper, name), getattr(stepguard.coordination.looper.LooperThread, name)
    assert arguments(ours) == arguments(theirs)


def arguments(call: Callable[..., object]) -> list[tuple[str, object]]:
    parameters = inspect.signature(call).parameters.values()
    return [(each.name, each.default) for each in parameters if each.kind is not each.KEYWORD_ONLY]


# --- the same outcome of the same scenario ---


SCENARIOS: dict[str, Callable[[Any], list[object]]] = {}


def scenario(play: Callable[[Any], list[object]]) -> Callable[[Any], list[object]]:
    SCENARIOS[play.__name__] = play
    return play


@scenario
def nothing_happens(coord: Any) -> list[object]:
    return [
        coord.should_stop(),
        coord.joined,
        coord.wait_for_stop(0),
        coord.wait_for_stop(-1),
        coord.join(),
        coord.joined,
    ]


@scenario
def a_plain_stop(coord: Any) -> list[object]:
    return [coord.request_stop(), coord.should_stop(), coord.wait_for_stop(), coord.join(), coord.joined]


@scenario
def an_error_joined_twice(coord: Any) -> list[object]:
    report(coord, BoomError("x"))
    return [coord.should_stop(), coord.joined, outcome(coord.join), coord.joined, outcome(coord.join)]


@scenario
def an_error_as_exc_info(coord: Any) -> list[object]:
    report_exc_info(coord, BoomError("x"))
    return [outcome(coord.raise_requested_exception), outcome(coord.raise_requested_exception), outcome(coord.join)]


@scenario
def two_errors(coord: Any) -> list[object]:
    report(coord, BoomError("1"))
    report(coord, ValueError("2"))
    return [outcome(coord.join)]


@scenario
def an_error_then_the_end_of_input(coord: Any) -> list[object]:
    report(coord, BoomError("1"))
    report(coord, end_of_input())
    return [outcome(coord.join)]


@scenario
def the_end_of_input(coord: Any) -> list[object]:
    report(coord, end_of_input())
    return [coord.should_stop(), outcome(coord.raise_requested_exception), outcome(coord.join)]


@scenario
def cancelled_after_the_end_of_input(coord: Any) -> list[object]:
    report(coord, end_of_input())
    report(coord, cancelled())
    return [outcome(coord.join)]


@scenario
def cancelled_before_any_stop(coord: Any) -> list[object]:
    report(coord, cancelled())
    return [outcome(coord.join)]


@scenario
def an_error_in_a_block(coord: Any) -> list[object]:
    return [outcome(in_block, coord, BoomError("x")), coord.should_stop(), outcome(coord.join)]


@scenario
def the_end_of_input_in_a_block(coord: Any) -> list[object]:
    return [outcome(in_block, coord, end_of_input()), coord.should_stop(), outcome(coord.join)]


@scenario
def a_stop_iteration_in_a_block(coord: Any) -> list[object]:
    return [outcome(in_block, coord, StopIteration("x")), outcome(coord.join)]


@scenario
def reports_after_join(coord: Any) -> list[object]:
    coord.join()
    return [
        outcome(report, coord, BoomError("x")),
        outcome(report_exc_info, coord, BoomError("x")),
        outcome(in_block, coord, BoomError("x")),
        outcome(report, coord, end_of_input()),
        outcome(coord.request_stop),
    ]


@scenario
def the_error_of_join_reported_again(coord: Any) -> list[object]:
    def run() -> None:
        try:
            coord.join()
        except BoomError as error:
            coord.request_stop(error)

    report(coord, BoomError("x"))
    return [outcome(run)]


@scenario
def cleared(coord: Any) -> list[object]:
    report(coord, BoomError("x"))
    outcome(coord.join)
    coord.clear_stop()
    answers = [coord.should_stop(), coord.joined, outcome(coord.raise_requested_exception), outcome(coord.join)]
    coord.clear_stop()
    report(coord, ValueError("second"))
    return [*answers, outcome(coord.join)]


@scenario
def threads_that_obey(coord: Any) -> list[object]:
    given = started(coord.wait_for_stop)
    registered = started(coord.wait_for_stop)
    coord.register_thread(registered)
    coord.register_thread(registered)
    coord.request_stop()
    return [outcome(coord.join, [given, registered]), given.is_alive(), registered.is_alive()]


@scenario
def threads_never_started(coord: Any) -> list[object]:
    coord.register_thread(threading.Thread())
    return [outcome(coord.join, [threading.Thread()])]


@scenario
def threads_that_end_by_themselves(coord: Any) -> list[object]:
    return [outcome(coord.join, (started(time.sleep, 0.05) for _ in range(2))), coord.should_stop()]


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_same_happens_on_both(name: str) -> None:
    assert SCENARIOS[name](OurCoordinator()) == SCENARIOS[name](TheirCoordinator())


@BOTH
def test_own_clean_stop_types_replace_the_default(kind: type) -> None:
    coord = kind((BoomError,))
    report(coord, BoomError())
    coord.join()
    coord = kind(clean_stop_exception_types=(BoomError,))
    report(coord, end_of_input())
    with pytest.raises(tf.errors.OutOfRangeError):
        coord.join()


@BOTH
@pytest.mark.parametrize("grace_secs", [0, 0.1, -1])
def test_threads_that_do_not_stop_are_named_in_a_runtime_error(
    kind: type, grace_secs: float, hold: threading.Event
) -> None:
    coord = kind()
    lagging = started(hold.wait, name="the-laggard")
    coord.request_stop()
    with pytest.raises(RuntimeError, match="the-laggard"):
        coord.join([lagging], stop_grace_period_secs=grace_secs)
    assert coord.joined
    coord.join([lagging], stop_grace_period_secs=grace_secs, ignore_live_threads=True)


@BOTH
def test_an_error_comes_before_the_threads_that_do_not_stop(kind: type, hold: threading.Event) -> None:
    coord = kind()
    report(coord, BoomError("x"))
    with pytest.raises(BoomError):
        coord.join([started(hold.wait)], stop_grace_period_secs=0.05)


@BOTH
def test_registered_threads_outlive_a_clear(kind: type, hold: threading.Event) -> None:
    coord = kind()
    coord.register_thread(started(hold.wait, name="the-laggard"))
    coord.request_stop()
    coord.clear_stop()
    coord.request_stop()
    with pytest.raises(RuntimeError, match="the-laggard"):
        coord.join(stop_grace_period_secs=0.05)


# --- where TensorFlow wants a Coordinator ---


@dataclass
class Queue:
    """A queue of three numbers, with the runner that fills it."""

    session: tf.compat.v1.Session
    runner: tf.compat.v1.train.QueueRunner
    take: tf.Tensor


@pytest.fixture
def queue() -> Iterator[Queue]:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        source = tf.queue.FIFOQueue(10, [tf.int32], [[]])
        session.run(source.enqueue_many([[1, 2, 3]]))
        session.run(source.close())
        batches = tf.queue.FIFOQueue(2, [tf.int32], [[]])
        runner = tf.compat.v1.train.QueueRunner(batches, [batches.enqueue(source.dequeue())] * 2)
        tf.compat.v1.train.add_queue_runner(runner)
        yield Queue(session, runner, batches.dequeue())


def taken(queue: Queue, coord: Any) -> list[int]:
    numbers: list[int] = []
    with coord.stop_on_exception():
        while not coord.should_stop():
            numbers.append(int(queue.session.run(queue.take)))
    return sorted(numbers)


@BOTH
def test_queue_runners_run_dry_and_end_cleanly(kind: type, queue: Queue) -> None:
    coord = kind()
    threads = queue.runner.create_threads(queue.session, coord=coord, daemon=True, start=True)
    numbers = taken(queue, coord)
    coord.join(threads, stop_grace_period_secs=SOON_SECS)
    # The runner asks for the stop when it has put the last one: the loop may leave that in the queue.
    assert set(numbers) <= {1, 2, 3}
    assert [thread.is_alive() for thread in threads] == [False] * len(threads)
    assert queue.runner.exceptions_raised == []


@BOTH
def test_start_queue_runners_registers_with_it_and_a_stop_cancels_them(kind: type) -> None:
    coord = kind()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        full = tf.queue.FIFOQueue(1, [tf.int32], [[]])
        tf.compat.v1.train.add_queue_runner(tf.compat.v1.train.QueueRunner(full, [full.enqueue(1)] * 2))
        threads = tf.compat.v1.train.start_queue_runners(session, coord=coord)
        assert len(threads) == 3
        assert session.run(full.dequeue()) == 1
        coord.request_stop()
        coord.join(stop_grace_period_secs=SOON_SECS)
    assert [thread.is_alive() for thread in threads] == [False] * 3


@BOTH
def test_an_error_in_a_queue_runner_is_raised_by_join(kind: type) -> None:
    coord = kind()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        batches = tf.queue.FIFOQueue(2, [tf.float32], [[]])
        broken = tf.debugging.check_numerics(tf.constant(float("nan")), "not a number")
        tf.compat.v1.train.add_queue_runner(tf.compat.v1.train.QueueRunner(batches, [batches.enqueue(broken)]))
        tf.compat.v1.train.start_queue_runners(session, coord=coord)
        with pytest.raises(tf.errors.InvalidArgumentError, match="not a number"):
            coord.join(stop_grace_period_secs=SOON_SECS)


@BOTH
def test_tensorflows_looper_works_with_it(kind: type) -> None:
    coord = kind()
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise BoomError("third call")

    TheirLooper.loop(coord, 0.001, work)
    with pytest.raises(BoomError, match="third call"):
        coord.join()
    assert len(calls) == 3


def test_no_private_state_of_tensorflows_is_asked_for(queue: Queue) -> None:
    ours = set(dir(OurCoordinator())) - set(dir(TheirCoordinator))
    asked: set[str] = set()

    class Spy(OurCoordinator):
        def __getattribute__(self, name: str) -> Any:
            asked.add(name)
            return super().__getattribute__(name)

    coord = Spy()
    TheirLooper.loop(coord, 0.001, lambda: None)
    threads = queue.runner.create_threads(queue.session, coord=coord, daemon=True, start=True)
    coord.request_stop()
    coord.join(threads, stop_grace_period_secs=SOON_SECS)
    assert {name for name in asked if name.startswith("_") and not name.startswith("__")} <= ours


# --- the loopers ---


def loopers(test: Callable[..., object]) -> Callable[..., object]:
    pairs = [(TheirLooper, TheirCoordinator), (stepguard.coordination.looper.LooperThread, OurCoordinator)]
    return pytest.mark.parametrize(("looper_kind", "kind"), pairs, ids=["tensorflow", "stepguard"])(test)


@loopers
@pytest.mark.parametrize("fails_in", ["start", "run", "stop", None])
@pytest.mark.parametrize("interval_secs", [None, 0, 0.001])
def test_subclasses_are_called_in_the_same_order(
    looper_kind: Any, kind: type, fails_in: str | None, interval_secs: float | None
) -> None:
    pages: list[str] = []
    coord = kind()

    def write(page: str) -> None:
        pages.append(page)
        if page == fails_in:
            raise BoomError(page)

    class Diary(looper_kind):
        def start_loop(self) -> None:
            write("start")

        def run_loop(self) -> None:
            write("run")
            if len(pages) == 4:
                raise end_of_input() if fails_in is None else StopIteration

        def stop_loop(self) -> None:
            write("stop")

    diary = Diary(coord, interval_secs)
    assert diary.daemon
    if fails_in == "stop":
        coord.request_stop()
    diary.start()
    answer = outcome(coord.join)
    expected = {
        "start": (["start"], (BoomError, "start")),
        "run": (["start", "run"], (BoomError, "run")),
        None: (["start", "run", "run", "run"], None),
    }
    if fails_in in expected:
        assert (pages, answer) == expected[fails_in]
    else:
        assert pages == ["start", "stop"]


@loopers
def test_a_looper_registers_itself_when_it_is_made(looper_kind: Any, kind: type, hold: threading.Event) -> None:
    coord = kind()
    begun = threading.Event()

    def work() -> None:
        begun.set()
        hold.wait()

    looper = looper_kind(coord, 10, target=work)
    assert not looper.is_alive()
    looper.start()
    assert begun.wait(SOON_SECS)
    coord.request_stop()
    with pytest.raises(RuntimeError, match=looper.name):
        coord.join(stop_grace_period_secs=0.05)


@loopers
def test_the_first_call_is_made_at_once_with_the_arguments(looper_kind: Any, kind: type) -> None:
    coord = kind()
    calls: list[object] = []

    def work(*args: object, **kwargs: object) -> None:
        calls.append((args, kwargs))
        coord.request_stop()

    looper_kind.loop(coord, 3600, work, [1], {"two": 2})
    coord.join()
    assert calls == [((1,), {"two": 2})]


@loopers
def test_what_the_looper_refuses(looper_kind: Any, kind: type) -> None:
    for wrong in [(5, 1), (kind(), 1, None, (1,)), (kind(), 1, None, None, {"a": 1})]:
        with pytest.raises(ValueError):
            looper_kind(*wrong)
