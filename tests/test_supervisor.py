"""The life of a supervised run, in the order in which its parts happen. What every engine must do is in engines/."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from stepguard.coordination.looper import LooperThread
from stepguard.errors import LogdirInUseError
from stepguard.options import Saving, Stopping
from stepguard.store import CheckpointStore
from stepguard.testing import FakeSupervisor

SOON_SECS = 60.0


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON_SECS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kinds(supervisor: FakeSupervisor) -> list[str]:
    return [record[0] for record in supervisor.events.records]


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (Stopping, {"stop_on_sigterm": None}, "stop_on_sigterm must be True or False, got NoneType: None"),
        (Saving, {"save_at_end": "no"}, "save_at_end must be True, False or None, got str: 'no'"),
    ],
)
def test_a_switch_is_on_or_off_and_nothing_else(group, options, message):
    with pytest.raises(TypeError, match=message):
        group(**options)


class TestTheEventLog:
    def test_begins_with_the_start_and_ends_with_the_stop(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path))
        with supervisor.managed_session() as session:
            session.run_step()

        assert supervisor.events.records[0] == ("started", 0)
        assert supervisor.events.records[-2:] == [
            ("checkpointed", 1, str(tmp_path / "model.ckpt-1")),
            ("stopped",),
        ]
        assert not supervisor.events.is_open

    def test_says_at_which_step_a_resumed_run_starts(self, tmp_path):
        for _ in range(2):
            supervisor = FakeSupervisor(str(tmp_path))
            with supervisor.managed_session() as session:
                session.run_step()

        assert supervisor.events.records[0] == ("started", 1)

    def test_ends_with_the_stop_after_an_error_too(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path))
        with pytest.raises(ZeroDivisionError), supervisor.managed_session():
            raise ZeroDivisionError

        assert kinds(supervisor)[-1] == "stopped"
        assert not supervisor.events.is_open

    def test_ends_with_the_stop_when_the_preparation_fails(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path))
        supervisor.engine.fail_prepare = ZeroDivisionError()
        with pytest.raises(ZeroDivisionError), supervisor.managed_session():
            pass

        assert kinds(supervisor) == ["stopped"]

    def test_can_be_left_open(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path))
        with supervisor.managed_session(close_summary_writer=False):
            pass

        assert supervisor.events.is_open
        assert "stopped" not in kinds(supervisor)

    def test_is_open_again_in_the_next_run(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path))
        for _ in range(2):
            with supervisor.managed_session():
                assert supervisor.events.is_open

        assert kinds(supervisor).count("stopped") == 2

    def test_has_the_rate_of_steps(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path), save_summaries_secs=0.01)
        with supervisor.managed_session():
            wait_until(lambda: "scalar" in kinds(supervisor))

        assert ("scalar", "global_step/sec", 0) in supervisor.events.records

    def test_begins_with_no_rate_before_one_was_measured(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path), save_summaries_secs=0.05)
        began = time.monotonic()
        with supervisor.managed_session():
            wait_until(lambda: "scalar" in kinds(supervisor))
            assert time.monotonic() - began >= 0.05

    def test_has_a_rate_of_a_run_shorter_than_its_first_interval(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path), save_summaries_secs=3600)
        with supervisor.managed_session() as session:
            session.run_step()
            assert "scalar" not in kinds(supervisor)

        records = supervisor.events.records
        assert records.index(("scalar", "global_step/sec", 1)) < records.index(("stopped",))

    def test_has_a_rate_although_the_program_closes_its_session_first(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path), save_summaries_secs=3600)
        session = supervisor.prepare_or_wait_for_session()
        session.run_step()
        session.close()
        supervisor.stop()

        assert ("scalar", "global_step/sec", 1) in supervisor.events.records


class TestWithoutALogdir:
    def test_only_who_trains_is_warned(self, caplog):
        supervisor = FakeSupervisor()
        with supervisor.managed_session() as session:
            assert caplog.records == []
            for _ in range(3):
                session.run_step()

        assert [one.getMessage().partition(":")[0] for one in caplog.records] == ["no logdir was given"]


class TestTheServices:
    @pytest.mark.parametrize(
        ("options", "names"),
        [
            ({}, ["stepguard-summary", "stepguard-step-counter", "stepguard-checkpoint"]),
            ({"save_summaries_secs": 0}, ["stepguard-checkpoint"]),
            ({"save_summaries_secs": None}, ["stepguard-checkpoint"]),
            ({"save_model_secs": 0}, ["stepguard-summary", "stepguard-step-counter"]),
            ({"save_model_secs": None, "save_summaries_secs": None}, []),
        ],
    )
    def test_are_those_that_were_asked_for(self, options, names, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path), **options)

        with supervisor.managed_session(start_standard_services=False) as session:
            threads = supervisor.start_standard_services(session)

            assert [thread.name for thread in threads] == names
            assert all(thread.daemon and thread.is_alive() for thread in threads)

        assert not any(thread.is_alive() for thread in threads)

    def test_are_summaries_on_a_timer(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path), save_summaries_secs=0.01)

        with supervisor.managed_session():
            wait_until(lambda: supervisor.engine.summaries >= 3)

    def test_of_the_program_are_called_with_their_arguments(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path))
        calls: list[Any] = []

        with supervisor.managed_session():
            looper = supervisor.loop(0.01, lambda *args, **kwargs: calls.append((args, kwargs)), (1, 2), {"three": 3})
            wait_until(lambda: len(calls) >= 2)

        assert isinstance(looper, LooperThread)
        assert not looper.is_alive()
        assert calls[0] == ((1, 2), {"three": 3})


class TestTheChief:
    def test_holds_the_logdir_while_the_run_lasts(self, tmp_path, monkeypatch):
        supervisor = FakeSupervisor(str(tmp_path))
        with supervisor.managed_session():
            assert supervisor._saving.holds_logdir
            assert supervisor._saving._hold.is_locked

        assert not supervisor._saving.holds_logdir

    def test_gives_the_logdir_back_after_a_failure(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path))
        supervisor.engine.fail_prepare = ZeroDivisionError()
        with pytest.raises(ZeroDivisionError), supervisor.managed_session():
            pass

        assert not supervisor._saving.holds_logdir

    def test_of_another_process_is_named_and_nothing_is_touched(self, tmp_path, monkeypatch):
        error = LogdirInUseError("in use", logdir=tmp_path, host="elsewhere", pid=1, since=0.0)
        monkeypatch.setattr(CheckpointStore, "acquire", _raising(error))
        supervisor = FakeSupervisor(str(tmp_path))

        with pytest.raises(LogdirInUseError) as caught, supervisor.managed_session():
            raise AssertionError("the block must not be entered")

        assert caught.value is error
        assert list(tmp_path.iterdir()) == []

    def test_that_saves_nothing_needs_no_lock(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path), save_model_secs=0)
        with supervisor.managed_session():
            assert not supervisor._saving.holds_logdir

    def test_sweeps_what_a_killed_one_left_behind(self, tmp_path):
        (tmp_path / ".stage-model.ckpt-7").mkdir()
        with FakeSupervisor(str(tmp_path)).managed_session():
            assert not (tmp_path / ".stage-model.ckpt-7").exists()

    def test_sweeps_nothing_of_another_one_of_its_process(self, tmp_path):
        with FakeSupervisor(str(tmp_path)).managed_session():
            (tmp_path / ".stage-other-7").mkdir()
            with FakeSupervisor(str(tmp_path)).managed_session():
                assert (tmp_path / ".stage-other-7").exists()

    def test_of_a_cleared_logdir_that_has_another_chief_since_ends_with_that(self, tmp_path):
        logdir = tmp_path / "logdir"
        with pytest.raises(LogdirInUseError), FakeSupervisor(str(logdir)).managed_session() as session:
            session.run_step()
            # Locked before it has its name: a save that is under way would lock a file that is only there.
            other = (tmp_path / "lock").open("w")
            fcntl.flock(other, fcntl.LOCK_EX)
            (tmp_path / "lock").replace(logdir / ".stepguard.lock")
        other.close()

    def test_is_not_a_worker(self, tmp_path):
        worker = FakeSupervisor(str(tmp_path), is_chief=False)
        with worker.managed_session() as session:
            session.run_step()
            assert not worker._saving.holds_logdir

        assert [path for path in tmp_path.iterdir() if "model.ckpt" in path.name] == []


class TestTheOrderOfTheEnd:
    def test_is_threads_then_the_last_checkpoint_then_the_stop_then_the_session(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path))
        order: list[str] = []

        def work() -> None:
            supervisor.wait_for_stop()
            order.append("thread")

        supervisor.engine.close = _then(supervisor.engine.close, lambda: order.append("session"))
        supervisor.events.checkpointed = lambda step, path: order.append("checkpoint")
        supervisor.events.stopped = lambda: order.append("stop")
        with supervisor.managed_session() as session:
            wait_until(lambda: order == ["checkpoint"])
            order.clear()
            supervisor.loop(None, work)
            session.run_step()

        assert order == ["thread", "checkpoint", "stop", "session"]

    def test_joins_the_threads_that_the_program_gives_it(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path))
        supervisor.prepare_or_wait_for_session()
        ended = threading.Event()

        def work() -> None:
            supervisor.wait_for_stop()
            ended.set()

        thread = threading.Thread(target=work)
        thread.start()
        supervisor.stop([thread])

        assert ended.is_set()

    def test_is_not_waited_for_by_a_stop_flag_of_the_run_before(self, tmp_path):
        supervisor = FakeSupervisor(str(tmp_path))
        with supervisor.managed_session():
            pass
        assert supervisor.should_stop()

        with supervisor.managed_session():
            assert not supervisor.should_stop()


def _raising(error: BaseException) -> Callable[..., Any]:
    def call(*_: object) -> Any:
        raise error

    return call


def _then(first: Callable[..., Any], second: Callable[[], Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> None:
        first(*arguments)
        second()

    return call


def test_a_relative_logdir_that_means_another_place_now_is_warned_of(tmp_path, monkeypatch, caplog):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    sv = FakeSupervisor("run")
    monkeypatch.chdir(tmp_path / "there")

    with caplog.at_level(logging.WARNING, "stepguard"), sv.managed_session() as session:
        session.run_step()

    (warning,) = caplog.messages
    assert str(tmp_path / "there" / "run") in warning
    assert (tmp_path / "there" / "run" / "run.jsonl").exists()
    assert (tmp_path / "there" / "run" / "model.ckpt-1.manifest.json").exists()
    assert os.listdir(tmp_path / "here") == []
