"""The looper: a function called on a timer, until the coordinator says stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from stepguard.coordination.coordinator import Coordinator
from stepguard.coordination.looper import LooperThread

SOON_SECS = 60.0


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SOON_SECS
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    return condition()


@pytest.fixture
def coord() -> Iterator[Coordinator]:
    coordinator = Coordinator()
    yield coordinator
    coordinator.request_stop()
    loopers = [thread for thread in threading.enumerate() if isinstance(thread, LooperThread)]
    for looper in loopers:
        looper.join(SOON_SECS)
        assert not looper.is_alive(), f"{looper.name} outlives its test"


class TimeMachine(Coordinator):
    """A coordinator whose waiting takes no time, and a clock that says it did. Stops when its time is over."""

    def __init__(self, secs: float) -> None:
        super().__init__()
        self.now = 1000.0
        self.end = self.now + secs

    def clock(self) -> float:
        return self.now

    def wait_for_stop(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.pass_by(timeout)
        return self.should_stop()

    def pass_by(self, secs: float) -> None:
        self.now += secs
        if self.now >= self.end:
            self.request_stop()


def calls_in(secs: float, interval_secs: float, durations: dict[int, float]) -> tuple[list[float], int]:
    """When a looper calls in that time, if its n-th call takes durations[n], and the ticks it skips."""
    machine = TimeMachine(secs)
    calls: list[float] = []

    def work() -> None:
        calls.append(round(machine.now - 1000, 6))
        machine.pass_by(durations.get(len(calls), 0))

    looper = LooperThread.loop(machine, interval_secs, work, clock=machine.clock)
    # Waited for in real time first: the coordinator's join would let the machine's time pass too.
    looper.join(SOON_SECS)
    machine.join([looper])
    return calls, looper.skipped_ticks


# --- ticks


def test_the_first_call_is_made_at_once_and_the_others_on_the_ticks() -> None:
    assert calls_in(10, 3, {}) == ([0, 3, 6, 9], 0)


def test_a_short_call_does_not_move_the_ticks() -> None:
    assert calls_in(10, 3, {1: 1, 2: 2.5, 3: 0.5}) == ([0, 3, 6, 9], 0)


def test_missed_ticks_are_skipped_and_counted_and_never_made_up_for() -> None:
    # The second call lasts from 3 to 13.5: the ticks at 6, 9 and 12 pass meanwhile.
    assert calls_in(20, 3, {2: 10.5}) == ([0, 3, 15, 18], 3)


def test_a_tick_that_is_due_when_a_call_ends_is_not_missed() -> None:
    assert calls_in(10, 3, {1: 3}) == ([0, 3, 6, 9], 0)
    assert calls_in(10, 3, {1: 6}) == ([0, 6, 9], 1)


def test_every_call_too_slow_leaves_every_second_tick() -> None:
    assert calls_in(10, 2, dict.fromkeys(range(10), 2.5)) == ([0, 4, 8], 3)


@pytest.mark.parametrize("interval_secs", [0.1, 1 / 3, 0.7, 1e-3])
def test_rounding_runs_no_tick_twice_and_none_too_few(interval_secs: float) -> None:
    calls, skipped = calls_in(1000.5 * interval_secs, interval_secs, {})
    assert len(calls) == 1001
    assert skipped == 0


@pytest.mark.parametrize("interval_secs", [None, 0, 0.0])
def test_without_an_interval_there_is_no_pause(coord: Coordinator, interval_secs: float | None) -> None:
    calls: list[None] = []
    looper = LooperThread.loop(coord, interval_secs, calls.append, args=(None,))
    assert eventually(lambda: len(calls) > 1000)
    assert looper.skipped_ticks == 0


def test_on_the_real_clock_the_ticks_keep_their_time(coord: Coordinator) -> None:
    calls: list[float] = []
    began = time.monotonic()
    LooperThread.loop(coord, 0.05, lambda: calls.append(time.monotonic()))
    assert eventually(lambda: len(calls) >= 5)
    # On a busy machine a call comes late, or not at all; never early.
    offsets = [(each - began) / 0.05 for each in calls]
    assert all(offset >= number - 0.01 for number, offset in enumerate(offsets))


# --- stopping


@pytest.mark.parametrize("interval_secs", [3600, 1e300])
def test_a_stop_ends_the_longest_wait_at_once(coord: Coordinator, interval_secs: float) -> None:
    called = threading.Event()
    looper = LooperThread.loop(coord, interval_secs, called.set)
    assert called.wait(SOON_SECS)
    requested_at = time.monotonic()
    coord.request_stop()
    coord.join()
    assert time.monotonic() - requested_at < SOON_SECS
    assert not looper.is_alive()


def test_a_stop_during_a_call_lets_it_finish_and_makes_no_other(coord: Coordinator) -> None:
    calls: list[str] = []

    def work() -> None:
        calls.append("begun")
        coord.request_stop()
        calls.append("finished")

    LooperThread.loop(coord, None, work)
    coord.join()
    assert calls == ["begun", "finished"]


class Diary(LooperThread):
    """Writes down what it is called for."""

    def __init__(self, coord: Coordinator, interval_secs: float | None = 0.001, *, fails_in: str = "") -> None:
        super().__init__(coord, interval_secs)
        self.pages: list[str] = []
        self.fails_in = fails_in

    def write(self, page: str) -> None:
        self.pages.append(page)
        assert threading.current_thread() is self
        if page == self.fails_in:
            raise LookupError(page)

    def start_loop(self) -> None:
        self.write("start")

    def run_loop(self) -> None:
        self.write("run")
        if len(self.pages) == 3:
            self._coord.request_stop()

    def stop_loop(self) -> None:
        self.write("stop")


@pytest.mark.parametrize("interval_secs", [None, 0.001])
def test_a_subclass_is_told_of_start_ticks_and_stop(coord: Coordinator, interval_secs: float | None) -> None:
    diary = Diary(coord, interval_secs)
    diary.start()
    coord.join()
    assert diary.pages == ["start", "run", "run", "stop"]


@pytest.mark.parametrize("interval_secs", [None, 0.001])
def test_a_looper_started_after_the_stop_runs_nothing(coord: Coordinator, interval_secs: float | None) -> None:
    coord.request_stop()
    diary = Diary(coord, interval_secs)
    diary.start()
    coord.join()
    assert diary.pages == ["start", "stop"]


@pytest.mark.parametrize(
    ("fails_in", "pages"),
    [("start", ["start"]), ("run", ["start", "run"]), ("stop", ["start", "run", "run", "stop"])],
)
def test_an_exception_ends_the_thread_and_reaches_join(coord: Coordinator, fails_in: str, pages: list[str]) -> None:
    diary = Diary(coord, fails_in=fails_in)
    diary.start()
    with pytest.raises(LookupError, match=fails_in):
        coord.join()
    assert diary.pages == pages


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_system_exit_in_the_target_stops_the_run_and_reaches_join(coord: Coordinator) -> None:
    def leave() -> None:
        raise SystemExit(3)

    LooperThread.loop(coord, 0.001, leave)
    with pytest.raises(SystemExit):
        coord.join()


# --- the thread


def test_the_target_gets_its_arguments(coord: Coordinator) -> None:
    calls: list[tuple[object, ...]] = []

    def work(*args: object, **kwargs: object) -> None:
        calls.append((args, kwargs))

    LooperThread.loop(coord, 3600, work, args=[1, 2], kwargs={"three": 3})
    assert eventually(lambda: bool(calls))
    assert calls == [((1, 2), {"three": 3})]


def test_it_is_a_daemon_with_a_name(coord: Coordinator) -> None:
    def save_model() -> None:
        pass

    looper = LooperThread(coord, 3600, save_model)
    assert looper.daemon
    assert not looper.is_alive()
    assert looper.name.endswith("save_model")
    assert Diary(coord).name.endswith("Diary")
    assert LooperThread(coord, 1, name="summaries").name == "summaries"


def test_the_coordinator_waits_for_it(coord: Coordinator) -> None:
    begun, hold = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        hold.wait(SOON_SECS)

    LooperThread.loop(coord, 3600, work, name="summaries")
    assert begun.wait(SOON_SECS)
    coord.request_stop()
    with pytest.raises(RuntimeError, match="summaries"):
        coord.join(stop_grace_period_secs=0)
    hold.set()
    coord.join()


def test_a_looper_without_a_target_ticks_for_nothing(coord: Coordinator) -> None:
    looper = LooperThread(coord, 0.001)
    looper.start()
    looper.join(0.02)
    assert looper.is_alive()


# --- bad input


@pytest.mark.parametrize(
    ("interval_secs", "kind"),
    [
        (-1, ValueError),
        (-1e-9, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("1", TypeError),
        (True, TypeError),
        ([1], TypeError),
        (1j, TypeError),
    ],
)
def test_an_interval_that_is_none_is_refused(coord: Coordinator, interval_secs: float, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="timer_interval_secs must be"):
        LooperThread(coord, interval_secs, print)


def test_other_arguments_of_a_wrong_kind_are_refused_and_leave_nothing_behind(coord: Coordinator) -> None:
    with pytest.raises(ValueError, match="coord must be"):
        LooperThread(5, 1, print)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="target must be callable"):
        LooperThread(coord, 1, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target is None"):
        LooperThread(coord, 1, args=(1,))
    with pytest.raises(ValueError, match="target is None"):
        LooperThread(coord, 1, kwargs={"a": 1})
    with pytest.raises(TypeError):
        LooperThread(coord, 1, print, args=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        LooperThread(coord, 1, print, kwargs=5)  # type: ignore[arg-type]
    assert not coord._registered_threads
