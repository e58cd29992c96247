"""``stepguard save`` and ``stop``: a run that lasts is asked from outside."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from logdirs import commit

from stepguard.options import Saving
from stepguard.store import CheckpointStore
from stepguard.testing import FakeSupervisor
from stepguard.watching import ledger

SOON_SECS = 60.0


class Run:
    """A run that trains until it is stopped, on a thread of its own."""

    def __init__(self, logdir: Path) -> None:
        saving = Saving(save_model_secs=3600, save_at_end=True)
        self.sv = FakeSupervisor(str(logdir), size=4, saving=saving)
        self.begun = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.step = 0
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()
        assert self.begun.wait(SOON_SECS)

    def _train(self) -> None:
        with self.sv.managed_session() as session:
            while not self.sv.should_stop():
                session.run_step()
                self.step = session.step
                self.begun.set()
                time.sleep(0.001)
                self.may_go_on.wait(SOON_SECS)

    def end(self) -> None:
        self.sv.request_stop()
        self.thread.join(SOON_SECS)
        assert not self.thread.is_alive()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    one = Run(tmp_path)
    yield one
    one.end()


def stop_reason(logdir: Path) -> Any:
    return next(one["reason"] for one in ledger.read(logdir) if one["event"] == "stop")


def test_save_is_answered_when_the_step_is_committed(run, tmp_path, stepguard):
    # Without an answer it would end with exit code 1, after a minute.
    ended = stepguard("save", tmp_path, "--name", "by-hand")
    assert ended.exit_code == 0, ended.stderr
    newest = CheckpointStore(tmp_path).find("by-hand")
    assert ended.stdout == f"saved {newest.path}\n"
    assert 0 < newest.step <= run.step
    assert list((tmp_path / "requests").iterdir()) == []


def test_stop_ends_the_run_which_saves_its_last_step(run, tmp_path, stepguard, caplog):
    ended = stepguard("stop", tmp_path)
    assert ended.exit_code == 0, ended.stderr
    assert "stops at the next step boundary" in ended.stdout
    run.thread.join(SOON_SECS)
    assert not run.thread.is_alive()
    assert CheckpointStore(tmp_path).candidates()[0].step == run.step
    assert stop_reason(tmp_path) == "command"
    said = f"stopped at step {run.step}: step {run.step} is saved in {tmp_path}/model.ckpt-{run.step}"
    assert said in caplog.messages
    assert "stopped by `stepguard stop`" in stepguard("log", tmp_path).stdout


def test_stop_at_a_step_ends_it_there_and_a_step_that_is_over_is_refused(run, tmp_path, stepguard, document):
    refused = stepguard("stop", tmp_path, "--at", "1")
    assert refused.exit_code == 1
    assert "expected a step after the present one, found 1" in refused.stderr
    assert stepguard("stop", tmp_path, "--at", "9" * 20).exit_code == 2
    # Else a busy machine may come to the step before the request is read.
    run.may_go_on.clear()
    last = run.step + 20
    assert f"stops after step {last}" in document("stop", tmp_path, "--at", last)["answer"]
    run.may_go_on.set()
    run.thread.join(SOON_SECS)
    assert not run.thread.is_alive()
    assert run.step == last


@pytest.mark.parametrize("verb", ["save", "stop"])
def test_where_no_run_is_alive_nothing_is_asked(verb, tmp_path, stepguard):
    commit(tmp_path, 1)
    ended = stepguard(verb, tmp_path)
    assert ended.exit_code == 1
    assert "expected a run that is alive" in ended.stderr
    assert not (tmp_path / "requests").exists()


def test_a_request_to_another_process_and_one_that_is_none_are_removed_and_do_nothing(run, tmp_path):
    place = tmp_path / "requests"
    place.mkdir(exist_ok=True)
    made_up = {"verb": "stop", "name": None, "step": None, "pid": 1, "process_start": 1, "host": "elsewhere"}
    (place / "0123456789abcdef.json").write_text(json.dumps(made_up))
    (place / "0123456789abcde0.json").write_bytes(b"[" * 5000)
    (place / "0123456789abcde1.json").symlink_to(tmp_path / "run.jsonl")
    (place / "mine.txt").write_text("mine")
    deadline = time.monotonic() + SOON_SECS
    while len(list(place.iterdir())) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (place / "mine.txt").exists()
    assert (tmp_path / "run.jsonl").stat().st_size > 0
    assert run.thread.is_alive()


def test_a_run_that_does_not_answer_is_given_up_and_the_request_taken_back(run, tmp_path, stepguard, monkeypatch):
    monkeypatch.setattr("stepguard.watching.requests.Reception._take", lambda *_: None)
    ended = stepguard("save", tmp_path, "--timeout", "0.3")
    assert ended.exit_code == 1
    assert "has not answered in 0.3 s" in ended.stderr
    assert list((tmp_path / "requests").iterdir()) == []
