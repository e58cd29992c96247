"""The boundary between steps: what waits for what, and for how long."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import tensorflow as tf
from graphs import wait_until

from stepguard.errors import NoBoundaryError, StopRequested
from stepguard.tensorflow import boundary as boundary_module
from stepguard.tensorflow.boundary import Boundary
from stepguard.tensorflow.session import Session

v1 = tf.compat.v1


class EveryRunIsAStep:
    def changes_state(self, fetches: Any) -> bool:
        return True


@pytest.fixture
def boundary() -> Boundary:
    return Boundary(EveryRunIsAStep())


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary_module, "_PATIENCE_SECS", 0.2)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(12) as pool:
        yield pool


class Step:
    """A step on a thread of its own that lasts until it is told to end."""

    def __init__(self, boundary: Boundary, threads: ThreadPoolExecutor, name: str = "train") -> None:
        self._may_end = threading.Event()
        self.began = threading.Event()
        self._boundary, self._name = boundary, name
        self._future: Future[None] = threads.submit(self._run)

    def _run(self) -> None:
        self._boundary.enter(self._name)
        try:
            self.began.set()
            assert self._may_end.wait(60)
        finally:
            self._boundary.leave()

    def end(self) -> None:
        self._may_end.set()
        self._future.result(60)


def hold_until(boundary: Boundary, held: threading.Event, may_end: threading.Event, **options: Any) -> None:
    with boundary.hold("a test", **options):
        held.set()
        assert may_end.wait(60)


def is_waiting(boundary: Boundary) -> Callable[[], bool]:
    """Whether somebody has announced that it holds, or wants to hold, the boundary."""
    return lambda: boundary._hold is not None


class TestHold:
    def test_waits_for_the_steps_that_run(self, boundary, threads):
        steps = [Step(boundary, threads) for _ in range(3)]
        assert all(step.began.wait(60) for step in steps)
        held, may_end = threading.Event(), threading.Event()
        holding = threads.submit(hold_until, boundary, held, may_end)
        wait_until(is_waiting(boundary), "the holder")

        for step in steps:
            assert not held.is_set()
            step.end()

        assert held.wait(60)
        may_end.set()
        holding.result(60)

    def test_keeps_new_steps_waiting_until_its_end(self, boundary, threads):
        held, may_end = threading.Event(), threading.Event()
        holding = threads.submit(hold_until, boundary, held, may_end)
        assert held.wait(60)

        steps = [Step(boundary, threads) for _ in range(3)]
        assert not any(step.began.wait(0.05) for step in steps)
        may_end.set()
        holding.result(60)

        assert all(step.began.wait(60) for step in steps)
        for step in steps:
            step.end()

    def test_keeps_new_steps_waiting_while_it_waits_itself(self, boundary, threads):
        """Else steps of several threads that overlap for ever would never let it have its turn."""
        running = Step(boundary, threads)
        assert running.began.wait(60)
        held, may_end = threading.Event(), threading.Event()
        holding = threads.submit(hold_until, boundary, held, may_end)
        wait_until(is_waiting(boundary), "the holder")
        newcomer = Step(boundary, threads)
        assert not newcomer.began.wait(0.05)

        running.end()
        assert held.wait(60)
        assert not newcomer.began.is_set()
        may_end.set()
        holding.result(60)
        assert newcomer.began.wait(60)
        newcomer.end()

    def test_lets_its_own_thread_run_steps(self, boundary):
        with boundary.hold("a test"):
            boundary.enter("a step of the holder")
            boundary.leave()

        assert boundary.steps == 1

    def test_comes_after_the_one_before_it(self, boundary, threads):
        first_held, first_may_end = threading.Event(), threading.Event()
        second_held, second_may_end = threading.Event(), threading.Event()
        first = threads.submit(hold_until, boundary, first_held, first_may_end)
        assert first_held.wait(60)
        second = threads.submit(hold_until, boundary, second_held, second_may_end)

        assert not second_held.wait(0.05)
        first_may_end.set()
        assert second_held.wait(60)
        second_may_end.set()
        first.result(60)
        second.result(60)

    def test_ends_when_its_block_fails(self, boundary, threads):
        with pytest.raises(ZeroDivisionError), boundary.hold("a test"):
            raise ZeroDivisionError

        step = Step(boundary, threads)
        assert step.began.wait(60)
        step.end()

    def test_has_no_step_inside_it_under_load(self, boundary, threads):
        """What a snapshot relies on: of two counters that a step raises one after the other, none is ever ahead."""
        counters = [0, 0]
        lock = threading.Lock()
        stop = threading.Event()

        def train() -> None:
            while not stop.is_set():
                boundary.enter("train")
                try:
                    with lock:
                        counters[0] += 1
                    time.sleep(0)
                    with lock:
                        counters[1] += 1
                finally:
                    boundary.leave()

        training = [threads.submit(train) for _ in range(6)]
        seen = set()
        for _ in range(100):
            with boundary.hold("a test"):
                assert counters[0] == counters[1] == boundary.steps
                before = list(counters)
                time.sleep(0)
                assert counters == before
                seen.add(counters[0])
            wait_until(lambda last=before[0]: counters[0] > last, "the next step")
        stop.set()
        for thread in training:
            thread.result(60)

        assert len(seen) == 100
        assert boundary.steps == counters[0]


class TestAHoldThatMayNotLast:
    def test_lets_steps_go_on_after_its_time(self, boundary, threads):
        held, may_end = threading.Event(), threading.Event()
        holding = threads.submit(hold_until, boundary, held, may_end, at_most_secs=0.1)
        assert held.wait(60)
        step = Step(boundary, threads)

        assert step.began.wait(60)
        assert not holding.done()
        step.end()
        may_end.set()
        holding.result(60)

    def test_lets_those_go_on_that_came_before_it_had_begun(self, boundary, threads):
        running = Step(boundary, threads)
        assert running.began.wait(60)
        held, may_end = threading.Event(), threading.Event()
        holding = threads.submit(hold_until, boundary, held, may_end, at_most_secs=0.1)
        wait_until(is_waiting(boundary), "the holder")
        early = Step(boundary, threads)
        assert not early.began.wait(0.05)

        running.end()

        assert early.began.wait(60)
        assert not holding.done()
        early.end()
        may_end.set()
        holding.result(60)

    def test_does_not_hold_up_a_checkpoint_after_its_time(self, boundary, threads):
        """A summary that waits for input for ever must not keep checkpoints from being taken."""
        held, may_end = threading.Event(), threading.Event()
        summary = threads.submit(hold_until, boundary, held, may_end, at_most_secs=0.1)
        assert held.wait(60)

        with boundary.hold("a checkpoint"):
            step = Step(boundary, threads)
            assert not step.began.wait(0.05)
            may_end.set()
            summary.result(60)
            # The end of the one that has lapsed is not the end of this one.
            assert not step.began.wait(0.05)

        assert step.began.wait(60)
        step.end()


@pytest.mark.usefixtures("short_patience")
class TestAStepThatDoesNotEnd:
    def test_makes_the_hold_give_up_and_is_named(self, boundary, threads):
        stuck = Step(boundary, threads, "the_stuck_run")
        assert stuck.began.wait(60)
        began = time.monotonic()

        with pytest.raises(NoBoundaryError, match=r"a checkpoint.*the_stuck_run"), boundary.hold("a checkpoint"):
            raise AssertionError("there is no boundary")

        assert 0.2 <= time.monotonic() - began < 45
        stuck.end()

    def test_is_not_in_the_way_of_other_steps_any_more(self, boundary, threads):
        stuck = Step(boundary, threads)
        assert stuck.began.wait(60)
        with pytest.raises(NoBoundaryError), boundary.hold("a checkpoint"):
            raise AssertionError("there is no boundary")

        other = Step(boundary, threads)
        assert other.began.wait(60)
        other.end()
        stuck.end()
        with boundary.hold("a checkpoint"):
            pass

    def test_may_last_as_long_as_others_have_before_it(self, boundary, threads):
        boundary._longest_secs = 20.0
        slow = Step(boundary, threads)
        assert slow.began.wait(60)
        ending = threading.Timer(0.6, slow.end)
        ending.start()

        with boundary.hold("a checkpoint"):
            pass

        ending.join()

    def test_of_the_thread_that_asks_does_not_count(self, boundary):
        """An interrupt between two bytecodes can leave such a trace behind."""
        boundary.enter("interrupted")

        with boundary.hold("the last checkpoint"):
            pass

    def test_and_an_interrupted_one_is_forgotten_with_the_next_step_of_its_thread(self, boundary, threads):
        boundary.enter("interrupted")
        boundary.enter("the next")
        boundary.leave()

        def save() -> None:
            with boundary.hold("a checkpoint"):
                pass

        threads.submit(save).result(60)

    def test_an_interrupted_wait_leaves_nothing_behind(self, boundary, threads, monkeypatch):
        held, may_end = threading.Event(), threading.Event()
        holding = threads.submit(hold_until, boundary, held, may_end)
        assert held.wait(60)
        with monkeypatch.context() as patched:

            def interrupted(timeout: float | None = None) -> bool:
                raise KeyboardInterrupt

            patched.setattr(boundary._condition, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                boundary.enter("train")
        may_end.set()
        holding.result(60)

        threads.submit(lambda: boundary.hold("a checkpoint").__enter__()).result(60)


class TestStopping:
    def test_the_next_step_raises_once_the_run_must_stop(self, boundary):
        boundary.enter("the last")
        boundary.leave()
        boundary.must_stop = True

        with pytest.raises(StopRequested, match="the_next"):
            boundary.enter("the_next")

        assert boundary.steps == 1


class TestCallAfterSteps:
    def test_is_called_between_two_steps_when_they_are_done(self, boundary):
        called_at: list[int] = []

        def on_due() -> int:
            called_at.append(boundary.steps)
            return 3

        boundary.call_after_steps(2, on_due)
        for _ in range(9):
            boundary.enter("train")
            boundary.leave()

        assert called_at == [2, 5, 8]

    def test_is_called_by_one_of_several_threads(self, boundary, threads):
        called_at: list[int] = []

        def on_due() -> int:
            called_at.append(boundary.steps)
            return 10

        boundary.call_after_steps(10, on_due)

        def train() -> None:
            for _ in range(250):
                boundary.enter("train")
                boundary.leave()

        for thread in [threads.submit(train) for _ in range(4)]:
            thread.result(60)

        assert boundary.steps == 1000
        assert called_at[0] >= 10
        assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(called_at))


class TestInASession:
    def test_a_run_inside_a_run_is_allowed(self, graph, threads):
        """tf.py_function may call the session again: on a thread of TensorFlow's, or on the one that runs already."""
        counter = v1.get_variable("counter", [], tf.int64, v1.zeros_initializer(), use_resource=True)
        raised = counter.assign_add(1).op
        session: Any = None

        def run_again() -> int:
            session.run(raised)
            return 7

        nested = v1.py_func(run_again, [], tf.int64)
        with tf.control_dependencies([nested]):
            outer = counter.assign_add(10)
        boundary = Boundary(EveryRunIsAStep())
        session = Session(graph=graph)
        session.run(v1.global_variables_initializer())
        session.watch(boundary, lambda: None, lambda *_: None)

        assert session.run(outer) == 11
        assert session.run(outer, options=v1.RunOptions(inter_op_thread_pool=-1)) == 22

        assert boundary.steps == 4
        with boundary.hold("a checkpoint"):
            pass
        session.unwatch()
        session.close()

    def test_a_step_that_waits_for_a_step_makes_a_checkpoint_give_up_and_not_the_training(
        self, graph, threads, short_patience
    ):
        counter = v1.get_variable("counter", [], tf.int64, v1.zeros_initializer(), use_resource=True)
        fed_by_a_step = v1.FIFOQueue(1, tf.int64, shapes=[()])
        waits = counter.assign_add(fed_by_a_step.dequeue(), name="waits")
        with tf.control_dependencies([counter.assign_add(1)]):
            provides = fed_by_a_step.enqueue(tf.constant(10, tf.int64))
        boundary = Boundary(EveryRunIsAStep())
        session = Session(graph=graph)
        session.run(v1.global_variables_initializer())
        session.watch(boundary, lambda: None, lambda *_: None)
        waiting = threads.submit(session.run, waits)
        wait_until(lambda: boundary._running, "the run that waits")
        saving = threads.submit(lambda: boundary.hold("a checkpoint").__enter__())
        wait_until(is_waiting(boundary), "the holder")
        providing = threads.submit(session.run, provides)

        with pytest.raises(NoBoundaryError, match="waits"):
            saving.result(60)
        providing.result(60)
        assert waiting.result(60) == 11
        session.unwatch()
        session.close()


class TestAStepForOthers:
    """A step that one under way may wait for."""

    def test_passes_a_holder_that_waits_for_the_other(self, boundary, threads):
        waiting = Step(boundary, threads)
        assert waiting.began.wait(60)
        held, may_end = threading.Event(), threading.Event()
        holding = threads.submit(hold_until, boundary, held, may_end)
        wait_until(is_waiting(boundary), "somebody waits for the boundary")
        boundary.enter_for_others("apply")
        # It has to end as well.
        waiting.end()
        assert not held.wait(0.1)
        boundary.leave()
        assert held.wait(60)
        may_end.set()
        holding.result(60)

    def test_waits_for_a_holder_that_has_its_boundary(self, boundary, threads):
        held, may_end = threading.Event(), threading.Event()
        holding = threads.submit(hold_until, boundary, held, may_end)
        assert held.wait(60)
        entering = threads.submit(boundary.enter_for_others, "apply")
        with pytest.raises(TimeoutError):
            entering.result(0.1)
        may_end.set()
        holding.result(60)
        entering.result(60)

    def test_is_not_stopped(self, boundary):
        boundary.stop(lambda: False)
        boundary.enter_for_others("apply")
        boundary.leave()
        with pytest.raises(StopRequested):
            boundary.enter("train")


def test_a_long_first_step_does_not_tell_how_long_steps_are(boundary, monkeypatch):
    now = itertools.count(0.0, 5.0)
    monkeypatch.setattr(boundary_module, "monotonic", lambda: next(now))
    boundary.enter("the first")
    boundary.leave()
    assert boundary.usual_secs == 5.0
    monkeypatch.setattr(boundary_module, "monotonic", lambda: 0.0)
    for _ in range(50):
        boundary.enter("train")
        boundary.leave()
    assert boundary.usual_secs < 0.1
