"""The NaN guard: what only the fake engine can show, moment by moment."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepguard.errors import NonFiniteError
from stepguard.options import Guarding, Saving
from stepguard.store import CheckpointStore
from stepguard.testing import FakeEngine, FakeSession, FakeSupervisor
from stepguard.testing.engine import FakeSnapshot
from stepguard.watching import ledger

SOON_SECS = 60.0
NAN = math.nan


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON_SECS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def guarded(logdir: Path, mode: str = "return", nan_returns: int = 3, **options: Any) -> FakeSupervisor:
    given = {"save_summaries_secs": 0, "save_model_secs": 0, "save_model_steps": 5, "size": 2, **options}
    return FakeSupervisor(str(logdir), guarding=Guarding(nan_guard=mode, nan_returns=nan_returns), **given)


def run_to(session: FakeSession, step: int) -> None:
    while session.step < step:
        session.run_step()


def committed(logdir: Path) -> list[int | None]:
    return sorted(one.step for one in CheckpointStore(logdir).candidates() if one.is_committed)


def run_to_saved(supervisor: FakeSupervisor, session: FakeSession, logdir: Path, step: int) -> None:
    run_to(session, step)
    wait_until(lambda: step in committed(logdir) and not supervisor._saving.writer.busy)


class TestAReturn:
    def test_is_over_before_the_thread_that_saw_the_number_goes_on(self, tmp_path):
        supervisor = guarded(tmp_path)
        with supervisor.managed_session() as session:
            run_to_saved(supervisor, session, tmp_path, 5)
            run_to(session, 8)
            session.report(NAN)
            assert session.step == 5
            session.run_step()

    def test_is_a_new_start_for_tensorboard(self, tmp_path):
        supervisor = guarded(tmp_path)
        with supervisor.managed_session() as session:
            run_to_saved(supervisor, session, tmp_path, 5)
            session.report(NAN)
            session.run_step()

        assert [one[1] for one in supervisor.events.records if one[0] == "started"] == [0, 5]

    def test_is_in_the_ledger_and_among_the_warnings_of_the_heartbeat(self, tmp_path):
        supervisor = guarded(tmp_path)
        with supervisor.managed_session() as session:
            run_to_saved(supervisor, session, tmp_path, 5)
            run_to(session, 6)
            session.report(-math.inf)
            session.run_step()

        (event,) = [one for one in ledger.read(tmp_path) if one["event"] == "return"]
        assert {key: event[key] for key in ("step", "to_step", "reason", "number")} == {
            "step": 6,
            "to_step": 5,
            "reason": "loss is -inf at step 6",
            "number": 1,
        }
        (warning,) = json.loads((tmp_path / "heartbeats" / "chief.json").read_text())["warnings"]
        assert warning.endswith("the run has returned to model.ckpt-5 (step 5), 1 of at most 3 times")

    def test_waits_for_the_step_of_another_thread(self, tmp_path):
        supervisor = guarded(tmp_path)
        with supervisor.managed_session() as session:
            run_to_saved(supervisor, session, tmp_path, 5)
            run_to(session, 7)
            with session.in_step():
                reporter = threading.Thread(target=session.report, args=(NAN,))
                reporter.start()
                wait_until(lambda: supervisor._guard._sight is not None)
                assert session.step == 7
            reporter.join()
            assert session.step == 5
            session.run_step()

    def test_drops_the_snapshots_that_were_taken_before_it(self, tmp_path):
        supervisor = guarded(tmp_path)
        with supervisor.managed_session() as session:
            run_to_saved(supervisor, session, tmp_path, 5)
            supervisor.engine.fail_writes = [OSError(5, "not now")]
            run_to(session, 10)
            wait_until(lambda: supervisor._saving.writer.retrying)
            session.report(NAN)
            assert session.step == 5
            wait_until(lambda: not supervisor._saving.writer.busy)
            session.run_step()

        assert committed(tmp_path) == [5, 6]

    def test_does_not_make_the_step_rate_negative(self, tmp_path):
        supervisor = guarded(tmp_path)
        with supervisor.managed_session() as session:
            run_to_saved(supervisor, session, tmp_path, 5)
            run_to(session, 9)
            meter = supervisor._observer._watch.meter
            meter.look()
            session.report(NAN)
            meter.look()
            assert supervisor._observer.now.step == 5
            assert [step for _, step in meter._rates] == [5]
            session.run_step()

    def test_to_a_checkpoint_that_cannot_be_restored_is_an_error_with_its_cause(self, tmp_path):
        supervisor = guarded(tmp_path)
        broken = ZeroDivisionError("no restore today")
        with pytest.raises(NonFiniteError, match="no restore today") as caught:  # noqa: SIM117
            with supervisor.managed_session() as session:
                run_to_saved(supervisor, session, tmp_path, 5)

                def fail(*_: object, **__: object) -> None:
                    raise broken

                supervisor.engine.restore = fail
                session.report(NAN)
                session.run_step()
        assert caught.value.__cause__ is broken

    def test_is_counted_over_all_sessions_of_a_supervisor(self, tmp_path):
        supervisor = guarded(tmp_path, nan_returns=1)
        with supervisor.managed_session() as session:
            run_to_saved(supervisor, session, tmp_path, 5)
            session.report(NAN)
            session.run_step()
        with pytest.raises(NonFiniteError, match="1 of at most 1"), supervisor.managed_session() as session:
            session.report(NAN)


class TestALoopThatEnds:
    def test_while_a_return_is_due_has_failed_and_saves_nothing(self, tmp_path):
        supervisor = guarded(tmp_path)
        with pytest.raises(NonFiniteError, match="loop ended before the run could return"):  # noqa: SIM117
            with supervisor.managed_session() as session:
                run_to_saved(supervisor, session, tmp_path, 5)
                run_to(session, 7)
                with session.in_step():
                    reporter = threading.Thread(target=session.report, args=(NAN,))
                    reporter.start()
                    wait_until(lambda: supervisor._guard._sight is not None)
                    supervisor.request_stop()
        reporter.join()
        assert committed(tmp_path) == [5]

    def test_just_when_its_session_was_put_back_has_failed(self, tmp_path):
        supervisor = guarded(tmp_path)
        with pytest.raises(NonFiniteError, match="just when its session was put back"):  # noqa: SIM117
            with supervisor.managed_session() as session:
                run_to_saved(supervisor, session, tmp_path, 5)
                run_to(session, 7)
                session.report(NAN)

    def test_then_because_it_was_asked_to_has_not(self, tmp_path):
        supervisor = guarded(tmp_path)
        with supervisor.managed_session() as session:
            run_to_saved(supervisor, session, tmp_path, 5)
            run_to(session, 7)
            session.report(NAN)
            supervisor.request_stop()

        assert committed(tmp_path) == [5]

    def test_by_closing_its_session_saves_nothing_when_something_was_not_finite(self, tmp_path):
        supervisor = guarded(tmp_path, "stop")
        with pytest.raises(NonFiniteError), supervisor.managed_session() as session:
            run_to(session, 3)
            session.report(NAN)
            session.close()

        assert committed(tmp_path) == []

    def test_by_closing_its_session_does_not_go_back(self, tmp_path):
        supervisor = guarded(tmp_path)
        with pytest.raises(NonFiniteError, match="not finite at step 7: weight; the training loop had ended"):  # noqa: SIM117
            with supervisor.managed_session() as session:
                run_to_saved(supervisor, session, tmp_path, 5)
                run_to(session, 7)
                session.weight = NAN
                session.close()

        assert session.step == 7
        assert committed(tmp_path) == [5]


class TestASnapshot:
    def test_that_was_taken_after_the_number_is_not_committed(self, tmp_path):
        supervisor = guarded(tmp_path, "stop", save_model_steps=None, saving=Saving(save_at_end=True))
        with pytest.raises(NonFiniteError), supervisor.managed_session() as session:
            run_to(session, 3)
            session.report(NAN)
            supervisor._saving.checkpointer()

        assert committed(tmp_path) == []

    def test_that_its_framework_has_written_already_is_not_committed_either(self, tmp_path):
        class Written(FakeEngine):
            def snapshot(self, session: FakeSession) -> FakeSnapshot:
                name = f"model.ckpt-{session.step}"
                path = Path(self.store.root, name)
                path.mkdir()
                (path / "state.json").write_text(
                    json.dumps({"step": session.step, "values": session.values, "weight": session.weight})
                )
                return FakeSnapshot(session.step, (), written=str(path), weight=session.weight)

        supervisor = guarded(tmp_path, "stop", engine=Written(size=2))
        with pytest.raises(NonFiniteError), supervisor.managed_session() as session:
            run_to_saved(supervisor, session, tmp_path, 5)
            session.weight = NAN
            while True:
                session.run_step()

        assert committed(tmp_path) == [5]
        assert (tmp_path / "model.ckpt-10").exists()
        assert CheckpointStore(tmp_path).newest_good().checkpoint.step == 5


def test_without_services_and_a_logdir_a_number_still_stops_the_run():
    supervisor = FakeSupervisor(guarding=Guarding(nan_guard="stop"))
    with pytest.raises(NonFiniteError, match="loss is nan") as caught, supervisor.managed_session(False) as session:
        session.report(NAN)
        while True:
            session.run_step()
    # It saves nothing, and so knows nothing of what others save, nor has it anything to return to.
    assert "checkpoint" not in str(caught.value)
    assert "nan_guard" not in str(caught.value)
