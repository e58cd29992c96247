"""Joining threads: who is waited for, for how long, and what is raised."""

from __future__ import annotations

import threading
import time

import pytest
from stopping_threads import SOON_SECS, BoomError, Threads, boom, notes, raised

from stepguard.coordination.coordinator import Coordinator


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
    # With a deadline each they would be waited for for a minute.
    working = [threads.stubborn(f"stubborn-{number}") for number in range(120)]
    coord.request_stop()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="stubborn-0, stubborn-1, stubborn-2, "):
        coord.join(working, stop_grace_period_secs=0.5)
    assert 0.45 < time.monotonic() - began < 30
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
