"""Our Coordinator and LooperThread beside TensorFlow's own: the same scenario on both, and the same outcome.

Where the two are meant to differ, the test says so by name: ``test_departure_...`` asserts both sides.
"""

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

import stepguard.coordination.coordinator
import stepguard.coordination.looper
import stepguard.tensorflow

SOON_SECS = 30.0
TheirCoordinator = tf.train.Coordinator
TheirLooper = tf.compat.v1.train.LooperThread


class OurCoordinator(stepguard.coordination.coordinator.Coordinator, tf.train.Coordinator):
    """As the TensorFlow engine has it: TensorFlow's by type, and nothing of its implementation."""

    def __init__(self, clean_stop_exception_types: tuple[type[BaseException], ...] | None = None) -> None:
        if clean_stop_exception_types is None:
            clean_stop_exception_types = (tf.errors.OutOfRangeError,)
        super().__init__(clean_stop_exception_types, late_noise_types=(tf.errors.CancelledError,))


BOTH = pytest.mark.parametrize("kind", [TheirCoordinator, OurCoordinator], ids=["tensorflow", "stepguard"])


class BoomError(Exception):
    """What goes wrong in these tests."""


def end_of_input() -> Exception:
    return tf.errors.OutOfRangeError(None, None, "end of input")


def cancelled() -> Exception:
    return tf.errors.CancelledError(None, None, "cancelled")


def report(coord: Any, error: BaseException) -> None:
    """As TensorFlow wants it: while the error is being handled."""
    try:
        raise error
    except BaseException as handled:  # noqa: BLE001 - every kind, as stop_on_exception
        coord.request_stop(handled)


def report_exc_info(coord: Any, error: BaseException) -> None:
    try:
        raise error
    except BaseException:  # noqa: BLE001
        coord.request_stop(sys.exc_info())


def outcome(call: Callable[..., object], *args: Any, **kwargs: Any) -> object:
    """What the call returned, or the type and the text of what it raised."""
    try:
        return call(*args, **kwargs)
    except BaseException as error:  # noqa: BLE001
        return type(error), str(error)


def in_block(coord: Any, error: BaseException) -> None:
    with coord.stop_on_exception():
        raise error


@pytest.fixture
def hold() -> Iterator[threading.Event]:
    """What stubborn threads wait for: set when the test ends."""
    event = threading.Event()
    yield event
    event.set()


def started(work: Callable[..., object], *args: object, name: str | None = None) -> threading.Thread:
    thread = threading.Thread(target=work, args=args, name=name, daemon=True)
    thread.start()
    return thread


# --- the interface


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


# --- the same outcome of the same scenario

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


# --- where TensorFlow wants a Coordinator


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


# --- the loopers


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


# --- departures


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
        ended_at: list[float] = []

        def work() -> None:
            time.sleep(0.1)
            ended_at.append(time.monotonic())

        coord.join([started(work)])
        return time.monotonic() - ended_at[0]

    assert late_secs(TheirCoordinator()) > 0.5
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

        def first(coord: Any = coord, seconds: list[threading.Thread] = seconds) -> None:
            hold.wait(0.1)
            seconds.append(started(hold.wait, 2.5))
            coord.register_thread(seconds[0])

        coord.join([started(first)])
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
    bursts = []
    for looper_kind, coord in (
        (TheirLooper, TheirCoordinator()),
        (stepguard.coordination.looper.LooperThread, OurCoordinator()),
    ):
        calls: list[float] = []

        def work(coord: Any = coord, calls: list[float] = calls) -> None:
            calls.append(time.monotonic())
            if len(calls) == 1:
                time.sleep(1.8)
            if len(calls) == 4:
                coord.request_stop()

        looper_kind.loop(coord, 0.4, work)
        coord.join()
        bursts.append(calls[3] - calls[1])
    # Calls two, three and four: at once, or on three ticks.
    assert bursts[0] < 0.4
    assert bursts[1] > 0.6


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
