"""The coordinator: its flag, its errors, and what it costs."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from types import FrameType

import pytest
from stopping_threads import SOON_SECS, BoomError, CutShortError, InputEndedError, Threads, boom, notes, raised

from stepguard.coordination.coordinator import Coordinator


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SOON_SECS
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    return condition()


# --- the flag ---


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


# --- the first error ---


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


# --- clean stops and their consequences ---


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


# --- stop_on_exception ---


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


# --- again ---


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
    grace_secs = 0.2
    requested_at: list[float] = []

    def request_again() -> None:
        threads.release.wait(1.5 * grace_secs)
        requested_at.append(time.monotonic())
        coord.request_stop()

    coord.request_stop()
    coord.clear_stop()
    threads.start(request_again)
    with pytest.raises(RuntimeError, match="stubborn"):
        coord.join([threads.stubborn()], stop_grace_period_secs=grace_secs)
    assert time.monotonic() - requested_at[0] >= grace_secs


def test_registered_threads_outlive_a_clear(coord: Coordinator, threads: Threads) -> None:
    coord.register_thread(threads.stubborn())
    coord.request_stop()
    coord.clear_stop()
    coord.request_stop()
    with pytest.raises(RuntimeError, match="stubborn"):
        coord.join(stop_grace_period_secs=0.01)


# --- cost ---


def test_asking_for_a_stop_takes_no_lock_and_calls_nothing(coord: Coordinator) -> None:
    called: list[str] = []

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event in ("call", "c_call"):
            called.append(frame.f_code.co_name if event == "call" else getattr(arg, "__name__", repr(arg)))

    sys.setprofile(note)
    try:
        coord.should_stop()
    finally:
        sys.setprofile(None)
    assert called == ["should_stop", "setprofile"]
