"""The coordinator: the stop flag, the errors, and the joining of threads."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator

import pytest

from stepguard.coordination.coordinator import Coordinator

# More than anything here takes, and less than anyone would wait.
SOON_SECS = 30.0


class BoomError(Exception):
    """What goes wrong in these tests."""


class InputEndedError(Exception):
    """A clean stop."""


class CutShortError(Exception):
    """What a stop makes other threads say."""


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SOON_SECS
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    return condition()


def boom(text: str = "boom") -> None:
    raise BoomError(text)


def raised(text: str = "boom") -> BoomError:
    try:
        boom(text)
    except BoomError as error:
        return error
    raise AssertionError


def notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


@pytest.fixture
def coord() -> Coordinator:
    return Coordinator(clean_stop_exception_types=(InputEndedError,), late_noise_types=(CutShortError,))


class Threads:
    """Starts threads, and ends at the latest with the test."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.started: list[threading.Thread] = []

    def start(self, work: Callable[..., object], *args: object, name: str | None = None) -> threading.Thread:
        thread = threading.Thread(target=work, args=args, name=name, daemon=True)
        self.started.append(thread)
        thread.start()
        return thread

    def stubborn(self, name: str = "stubborn") -> threading.Thread:
        """A thread that does not listen to any coordinator."""
        return self.start(self.release.wait, name=name)


@pytest.fixture
def threads() -> Iterator[Threads]:
    some = Threads()
    yield some
    some.release.set()
    for thread in some.started:
        thread.join(SOON_SECS)
        assert not thread.is_alive(), f"{thread.name} outlives its test"


# --- the flag


def test_no_stop_is_requested_at_first(coord: Coordinator) -> None:
    assert not coord.should_stop()
    assert not coord.wait_for_stop(0)
    assert not coord.wait_for_stop(-1)
    assert not coord.joined


def test_a_stop_is_seen_by_all(coord: Coordinator) -> None:
    coord.request_stop()
    assert coord.should_stop()
    assert coord.wait_for_stop()


def test_waiting_ends_after_its_timeout(coord: Coordinator) -> None:
    began = time.monotonic()
    assert not coord.wait_for_stop(0.05)
    assert 0.05 <= time.monotonic() - began < SOON_SECS


@pytest.mark.parametrize("timeout", [None, 3600, 1e30, float("inf")])
def test_a_stop_wakes_every_waiting_thread(coord: Coordinator, threads: Threads, timeout: float | None) -> None:
    answers: list[bool] = []
    waiting = [threads.start(lambda: answers.append(coord.wait_for_stop(timeout))) for _ in range(20)]
    assert eventually(lambda: len(coord._waiters) == 20)
    coord.request_stop()
    for thread in waiting:
        thread.join(SOON_SECS)
    assert answers == [True] * 20
    assert not coord._waiters


def test_no_stop_is_missed_by_a_thread_that_begins_to_wait_at_that_moment(coord: Coordinator) -> None:
    class StopsAtTheLastMoment(set[threading.Lock]):
        def add(self, waiter: threading.Lock) -> None:
            coord.request_stop()
            super().add(waiter)

    coord._waiters = StopsAtTheLastMoment()
    assert coord.wait_for_stop(60)


def test_a_wait_that_times_out_leaves_nothing_behind(coord: Coordinator) -> None:
    for _ in range(3):
        coord.wait_for_stop(0.001)
    assert not coord._waiters


# --- the first error


def test_an_error_made_outside_an_except_block_stops_and_is_raised(coord: Coordinator) -> None:
    coord.request_stop(BoomError("never raised before"))
    assert coord.should_stop()
    with pytest.raises(BoomError, match="never raised before"):
        coord.join()


def test_the_tuple_of_exc_info_is_taken_with_its_traceback(coord: Coordinator) -> None:
    try:
        boom()
    except BoomError:
        info = sys.exc_info()
    error = info[1]
    assert error is not None
    error.__traceback__ = None
    coord.request_stop(info)
    with pytest.raises(BoomError) as caught:
        coord.join()
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "boom"


def test_exc_info_where_nothing_is_handled_is_a_plain_stop(coord: Coordinator) -> None:
    coord.request_stop(sys.exc_info())
    assert coord.should_stop()
    coord.join()


@pytest.mark.parametrize(
    "junk", [5, 0, False, "text", (), (1, 2), BoomError, (BoomError, None, None), (1, BoomError(), 3)]
)
def test_what_is_no_exception_stops_the_run_with_a_type_error(coord: Coordinator, junk: object) -> None:
    with pytest.raises(TypeError, match="must be an exception"):
        coord.request_stop(junk)  # type: ignore[arg-type]
    assert coord.should_stop()
    with pytest.raises(TypeError, match="must be an exception"):
        coord.join()


def test_the_first_error_is_raised_as_often_as_it_is_asked_for(coord: Coordinator) -> None:
    error = raised()
    coord.request_stop(error)
    for ask in [coord.raise_requested_exception, coord.join] * 2:
        with pytest.raises(BoomError) as caught:
            ask()
        assert caught.value is error


def test_the_traceback_shows_where_it_was_raised_and_does_not_grow(coord: Coordinator) -> None:
    coord.request_stop(raised())
    depths = []
    for _ in range(4):
        with pytest.raises(BoomError) as caught:
            coord.join()
        names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert names[-2:] == ["raised", "boom"]
        depths.append(len(names))
    assert len(set(depths)) == 1


def test_an_error_is_freed_with_the_coordinator_and_no_garbage_collection() -> None:
    coord = Coordinator()
    coord.request_stop(raised())
    for ask in (coord.join, coord.raise_requested_exception, coord.join):
        with pytest.raises(BoomError) as caught:
            ask()
    error, there = weakref.ref(caught.value), weakref.ref(coord)
    gc.collect()
    gc.disable()
    try:
        del caught, ask, coord
        assert there() is None
        assert error() is None
    finally:
        gc.enable()


def test_later_errors_become_notes_of_the_first_one_line_each(coord: Coordinator, threads: Threads) -> None:
    coord.request_stop(raised("the first"))
    threads.start(coord.request_stop, ValueError("two\n  lines"), name="reader-7").join(SOON_SECS)
    coord.request_stop(KeyError("third"))
    with pytest.raises(BoomError, match="the first") as caught:
        coord.join()
    assert notes(caught.value) == [
        "later error: ValueError: two lines (in thread reader-7)",
        f"later error: KeyError: 'third' (in thread {threading.current_thread().name})",
    ]


def test_a_note_of_a_very_long_error_stays_readable(coord: Coordinator) -> None:
    first = raised()
    coord.request_stop(first)
    coord.request_stop(ValueError("x" * 100_000))
    (note,) = notes(first)
    assert note.startswith("later error: ValueError: xxx")
    assert len(note) < 600


def test_a_later_error_is_logged_with_its_traceback(coord: Coordinator, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    coord.request_stop(raised("the first"))
    coord.request_stop(raised("the second"))
    assert "in boom" in caplog.text
    assert "the second" in caplog.text


def test_the_same_error_reported_again_is_no_later_error(coord: Coordinator) -> None:
    error = raised()
    coord.request_stop(error)
    coord.request_stop(error)
    assert notes(error) == []


def test_an_error_that_takes_no_notes_or_has_no_text_breaks_nothing(
    coord: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    class FrozenError(Exception):
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    class MuteError(Exception):
        def __str__(self) -> str:
            raise BoomError

    coord.request_stop(FrozenError("first"))
    coord.request_stop(MuteError())
    with pytest.raises(FrozenError) as caught:
        coord.join()
    # Python 3.10 has no add_note that could be refused.
    told = "\n".join([caplog.text, *notes(caught.value)])
    assert "later error" in told
    assert "MuteError" in told


def test_of_many_errors_at_once_none_is_lost(threads: Threads) -> None:
    coord = Coordinator()
    together = threading.Barrier(16)

    def fail(number: int) -> None:
        with coord.stop_on_exception():
            together.wait(SOON_SECS)
            raise BoomError(f"number {number}.")

    failing = [threads.start(fail, number) for number in range(16)]
    with pytest.raises(BoomError) as caught:
        coord.join(failing)
    told = "\n".join([str(caught.value), *notes(caught.value)])
    assert [told.count(f"number {number}.") for number in range(16)] == [1] * 16


# --- clean stops and their consequences


def test_a_clean_stop_is_no_error(coord: Coordinator) -> None:
    coord.request_stop(InputEndedError())
    assert coord.should_stop()
    coord.join()


@pytest.mark.parametrize("why", [None, InputEndedError()])
def test_an_error_after_a_clean_stop_is_raised(coord: Coordinator, why: Exception | None) -> None:
    coord.request_stop(why)
    coord.request_stop(BoomError("while stopping"))
    coord.request_stop(InputEndedError())
    with pytest.raises(BoomError, match="while stopping") as caught:
        coord.join()
    assert notes(caught.value) == []


@pytest.mark.parametrize("why", [None, InputEndedError()])
def test_a_mere_consequence_of_a_clean_stop_does_not_make_it_a_failure(
    coord: Coordinator, why: Exception | None
) -> None:
    coord.request_stop(why)
    coord.request_stop(CutShortError())
    coord.join()


def test_a_mere_consequence_is_no_note_of_the_error_either(coord: Coordinator) -> None:
    coord.request_stop(BoomError())
    coord.request_stop(CutShortError())
    with pytest.raises(BoomError) as caught:
        coord.join()
    assert notes(caught.value) == []


def test_what_would_be_a_consequence_is_an_error_before_any_stop(coord: Coordinator) -> None:
    coord.request_stop(CutShortError())
    with pytest.raises(CutShortError):
        coord.join()


@pytest.mark.parametrize("junk", [5, "text", ValueError, (5,), (ValueError, ValueError())])
@pytest.mark.parametrize("name", ["clean_stop_exception_types", "late_noise_types"])
def test_what_is_no_tuple_of_exception_types_is_refused(name: str, junk: object) -> None:
    with pytest.raises(TypeError, match=name):
        Coordinator(**{name: junk})  # type: ignore[arg-type]


def test_lists_of_exception_types_are_taken_and_none_is_none() -> None:
    Coordinator(None)
    coord = Coordinator([InputEndedError])
    coord.request_stop(InputEndedError())
    coord.join()


# --- stop_on_exception


def test_an_exception_of_the_block_ends_there_and_is_raised_by_join(coord: Coordinator) -> None:
    with coord.stop_on_exception():
        boom()
    assert coord.should_stop()
    with pytest.raises(BoomError):
        coord.join()


def test_a_block_without_an_exception_stops_nothing(coord: Coordinator) -> None:
    with coord.stop_on_exception():
        pass
    assert not coord.should_stop()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_error_stops_and_goes_on(coord: Coordinator, kind: type[BaseException]) -> None:
    with pytest.raises(kind), coord.stop_on_exception():
        raise kind
    assert coord.should_stop()
    with pytest.raises(kind):
        coord.join()


def test_a_stop_iteration_of_the_block_stays_one(coord: Coordinator) -> None:
    with coord.stop_on_exception():
        next(iter([]))
    with pytest.raises(StopIteration):
        coord.join()


def test_an_exception_after_join_goes_to_the_caller(coord: Coordinator) -> None:
    coord.join()
    with pytest.raises(BoomError), coord.stop_on_exception():
        boom()
    with pytest.raises(ValueError, match="direct"):
        coord.request_stop(ValueError("direct"))
    coord.request_stop(InputEndedError())
    coord.request_stop()


def test_an_error_that_is_reported_after_join_is_kept_and_not_raised(coord: Coordinator) -> None:
    error = ValueError("late")
    coord.request_stop()
    coord.join([])

    coord.report(error)

    with pytest.raises(ValueError, match="late"):
        coord.raise_requested_exception()


def test_an_error_after_join_is_kept_for_who_asks(coord: Coordinator) -> None:
    coord.join()
    error = BoomError()
    with pytest.raises(BoomError):
        coord.request_stop(error)
    with pytest.raises(BoomError) as caught:
        coord.raise_requested_exception()
    assert caught.value is error


def test_an_error_at_the_moment_when_join_finishes_is_raised_by_one_of_both(threads: Threads) -> None:
    for _ in range(300):
        coord = Coordinator()
        seen: list[BaseException] = []

        def report(coord: Coordinator = coord, seen: list[BaseException] = seen) -> None:
            try:
                coord.request_stop(BoomError())
            except BoomError as error:
                seen.append(error)

        reporting = threads.start(report)
        try:
            coord.join()
        except BoomError as error:
            seen.append(error)
        reporting.join(SOON_SECS)
        assert seen


# --- join


def test_joining_nothing_returns_at_once(coord: Coordinator) -> None:
    coord.join()
    coord.join([])
    assert coord.joined


@pytest.mark.parametrize("requested", [False, True])
def test_join_returns_as_soon_as_the_last_thread_has_ended(
    coord: Coordinator, threads: Threads, requested: bool
) -> None:
    late_secs: list[float] = []
    for _ in range(3):
        ended_at: list[float] = []

        def work(secs: float, ended_at: list[float] = ended_at) -> None:
            threads.release.wait(secs)
            ended_at.append(time.monotonic())

        working = [threads.start(work, secs) for secs in (0.15, 0.05, 0.1)]
        if requested:
            coord.request_stop()
        coord.join(working)
        late_secs.append(time.monotonic() - max(ended_at))
        assert len(ended_at) == 3
        coord.clear_stop()
    # TensorFlow's looks once a second. The soonest: a machine has pauses of its own.
    assert min(late_secs) < 0.5


def test_join_waits_without_limit_until_a_stop_is_requested(coord: Coordinator, threads: Threads) -> None:
    working = threads.stubborn()
    errors: list[BaseException] = []
    ended_at: list[float] = []

    def join() -> None:
        try:
            coord.join([working], stop_grace_period_secs=0.05)
        except RuntimeError as error:
            errors.append(error)
            ended_at.append(time.monotonic())

    joining = threads.start(join)
    joining.join(0.3)
    assert joining.is_alive()
    requested_at = time.monotonic()
    coord.request_stop()
    joining.join(SOON_SECS)
    assert "stubborn" in str(errors[0])
    assert 0.05 <= ended_at[0] - requested_at < SOON_SECS


def test_a_stop_long_ago_leaves_the_whole_grace_period_to_join(coord: Coordinator, threads: Threads) -> None:
    grace_secs = 0.3
    coord.request_stop()
    requested_at = time.monotonic()
    while time.monotonic() < requested_at + grace_secs:
        coord.wait_for_stop()
    working = threads.stubborn()
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        coord.join([working], stop_grace_period_secs=grace_secs)
    assert time.monotonic() - began > 0.9 * grace_secs


def test_all_threads_share_one_deadline(coord: Coordinator, threads: Threads) -> None:
    working = [threads.stubborn(f"stubborn-{number}") for number in range(5)]
    coord.request_stop()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="stubborn-0, stubborn-1, stubborn-2, stubborn-3, stubborn-4"):
        coord.join(working, stop_grace_period_secs=0.5)
    assert 0.45 < time.monotonic() - began < 5 * 0.45
    assert coord.joined


def test_a_thread_that_ended_meanwhile_is_not_named(coord: Coordinator, threads: Threads) -> None:
    working = [threads.stubborn(), threads.start(coord.wait_for_stop, name="obedient")]
    coord.request_stop()
    with pytest.raises(RuntimeError, match="stubborn") as caught:
        coord.join(working, stop_grace_period_secs=0.1)
    assert "obedient" not in str(caught.value)


def test_live_threads_may_be_ignored_with_one_warning(
    coord: Coordinator, threads: Threads, caplog: pytest.LogCaptureFixture
) -> None:
    coord.request_stop()
    coord.join([threads.stubborn()], stop_grace_period_secs=0.01, ignore_live_threads=True)
    assert [(each.levelname, "stubborn" in each.getMessage()) for each in caplog.records] == [("WARNING", True)]
    assert coord.joined


def test_an_error_comes_before_live_threads_and_notes_them_once(coord: Coordinator, threads: Threads) -> None:
    working = threads.stubborn()
    coord.request_stop(raised())
    for _ in range(2):
        with pytest.raises(BoomError) as caught:
            coord.join([working], stop_grace_period_secs=0.01)
    (note,) = notes(caught.value)
    assert "stubborn" in note


def test_registered_threads_are_joined_with_the_given_ones(coord: Coordinator, threads: Threads) -> None:
    given, registered = threads.stubborn("given"), threads.stubborn("registered")
    coord.register_thread(registered)
    coord.register_thread(registered)
    coord.request_stop()
    with pytest.raises(RuntimeError, match=": given, registered;"):
        coord.join((each for each in [given]), stop_grace_period_secs=0.01)


def test_a_thread_registered_while_joining_is_waited_for(coord: Coordinator, threads: Threads) -> None:
    done: list[str] = []

    def second() -> None:
        threads.release.wait(0.2)
        done.append("second")

    def first() -> None:
        threads.release.wait(0.1)
        coord.register_thread(threads.start(second))

    coord.join([threads.start(first)])
    assert done == ["second"]


def test_a_live_registered_thread_is_waited_for_again_and_an_ended_one_forgotten(
    coord: Coordinator, threads: Threads
) -> None:
    coord.register_thread(threads.stubborn())
    coord.request_stop()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stubborn"):
            coord.join(stop_grace_period_secs=0.01)
    threads.release.set()
    coord.join(stop_grace_period_secs=SOON_SECS)
    assert not coord._registered_threads


def test_a_thread_that_waits_for_what_comes_after_is_not_waited_for(coord: Coordinator, threads: Threads) -> None:
    comes_after, is_waiting = threading.Event(), threading.Event()

    def work() -> None:
        coord.wait_for_stop()
        with coord.not_joined():
            is_waiting.set()
            assert comes_after.wait(SOON_SECS)

    thread = threads.start(work)
    coord.register_thread(thread)
    coord.request_stop()
    began = time.monotonic()
    coord.join(stop_grace_period_secs=SOON_SECS)
    assert is_waiting.is_set()
    assert time.monotonic() - began < SOON_SECS / 2
    # It is still one of those that the coordinator knows.
    comes_after.set()
    thread.join(SOON_SECS)
    coord.join()


def test_before_a_stop_such_a_thread_is_waited_for(coord: Coordinator, threads: Threads) -> None:
    comes_after, is_waiting = threading.Event(), threading.Event()

    def work() -> None:
        with coord.not_joined():
            is_waiting.set()
            assert comes_after.wait(SOON_SECS)

    thread = threads.start(work)
    assert is_waiting.wait(SOON_SECS)
    joining = threads.start(lambda: coord.join([thread]))
    joining.join(0.3)
    assert joining.is_alive()
    comes_after.set()
    joining.join(SOON_SECS)
    assert not joining.is_alive()


def test_a_thread_never_started_is_not_waited_for(coord: Coordinator) -> None:
    coord.register_thread(threading.Thread(target=boom))
    coord.request_stop()
    coord.join([threading.Thread(target=boom)])


@pytest.mark.parametrize("requested", [False, True])
def test_a_thread_that_joins_itself_does_not_wait_for_itself(coord: Coordinator, requested: bool) -> None:
    if requested:
        coord.request_stop()
    coord.register_thread(threading.current_thread())
    coord.join([threading.current_thread()])
    assert coord.joined


def test_two_threads_may_join_at_once(coord: Coordinator, threads: Threads) -> None:
    seen: list[BaseException] = []

    def join() -> None:
        try:
            coord.join([working])
        except BoomError as error:
            seen.append(error)

    working = threads.start(coord.wait_for_stop)
    joining = [threads.start(join) for _ in range(2)]
    error = raised()
    coord.request_stop(error)
    for thread in joining:
        thread.join(SOON_SECS)
    assert seen == [error, error]


@pytest.mark.parametrize("junk", [5, threading.current_thread(), [5], "threads", [None]])
def test_what_is_no_list_of_threads_is_refused_before_waiting(coord: Coordinator, junk: object) -> None:
    with pytest.raises(TypeError, match="thread"):
        coord.join(junk)  # type: ignore[arg-type]
    assert not coord.joined


def test_what_is_no_thread_cannot_be_registered(coord: Coordinator) -> None:
    with pytest.raises(TypeError, match="expected a thread"):
        coord.register_thread(boom)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("junk", "kind"), [("1", TypeError), (None, TypeError), (True, TypeError), (float("nan"), ValueError)]
)
def test_a_grace_period_that_is_no_number_is_refused(coord: Coordinator, junk: float, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="stop_grace_period_secs"):
        coord.join(stop_grace_period_secs=junk)
    assert not coord.joined


@pytest.mark.parametrize("grace_secs", [-1, 0])
def test_no_grace_is_no_waiting(coord: Coordinator, threads: Threads, grace_secs: float) -> None:
    coord.request_stop()
    with pytest.raises(RuntimeError):
        coord.join([threads.stubborn()], stop_grace_period_secs=grace_secs)


def test_grace_without_end_is_possible(coord: Coordinator, threads: Threads) -> None:
    coord.request_stop()
    coord.join([threads.start(threads.release.wait, 0.1)], stop_grace_period_secs=float("inf"))


# --- again


def test_a_cleared_coordinator_is_as_new(coord: Coordinator, threads: Threads) -> None:
    coord.request_stop(raised())
    with pytest.raises(BoomError):
        coord.join()
    coord.clear_stop()
    assert not coord.should_stop()
    assert not coord.joined
    coord.raise_requested_exception()
    second = threads.start(coord.wait_for_stop)
    coord.request_stop(ValueError("the second run"))
    with pytest.raises(ValueError, match="the second run") as caught:
        coord.join([second])
    assert notes(caught.value) == []


def test_the_grace_period_begins_anew_after_a_clear(coord: Coordinator, threads: Threads) -> None:
    coord.request_stop()
    time.sleep(0.1)
    coord.clear_stop()
    coord.request_stop()
    working = threads.start(threads.release.wait, 0.05)
    coord.join([working], stop_grace_period_secs=0.1)


def test_registered_threads_outlive_a_clear(coord: Coordinator, threads: Threads) -> None:
    coord.register_thread(threads.stubborn())
    coord.request_stop()
    coord.clear_stop()
    coord.request_stop()
    with pytest.raises(RuntimeError, match="stubborn"):
        coord.join(stop_grace_period_secs=0.01)


# --- signals


def run_program(program: str, *, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HAMMER = """
    import itertools, signal, threading, time
    from stepguard.coordination.coordinator import Coordinator

    coord = Coordinator()
    signals = itertools.count()

    def strike(*_):
        next(signals)
        coord.should_stop()
        coord.request_stop()
        coord.wait_for_stop(0.01)

    signal.signal(signal.SIGALRM, strike)
    # The interpreter looks for signals between two bytecodes: many strikes, each somewhere else in the loop's methods.
    signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
    deadline = time.monotonic() + 3
    rounds = 0
    while time.monotonic() < deadline:
        rounds += 1
        {work}
    signal.setitimer(signal.ITIMER_REAL, 0, 0)
    assert next(signals) > 300, signals
    print("survived", rounds)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
@pytest.mark.parametrize(
    "work",
    [
        "coord.request_stop(); coord.clear_stop(); coord.should_stop(); coord.wait_for_stop(0)",
        "coord.clear_stop(); coord.wait_for_stop(5)",
        "coord.request_stop(ValueError('x')); coord.clear_stop(); coord.wait_for_stop(0.0001)",
        "coord.clear_stop(); each = threading.Thread(target=coord.wait_for_stop); each.start(); coord.join([each])",
    ],
    ids=["request", "wait", "request-with-error", "join"],
)
def test_a_signal_handler_may_request_a_stop_at_any_moment(work: str) -> None:
    assert "survived" in run_program(HAMMER.format(work=work))


def test_a_signal_handler_ends_a_wait_without_a_timeout() -> None:
    program = """
        import signal, time
        from stepguard.coordination.coordinator import Coordinator

        coord = Coordinator()
        signal.signal(signal.SIGALRM, lambda *_: coord.request_stop())
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert coord.wait_for_stop()
        print("woken")
    """
    assert run_program(program).strip() == "woken"


def test_ctrl_c_ends_a_join() -> None:
    program = """
        import os, signal, threading
        from stepguard.coordination.coordinator import Coordinator

        coord = Coordinator()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            coord.join([threading.Thread(target=coord.wait_for_stop, daemon=True)])
            lazy = threading.Thread(target=coord.wait_for_stop, daemon=True)
            lazy.start()
            coord.join([lazy])
        except KeyboardInterrupt:
            print("interrupted")
    """
    assert run_program(program).strip() == "interrupted"


# --- cost


def test_asking_for_a_stop_costs_next_to_nothing(coord: Coordinator) -> None:
    ask = coord.should_stop
    best_ns = min(_timed_ns(ask, 20_000) for _ in range(5))
    # About 40 ns on a machine of 2020; a call that takes a lock is several times that.
    assert best_ns < 500


def _timed_ns(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter_ns()
    for _ in itertools.repeat(None, times):
        call()
    return (time.perf_counter_ns() - began) / times
