"""What ``engine.py`` promises, asked of the engine itself and not through a Supervisor's services."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from programs import EngineUnderTest, Gate, Program, wait_until

from stepguard.engine import KeepsCheckpoints, Prepared, SharedModel
from stepguard.errors import NoBoundaryError, StopRequested
from stepguard.store import CheckpointStore
from stepguard.testing import FakeEngine, FakeSession, FakeSupervisor

OF_THE_FRAMEWORK_ALONE = {"tensorflow": (SharedModel, KeepsCheckpoints)}


def nothing() -> None:
    """What is called before a session is closed by its program."""


@pytest.fixture
def prepare(engine: EngineUnderTest, tmp_path: Path) -> Iterator[Callable[..., tuple[Program, Prepared[Any]]]]:
    """Makes a program and prepares a session of it, without any service; all is closed at the end."""
    made: list[tuple[Program, Any]] = []

    def one(before_close: Callable[[], None] = nothing) -> tuple[Program, Prepared[Any]]:
        program = engine.program(tmp_path)
        prepared = program.sv._engine.prepare()
        made.append((program, prepared.session))
        program.sv._engine.watch(prepared.session, before_close)
        return program, prepared

    yield one
    for program, session in made:
        program.sv._engine.close(session)
        program.sv.stop()


@pytest.fixture
def opened(prepare: Callable[..., tuple[Program, Prepared[Any]]]) -> tuple[Program, Any]:
    """A program and its session."""
    program, prepared = prepare()
    return program, prepared.session


class TestPreparing:
    def test_says_what_was_recovered(self, engine: EngineUnderTest, tmp_path, prepare):
        engine.program(tmp_path).train(3)

        program, prepared = prepare()

        assert prepared.recovered.checkpoint.step == 3
        assert program.values(prepared.session) == [3] * 6

    def test_says_that_there_was_nothing(self, prepare):
        _, prepared = prepare()

        assert prepared.recovered is None or prepared.recovered.checkpoint is None

    def test_is_not_needed_to_go_back_to_a_checkpoint_in_a_run(self, engine, tmp_path, prepare):
        engine.program(tmp_path).train(3)
        program, prepared = prepare()
        session = prepared.session
        program.run_steps(session, 2)
        store = CheckpointStore(tmp_path)
        (saved,) = [store.verify(one) for one in store.candidates() if one.step == 3]
        before = program.sv._engine.progress(session)

        with program.sv._engine.at_boundary(session, "a return"):
            program.sv._engine.restore(session, saved, in_run=True)

        assert program.values(session) == [program.step(session)] * 6 == [3] * 6
        program.run_step(session)
        assert program.sv._engine.progress(session) != before


class TestABoundary:
    def test_is_held_until_the_block_ends(self, opened):
        program, session = opened
        with ThreadPoolExecutor(1) as pool:
            with program.sv._engine.at_boundary(session, "this test"):
                step = pool.submit(program.run_step, session)
                wait_until(step.running, "the start of the step")
                snapshot = program.sv._engine.snapshot(session)
                assert not step.done()
            step.result()

        assert snapshot.step == 0
        assert program.values(session) == [1] * 6

    def test_is_refused_while_a_step_does_not_end_and_training_goes_on(self, opened, gate: Gate):
        program, session = opened
        with ThreadPoolExecutor(1) as pool:
            step = pool.submit(program.run_step_with, session, gate.pass_through)
            gate.wait_until_reached()

            with pytest.raises(NoBoundaryError, match="no step boundary for this test"):  # noqa: SIM117
                with program.sv._engine.at_boundary(session, "this test", 0.05):
                    raise AssertionError("there is a step under way")
            gate.open()
            step.result()

        program.run_step(session)
        with program.sv._engine.at_boundary(session, "this test"):
            assert program.sv._engine.snapshot(session).step == 2

    def test_is_never_in_the_middle_of_a_step(self, opened, gate: Gate):
        program, session = opened

        def take() -> int | None:
            with program.sv._engine.at_boundary(session, "this test"):
                return program.sv._engine.snapshot(session).step

        with ThreadPoolExecutor(2) as pool:
            step = pool.submit(program.run_step_with, session, gate.pass_through)
            gate.wait_until_reached()
            taken = pool.submit(take)
            wait_until(taken.running, "the wait for the boundary")
            assert not taken.done()
            gate.open()
            step.result()

            assert taken.result() == 1

    def test_does_not_exist_any_more_after_a_step_that_was_left_half_way(self, engine, opened):
        if engine.name == "tensorflow":
            pytest.skip("a run that fails is the framework's own affair: see tests/tensorflow/test_boundary.py")
        program, session = opened

        with pytest.raises(KeyboardInterrupt):
            program.run_step_with(session, _interrupted)

        with pytest.raises(NoBoundaryError, match="half-way"), program.sv._engine.at_boundary(session, "this test"):
            raise AssertionError("the integers are those of no step")

    def test_after_so_many_steps_is_where_the_callback_comes_and_may_save(self, opened):
        program, session = opened
        seen: list[tuple[int | None, bool]] = []
        training = threading.current_thread()

        def look() -> int:
            with program.sv._engine.at_boundary(session, "this test"):
                step = program.sv._engine.snapshot(session).step
            seen.append((step, threading.current_thread() is training))
            return 3

        program.sv._engine.call_after_steps(session, 2, look)
        program.run_steps(session, 8)

        assert seen == [(2, True), (5, True), (8, True)]


class TestStopping:
    def test_begins_no_further_step(self, opened):
        program, session = opened
        program.run_step(session)

        program.sv._engine.stop_at_boundary(session, lambda: False)

        with pytest.raises(StopRequested):
            program.run_step(session)
        assert program.sv._engine.step(session) == 1

    def test_leaves_a_main_thread_alone_that_has_been_told(self, opened):
        program, session = opened

        program.sv._engine.stop_at_boundary(session, lambda: True)
        program.run_step(session)

        with ThreadPoolExecutor(1) as pool, pytest.raises(StopRequested):
            pool.submit(program.run_step, session).result()
        assert program.sv._engine.step(session) == 1


class TestClosing:
    def test_by_the_program_is_told_once_before_it_happens(self, prepare):
        told: list[bool] = []
        program, prepared = prepare(lambda: told.append(program.is_open(session)))
        session = prepared.session

        session.close()
        session.close()

        assert told == [True]
        assert not program.is_open(session)

    def test_by_the_engine_is_not_told(self, prepare):
        told: list[None] = []
        program, prepared = prepare(lambda: told.append(None))
        session = prepared.session

        program.sv._engine.close(session)

        assert told == []
        assert not program.is_open(session)


class Sharing(FakeEngine):
    """The fake engine with both optional protocols: one other trains the model, and the framework keeps a list."""

    def __init__(self) -> None:
        super().__init__(size=6)
        self.others_run: Callable[[FakeSession], None] = lambda session: None
        self.told: list[list[str]] = []
        self.others_may_go_on: list[bool] = []

    def is_shared(self, session: FakeSession) -> bool:
        return True

    def wait_for_others(self, session: FakeSession, timeout_secs: float, *, may_go_on: bool) -> None:
        self.others_may_go_on.append(may_go_on)
        self.others_run(session)

    def kept_checkpoints(self) -> list[str]:
        return []

    def committed(self, kept: Any) -> None:
        self.told.append([path.rpartition("/")[2] for path, _ in kept])


class TestOptionalProtocols:
    def test_are_those_of_the_framework_and_no_others(self, engine, opened):
        found = opened[0].sv._engine

        has = tuple(one for one in (SharedModel, KeepsCheckpoints) if isinstance(found, one))

        assert has == OF_THE_FRAMEWORK_ALONE.get(engine.name, ())


def test_an_engine_with_a_shared_model_saves_the_last_steps_of_others_and_is_told_of_the_checkpoints(tmp_path):
    engine = Sharing()
    engine.others_run = FakeSession.run_step
    sv = FakeSupervisor(str(tmp_path), engine=engine, save_model_secs=3600, save_summaries_secs=0)

    with sv.managed_session() as session:
        wait_until(lambda: engine.told, "the first checkpoint")
        assert session.step == 0

    assert engine.told == [["model.ckpt-0"], ["model.ckpt-0", "model.ckpt-1"]]
    assert engine.others_may_go_on == [False]


@pytest.mark.parametrize("told_by", [SystemExit(143), KeyboardInterrupt(), None])
def test_a_process_that_alone_was_told_to_end_is_told_apart_from_one_that_ends_with_the_others(told_by, tmp_path):
    engine = Sharing()
    sv = FakeSupervisor(str(tmp_path), engine=engine, save_model_secs=3600, save_summaries_secs=0)

    with contextlib.suppress(SystemExit, KeyboardInterrupt), sv.managed_session() as session:
        session.run_step()
        if told_by is not None:
            raise told_by
        sv.request_stop()

    assert engine.others_may_go_on == [told_by is not None]


def test_without_the_protocols_a_run_that_did_nothing_since_saves_nothing_more(tmp_path):
    sv = FakeSupervisor(str(tmp_path), size=6, save_model_secs=3600, save_summaries_secs=0)

    with sv.managed_session():
        wait_until(lambda: list(tmp_path.glob("*.manifest.json")), "the first checkpoint")

    assert [path.name for path in tmp_path.glob("*.manifest.json")] == ["model.ckpt-0.manifest.json"]


def _interrupted() -> None:
    raise KeyboardInterrupt


def test_an_engine_tells_how_many_steps_were_done_and_when_the_last_has_ended(engine, tmp_path):
    program = engine.program(tmp_path)
    told = []
    with program.sv.managed_session() as session:
        for _ in range(3):
            told.append(program.sv._engine.steps_done(session))
            program.run_step(session)
        told.append(program.sv._engine.steps_done(session))

    assert [one.number for one in told] == [0, 1, 2, 3]
    times = [one.ended_at for one in told]
    assert times[0] == 0 < times[1]
    assert times == sorted(times)


def test_an_evaluation_that_is_announced_is_a_pause(engine, tmp_path):
    program = engine.program(tmp_path)
    with program.sv.managed_session() as session:
        if not hasattr(session, "evaluating"):
            pytest.skip("its sessions announce no evaluations")
        program.run_step(session)
        before = program.sv._engine.steps_done(session)
        with session.evaluating():
            inside = program.sv._engine.steps_done(session)
        after = program.sv._engine.steps_done(session)

    assert before.pauses < inside.pauses < after.pauses
    assert before.number == after.number == 1
