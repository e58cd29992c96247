"""When a checkpoint is taken, and when not."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from stepguard.errors import NoBoundaryError, SaveFailedError
from stepguard.saving.checkpointer import Checkpointer, StepTrigger
from stepguard.testing import FakeEngine, FakeSession


class RecordingWriter:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.busy = False
        self.retrying = False
        self.last_error: BaseException | None = None
        self.drains = True

    storage_errors = (OSError,)
    root, where = Path("store"), "store: "

    def submit(self, snapshot: Any, stall_secs: float, take: Any) -> bool:
        assert stall_secs >= 0
        self.take = take
        self.steps.append(snapshot.step)
        return True

    def retake(self, take: Any, error: BaseException) -> bool:
        self.take, self.error = take, error
        return True

    def warn(self, message: str) -> None:
        logging.getLogger("stepguard.saving.writer").warning("%s", message)

    def drain(self, timeout_secs: float) -> bool:
        return self.drains


class SharedEngine(FakeEngine):
    """An engine whose model others train too: ``others`` does their last steps."""

    shares = True
    others: Callable[[], object] = staticmethod(lambda: None)

    def is_shared(self, session: FakeSession) -> bool:
        return self.shares

    def wait_for_others(self, session: FakeSession, timeout_secs: float, *, may_go_on: bool) -> None:
        assert timeout_secs > 0
        self.others()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(size=2)


@pytest.fixture
def session() -> FakeSession:
    return FakeSession(2)


@pytest.fixture
def writer() -> RecordingWriter:
    return RecordingWriter()


@pytest.fixture
def checkpointer(engine, session, writer) -> Checkpointer:
    return Checkpointer(engine, session, writer, is_saved=True)


def without_a_boundary(engine: FakeEngine) -> None:
    def at_boundary(session: Any, what: str, patience_secs: float | None = None) -> AbstractContextManager[None]:
        @contextmanager
        def hold() -> Iterator[None]:
            raise NoBoundaryError(f"no boundary for {what}")
            yield

        return hold()

    engine.at_boundary = at_boundary  # type: ignore[method-assign]


class TestATimedCheckpoint:
    def test_is_taken_when_steps_were_done(self, checkpointer, session, writer):
        session.run_step()
        checkpointer()

        assert writer.steps == [1]

    def test_is_not_taken_when_none_were_done_since_the_last(self, checkpointer, session, writer):
        checkpointer()
        session.run_step()
        checkpointer()
        checkpointer()

        assert writer.steps == [1]

    def test_is_taken_of_a_model_that_was_just_initialised(self, engine, session, writer):
        checkpointer = Checkpointer(engine, session, writer, is_saved=False)
        checkpointer()
        checkpointer()

        assert writer.steps == [0]

    def test_is_skipped_and_counted_while_the_last_one_is_being_written(self, checkpointer, session, writer, caplog):
        writer.busy = True
        session.run_step()
        with caplog.at_level(logging.WARNING, "stepguard"):
            checkpointer()
            checkpointer()
        writer.busy = False
        checkpointer()

        assert writer.steps == [1]
        assert checkpointer.skipped == 2
        assert "skipped (2 so far)" in caplog.text

    def test_is_skipped_when_no_boundary_comes(self, checkpointer, engine, session, writer, caplog):
        session.run_step()
        original = engine.at_boundary
        without_a_boundary(engine)
        with caplog.at_level(logging.WARNING, "stepguard"):
            checkpointer()
        engine.at_boundary = original  # type: ignore[method-assign]
        checkpointer()

        assert "checkpoint skipped: no boundary for a checkpoint" in caplog.text
        assert writer.steps == [1]

    def test_is_taken_again_by_the_writer_when_its_framework_could_not_write_it(
        self, checkpointer, engine, session, writer
    ):
        original, error = engine.snapshot, OSError("no room")
        engine.snapshot = _raising(error)  # type: ignore[method-assign]
        session.run_step()
        checkpointer()
        engine.snapshot = original  # type: ignore[method-assign]
        session.run_step()
        snapshot, stall_secs = writer.take()
        checkpointer()

        assert writer.error is error
        assert (snapshot.step, stall_secs >= 0, writer.steps) == (2, True, [])

    def test_is_taken_each_time_of_a_model_that_others_train(self, session, writer):
        checkpointer = Checkpointer(SharedEngine(size=2), session, writer, is_saved=True)
        checkpointer()
        checkpointer()

        assert writer.steps == [0, 0]

    def test_is_not_of_a_model_that_others_could_train_and_do_not(self, session, writer):
        engine = SharedEngine(size=2)
        engine.shares = False
        checkpointer = Checkpointer(engine, session, writer, is_saved=True)
        checkpointer()

        assert writer.steps == []

    def test_that_fails_is_taken_again_the_next_time(self, checkpointer, engine, session, writer):
        original = engine.snapshot
        engine.snapshot = _raising(ZeroDivisionError())  # type: ignore[method-assign]
        session.run_step()
        with pytest.raises(ZeroDivisionError):
            checkpointer()
        engine.snapshot = original  # type: ignore[method-assign]
        checkpointer()

        assert writer.steps == [1]


class TestTheLastCheckpoint:
    def test_waits_for_the_last_steps_of_others_and_holds_them(self, session, writer):
        engine = SharedEngine(size=2)
        engine.others = session.run_step
        checkpointer = Checkpointer(engine, session, writer, is_saved=True)
        checkpointer.save_last(1)

        assert writer.steps == [1]

    def test_is_taken_when_steps_were_done_since(self, checkpointer, session, writer):
        session.run_step()
        checkpointer()
        session.run_step()
        checkpointer.save_last(1)

        assert writer.steps == [1, 2]

    def test_is_not_taken_when_none_were(self, checkpointer, session, writer):
        session.run_step()
        checkpointer()
        checkpointer.save_last(1)

        assert writer.steps == [1]

    def test_is_not_taken_of_a_closed_session(self, checkpointer, session, writer):
        session.run_step()
        session.is_open = False
        checkpointer.save_last(1)

        assert writer.steps == []

    def test_is_an_error_when_it_takes_too_long(self, checkpointer, session, writer):
        session.run_step()
        writer.drains = False

        with pytest.raises(SaveFailedError, match="stop_grace_secs"):
            checkpointer.save_last(0.01)

    def test_says_what_the_disk_said_when_that_is_why_it_takes_too_long(self, checkpointer, session, writer):
        session.run_step()
        writer.drains = False
        writer.last_error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.raises(SaveFailedError, match=r"store.*No space left on device") as caught:
            checkpointer.save_last(0.01)

        assert "stop_grace_secs" not in str(caught.value)
        # There is no checkpoint yet: none can be called good.
        assert "good" not in str(caught.value)
        assert caught.value.__cause__ is writer.last_error

    def test_is_given_up_with_a_warning_when_no_boundary_comes(self, checkpointer, engine, session, writer, caplog):
        session.run_step()
        without_a_boundary(engine)

        checkpointer.save_last(1)

        assert writer.steps == []
        assert "the last steps are not saved" in caplog.text


class TestCheckpointsBySteps:
    def train(self, engine: Any, session: FakeSession, steps: int, every: int, **options: Any) -> list[int]:
        """The steps at which a checkpoint was asked for."""
        saved: list[int] = []
        on_error = options.pop("on_error", _raise)
        save = options.pop("save", lambda: saved.append(session.step))
        trigger = StepTrigger(engine, session, save, every, on_error)
        engine.call_after_steps(session, 1, trigger)
        for _ in range(steps):
            session.run_step()
        return saved

    def test_are_taken_at_the_multiples_of_the_number(self, engine, session):
        assert self.train(engine, session, steps=10, every=3) == [3, 6, 9]

    def test_are_taken_at_the_same_steps_after_a_restart(self, engine, session):
        session.step = 4

        assert self.train(engine, session, steps=6, every=3) == [6, 9]

    def test_of_every_step_are_taken_at_every_step(self, engine, session):
        assert self.train(engine, session, steps=3, every=1) == [1, 2, 3]

    def test_of_a_program_that_counts_none_are_taken_after_so_many_runs(self, engine, session):
        engine.step = lambda session: None

        assert self.train(engine, session, steps=7, every=3) == [1, 4, 7]

    def test_that_fail_report_their_error_and_training_goes_on(self, engine, session):
        errors: list[BaseException] = []
        error = ZeroDivisionError()

        self.train(engine, session, steps=4, every=2, save=_raising(error), on_error=errors.append)

        assert errors == [error, error]
        assert session.step == 4


def _raising(error: BaseException) -> Callable[..., Any]:
    def call(*_: object) -> Any:
        raise error

    return call


def _raise(error: BaseException) -> None:
    raise error
