"""The service of the cadence: what it asks for when a checkpoint is due, and what it says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from stepguard import Saving
from stepguard.engine import StepsDone
from stepguard.saving.cadence import Cadence, CadenceReport
from stepguard.saving.cadence_service import CadenceService
from stepguard.saving.commit import _written_bytes
from stepguard.store import FileRecord
from stepguard.testing import FakeEngine, FakeSession, FakeSupervisor


class DueCadence(Cadence):
    """A cadence by which a checkpoint is always due."""

    is_overdue = False

    def __init__(self, options: Saving) -> None:
        super().__init__(options)
        self.failures = 0
        self.looks: list[tuple[StepsDone | None, bool, bool]] = []

    def look(self, steps: StepsDone | None, *, is_writing: bool, is_uploading: bool) -> bool:
        self.looks.append((steps, is_writing, is_uploading))
        return True

    def failed(self) -> None:
        self.failures += 1

    @property
    def report(self) -> CadenceReport | None:
        return CadenceReport(0.01, 4.0, 0.009, 1e12)


class EvaluatingEngine(FakeEngine):
    """An engine with loops, whose program may be inside an evaluation."""

    evaluates = rests = False

    def is_resting(self, session: FakeSession) -> bool:
        return self.rests

    def is_evaluating(self, session: FakeSession) -> bool:
        return self.evaluates

    def is_alone(self, session: FakeSession) -> bool:
        return True

    def call_at_rest(self, session: FakeSession, keep: Any) -> None:
        pass

    def saves_rest(self, session: FakeSession) -> None:
        pass

    def come_back(self, session: FakeSession) -> None:
        pass

    def is_outside_steps(self, session: FakeSession, error: BaseException) -> bool:
        return False

    def defer(self, session: FakeSession, callback: Any) -> bool:
        return False


class Rig:
    """A service whose checkpointer and writer only note what they are asked."""

    def __init__(self) -> None:
        self.engine, self.session = EvaluatingEngine(), FakeSession(4)
        options = Saving(overhead=0.01)
        self.cadence = DueCadence(options)
        self.asked = 0
        self.can_save = self.busy = self.has_copy = True
        self.told: list[CadenceReport] = []
        kept: dict[str, Any] = {"checkpointer": self, "writer": self}
        self.service = CadenceService(
            self.engine, self.session, self.cadence, options, is_uploading=lambda: True, tell=self.told.append, **kept
        )

    def save_on_request(self) -> bool:
        self.asked += 1
        return self.can_save


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_it_saves_when_a_checkpoint_is_due(rig):
    rig.session.run_step()

    rig.service()

    assert (rig.asked, rig.cadence.failures) == (1, 0)
    ((steps, is_writing, is_uploading),) = rig.cadence.looks
    assert (steps.number, is_writing, is_uploading) == (1, True, True)


def test_a_save_that_cannot_be_made_is_told_to_the_cadence(rig):
    rig.can_save = False

    rig.service()

    assert rig.cadence.failures == 1


def test_nothing_is_asked_for_in_an_evaluation_inside_a_step(rig):
    rig.engine.evaluates = True
    rig.service()
    assert (rig.asked, rig.cadence.failures) == (0, 0)

    # Between two loops there is a copy of the last step.
    rig.engine.rests = True
    rig.service()
    assert rig.asked == 1


def test_nothing_is_asked_for_between_two_loops_without_a_copy_until_it_is_overdue(rig):
    rig.engine.rests, rig.has_copy = True, False
    rig.service()
    assert rig.asked == 0

    rig.cadence.is_overdue = True
    rig.service()
    assert rig.asked == 1


def test_what_has_not_changed_is_told_once(rig):
    rig.service()
    rig.service()

    assert rig.told == [CadenceReport(0.01, 4.0, 0.009, 1e12)]


def warnings(logdir: Path) -> list[str]:
    lines = [json.loads(line) for line in (logdir / "run.jsonl").read_text().splitlines()]
    return [line["message"] for line in lines if line["event"] == "warning"]


def checkpoints(logdir: Path) -> int:
    ledger = logdir / "run.jsonl"
    return ledger.read_text().count('"event": "checkpoint"') if ledger.exists() else 0


def test_a_bound_of_bytes_that_the_longest_interval_breaks_is_said_once(tmp_path):
    often = Saving(
        save_model_secs=0, overhead=0.5, min_interval_secs=0.1, max_interval_secs=0.3, max_bytes_per_day=1000
    )
    sv = FakeSupervisor(str(tmp_path), saving=often, save_summaries_secs=0)

    with sv.managed_session() as session:
        while checkpoints(tmp_path) < 5:
            session.run_step()

    (said,) = warnings(tmp_path)
    assert "max_bytes_per_day=1000 is not kept: a checkpoint at least every max_interval_secs=0.3 writes" in said


def test_another_trigger_is_silent_while_a_checkpoint_of_the_cadence_is_written(tmp_path):
    sv = FakeSupervisor(str(tmp_path), saving=Saving(save_model_secs=0, overhead=0.5), save_summaries_secs=0)
    with sv.managed_session() as session:
        checkpointer, writer = sv._saving.checkpointer, sv._saving.writer
        with sv._saving.one_save:
            session.run_step()
            checkpointer.save_on_request()
            session.run_step()
            assert writer.busy
            checkpointer()

            assert checkpointer.skipped == 0
        writer.wait_until_idle()
        checkpointer()
        writer.wait_until_idle()

        assert (tmp_path / "model.ckpt-2.manifest.json").exists()


def test_a_file_that_is_shared_with_an_earlier_checkpoint_was_not_written(tmp_path):
    for name, nbytes in (("frozen", 3000), ("adapter", 20)):
        (tmp_path / name).write_bytes(b"\0" * nbytes)
    os.link(tmp_path / "frozen", tmp_path / "earlier")

    records = [FileRecord("frozen", 3000, "x"), FileRecord("adapter", 20, "y"), FileRecord("gone", 7, "z")]
    assert _written_bytes(tmp_path, records) == 20
