"""The services: what is done while a session is open, and how fast training goes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from stepguard.coordination.services import StepCounter, WhileOpen
from stepguard.errors import NoBoundaryError
from stepguard.testing import FakeEngine, FakeSession, RecordedEvents


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(size=2)


@pytest.fixture
def session() -> FakeSession:
    return FakeSession(2)


class TestAServiceOfASession:
    def test_is_called_while_it_is_open(self, engine, session):
        calls: list[None] = []
        service = WhileOpen(engine, session, lambda: calls.append(None))
        service()
        session.close()
        service()

        assert calls == [None]

    def test_that_its_closing_cuts_short_is_no_error(self, engine, session):
        def service() -> None:
            session.close()
            raise RuntimeError("Attempted to use a closed session")

        WhileOpen(engine, session, service)()

    def test_that_fails_while_it_is_open_is_one(self, engine, session):
        with pytest.raises(ZeroDivisionError):
            WhileOpen(engine, session, _raising(ZeroDivisionError()))()

    def test_that_finds_no_boundary_is_skipped(self, engine, session, caplog):
        """The first step of a JAX program may compile for minutes; that is no reason to end the run."""
        error = NoBoundaryError("no step boundary for a summary: step 1 has been under way for 6 s")
        with caplog.at_level(logging.WARNING, "stepguard"):
            WhileOpen(engine, session, _raising(error))()

        assert caplog.messages == [f"skipped until the next time: {error}"]


class TestTheStepRate:
    @pytest.fixture
    def clock(self, monkeypatch) -> Any:
        class Clock:
            now = 100.0

        monkeypatch.setattr("stepguard.coordination.services.time.monotonic", lambda: Clock.now)
        return Clock

    @pytest.fixture
    def events(self) -> Any:
        class Events(RecordedEvents):
            def scalar(self, tag: str, value: float, step: int) -> None:
                self.records.append((tag, value, step))

        return Events()

    def test_is_steps_by_seconds_since_the_last_call(self, engine, session, events, clock):
        counter = StepCounter(engine, session, events)
        for steps, seconds in ((10, 2.0), (0, 1.0), (3, 0.5)):
            for _ in range(steps):
                session.run_step()
            clock.now += seconds
            counter()

        assert events.records == [
            ("global_step/sec", 5.0, 10),
            ("global_step/sec", 0.0, 10),
            ("global_step/sec", 6.0, 13),
        ]

    def test_does_not_count_the_steps_of_the_run_before(self, engine, session, events, clock):
        session.step = 1000
        counter = StepCounter(engine, session, events)
        session.run_step()
        clock.now += 1
        counter()

        assert events.records == [("global_step/sec", 1.0, 1001)]

    def test_of_a_run_that_went_back_is_written_from_the_next_call_on(self, engine, session, events, clock):
        session.step = 10
        counter = StepCounter(engine, session, events)
        session.step = 4
        clock.now += 1
        counter()
        session.run_step()
        clock.now += 1
        counter()

        assert events.records == [("global_step/sec", 1.0, 5)]

    def test_in_no_time_is_infinite_and_no_error(self, engine, session, events, clock):
        counter = StepCounter(engine, session, events)
        session.run_step()
        counter()

        assert events.records == [("global_step/sec", float("inf"), 1)]

    def test_of_a_run_that_was_too_short_to_be_measured_is_written_at_its_end(self, engine, session, events, clock):
        counter = StepCounter(engine, session, events)
        session.run_step()
        clock.now += 4
        for _ in range(2):
            counter.finish()

        assert events.records == [("global_step/sec", 0.25, 1)]

    def test_of_a_run_that_was_measured_gets_no_further_point_at_its_end(self, engine, session, events, clock):
        counter = StepCounter(engine, session, events)
        clock.now += 1
        counter()
        session.run_step()
        counter.finish()

        assert events.records == [("global_step/sec", 0.0, 0)]

    def test_of_a_run_without_a_step_is_not_known(self, engine, session, events, clock):
        counter = StepCounter(engine, session, events)
        clock.now += 1
        counter.finish()

        assert events.records == []

    def test_is_not_worth_an_error_of_a_run_that_ends(self, engine, session, events, monkeypatch):
        counter = StepCounter(engine, session, events)
        monkeypatch.setattr(engine, "step", _raising(ConnectionError("the server has ended as well")))
        counter.finish()
        engine.close(session)
        counter.finish()

        assert events.records == []

    def test_is_logged_ten_times_and_then_no_more(self, engine, session, events, caplog):
        counter = StepCounter(engine, session, events)
        with caplog.at_level(logging.INFO, "stepguard"):
            for _ in range(15):
                counter()

        assert len(caplog.records) == 10
        assert len(events.records) == 15


def _raising(error: BaseException) -> Callable[..., Any]:
    def call(*_: object) -> Any:
        raise error

    return call


def _raise(error: BaseException) -> None:
    raise error
