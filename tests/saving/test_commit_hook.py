"""The program's own function after each commit: when it is called, and that nothing waits for it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from stepguard.options import Saving
from stepguard.saving.commit_hook import CommitHook, Committed
from stepguard.store import CheckpointStore
from stepguard.testing import FakeSupervisor
from stepguard.watching import ledger

SOON_SECS = 60.0


def supervisor(logdir: Path, on_commit, **saving):
    saving = {"save_model_secs": 0, "save_model_steps": 1, "save_at_end": True, **saving}
    return FakeSupervisor(str(logdir), size=4, saving=Saving(on_commit=on_commit, **saving))


def train(sv, steps: int) -> None:
    with sv.managed_session() as session:
        for step in range(steps):
            session.run_step()
            if step == 1:
                sv.metrics(session, {"loss": 0.5})
                assert sv._saving.writer.drain(SOON_SECS)
                sv.save(session, "second")
            assert sv._saving.writer.drain(SOON_SECS)


def test_it_is_called_with_what_was_committed_in_this_order(tmp_path):
    told: list[Committed] = []
    threads = set()

    def hear(committed: Committed) -> None:
        assert CheckpointStore(tmp_path).verify(CheckpointStore(tmp_path).find(committed.path.name))
        told.append(committed)
        threads.add(threading.current_thread().name)

    sv = supervisor(tmp_path, hear, save_model_steps=1000, keep_best=("loss", "min", 1))
    train(sv, 3)

    assert told == [
        Committed(tmp_path / "model.ckpt-2", 2, {"loss": 0.5}, ()),
        Committed(tmp_path / "model.ckpt-3", 3, {}, ()),
    ]
    assert threads == {"stepguard-on-commit"}


@pytest.mark.parametrize("kind", [ConnectionError, SystemExit])
def test_its_error_is_a_warning_and_the_next_call_is_made(kind, tmp_path, caplog):
    told = []

    def fail(committed: Committed) -> None:
        told.append(committed.step)
        raise kind("the hub is away")

    train(supervisor(tmp_path, fail), 3)

    assert told == [1, 2, 3]
    assert "on_commit has failed for" in caplog.text
    assert "the hub is away" in next(one["message"] for one in ledger.read(tmp_path) if one["event"] == "warning")


def test_training_does_not_wait_and_its_checkpoint_is_not_pruned_meanwhile(tmp_path):
    may_end, seen = threading.Event(), []

    def slow(committed: Committed) -> None:
        assert may_end.wait(SOON_SECS)
        seen.append(committed.path.is_dir())

    sv = supervisor(tmp_path, slow, max_to_keep=1)
    with sv.managed_session() as session:
        for _ in range(4):
            session.run_step()
            assert sv._saving.writer.drain(SOON_SECS)
        assert len(CheckpointStore(tmp_path).candidates()) == 4
        may_end.set()

    assert seen == [True] * 4


def test_the_end_waits_until_its_deadline_and_names_what_was_not_called(tmp_path, caplog):
    may_end = threading.Event()
    hook = CommitHook(lambda _: may_end.wait(2 * SOON_SECS), lambda _: None)
    for step in (1, 2):
        hook.tell(Committed(tmp_path / f"model.ckpt-{step}", step, {}, ()))
    began = time.monotonic()
    hook.close(began + 0.05)

    assert time.monotonic() - began < SOON_SECS
    assert "the run ends before it was called to its end with model.ckpt-1, model.ckpt-2" in caplog.text
    may_end.set()


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="on_commit must be a function"):
        Saving(on_commit="push")


def test_where_no_thread_can_be_started_it_says_that_the_call_is_not_made(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    told, said = [], []
    hook = CommitHook(told.append, said.append)
    committed = Committed(Path("model.ckpt-2"), 2, {}, ())
    with monkeypatch.context() as exiting:
        exiting.setattr(threading.Thread, "start", refuse)
        hook.tell(committed)
    assert said == ["on_commit is not called with model.ckpt-2: can't create new thread at interpreter shutdown"]
    assert hook.unfinished == []
    hook.tell(committed)
    hook.close(time.monotonic() + SOON_SECS)
    assert told == [committed]
