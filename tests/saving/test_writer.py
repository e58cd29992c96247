"""The writer thread: one snapshot at a time, made durable while training goes on."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stepguard.errors import NoBoundaryError, SaveFailedError
from stepguard.saving.commit import Committer
from stepguard.saving.retry import Backoff
from stepguard.saving.writer import CheckpointWriter
from stepguard.store import CheckpointStore
from stepguard.testing import FakeEngine, RecordedEvents
from stepguard.testing.engine import FakeSnapshot

SOON_SECS = 60.0


def disk_error() -> OSError:
    return OSError(errno.EIO, "the disk is on fire")


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON_SECS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Rig:
    """A writer over a fake engine, and what it reports."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.store = CheckpointStore(root, engine="fake", max_to_keep=2)
        self.engine = options.get("engine") or FakeEngine()
        self.engine.store = self.store
        self.events = RecordedEvents()
        self.errors: list[BaseException] = []
        retry = Backoff(options.get("max_unprotected_secs", 60.0), first_secs=options.get("first_retry_secs", 0.01))
        self.writer = CheckpointWriter(Committer(self.engine, self.store, self.events), self.errors.append, retry=retry)

    def submit(self, step: int) -> None:
        self.writer.submit(FakeSnapshot(step, (step,)))

    def save(self, step: int) -> None:
        self.submit(step)
        assert self.writer.drain(SOON_SECS)

    def steps(self) -> list[int | None]:
        return sorted(one.step for one in self.store.candidates())

    def stages(self) -> list[str]:
        return [path.name for path in self.store.root.iterdir() if path.name.startswith(".stage")]


class KeepingEngine(FakeEngine):
    """An engine whose framework has a list of checkpoints of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []
        self.told: list[tuple[str, float]] = []

    def kept_checkpoints(self) -> list[str]:
        return self.kept

    def committed(self, kept: Any) -> None:
        self.told = list(kept)


@pytest.mark.skipif(sys.platform != "linux", reason="only there have threads a priority of their own")
def test_the_writer_yields_to_the_training(tmp_path):
    rig = Rig(tmp_path)
    nice: list[int] = []
    write = rig.engine.write

    def noting(*arguments: Any) -> Any:
        nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return write(*arguments)

    rig.engine.write = noting
    rig.save(1)

    assert nice[0] > os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    rig.writer.close(SOON_SECS)


def written(rig: Rig, step: int) -> FakeSnapshot:
    """A snapshot that its framework has written itself."""
    path = rig.store.root / f"model.ckpt-{step}"
    path.mkdir()
    (path / "state.json").write_text("{}")
    return FakeSnapshot(step, (step,), written=str(path))


@pytest.fixture
def make_rig(tmp_path) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(**options: Any) -> Rig:
        made.append(Rig(tmp_path / "logdir", **options))
        return made[-1]

    yield make
    for rig in made:
        rig.engine.fail_writes.clear()
        assert rig.writer.close(SOON_SECS)
    wait_until(lambda: not [one for one in threading.enumerate() if one.name == "stepguard-writer"])


@pytest.fixture
def rig(make_rig) -> Rig:
    return make_rig()


class TestASave:
    def test_is_committed_and_recorded_with_the_path_really_written(self, rig):
        rig.save(3)

        assert rig.steps() == [3]
        assert rig.events.records == [("checkpointed", 3, str(rig.store.root / "model.ckpt-3"))]
        assert rig.errors == []

    def test_is_recorded_once_it_is_durable_and_not_before(self, rig):
        seen: list[list[int | None]] = []
        rig.events.checkpointed = lambda step, path: seen.append(rig.steps())  # type: ignore[method-assign]

        rig.save(3)

        assert seen == [[3]]

    def test_removes_those_that_retention_drops(self, rig):
        for step in (1, 2, 3):
            rig.save(step)

        assert rig.steps() == [2, 3]

    def test_happens_on_a_thread_of_its_own_and_is_waited_for_by_drain(self, rig):
        gate = _Gate(rig.engine)
        rig.submit(1)
        gate.wait_until_reached()

        assert gate.thread_name == "stepguard-writer"
        assert rig.writer.busy
        assert not rig.writer.drain(0.01)
        gate.open()
        assert rig.writer.drain(SOON_SECS)
        assert not rig.writer.busy

    def test_that_its_framework_has_written_already_is_only_committed(self, rig):
        rig.store.root.mkdir()
        path = rig.store.root / "model.ckpt-7"
        path.mkdir()
        (path / "state.json").write_text("{}")

        rig.writer.submit(FakeSnapshot(7, (7,), written=str(path)))
        assert rig.writer.drain(SOON_SECS)

        assert rig.steps() == [7]
        assert rig.events.records == [("checkpointed", 7, str(path))]

    def test_without_a_store_is_only_recorded(self):
        events, errors = RecordedEvents(), []
        writer = CheckpointWriter(Committer(FakeEngine(), None, events), errors.append, retry=Backoff(60))
        writer.submit(FakeSnapshot(7, (7,), written="gs://bucket/model.ckpt-7"))
        assert writer.drain(SOON_SECS)

        assert events.records == [("checkpointed", 7, "gs://bucket/model.ckpt-7")]
        assert errors == []
        assert writer.close(SOON_SECS)

    def test_of_a_program_that_saves_by_itself_too_counts_all_checkpoints(self, make_rig):
        rig = make_rig(engine=KeepingEngine())
        rig.save(1)
        rig.save(2)
        rig.engine.kept = ["model.ckpt-2"]

        rig.save(3)

        # Number 1 was given up by the framework: it is no longer ours to remove.
        assert rig.steps() == [1, 2, 3]
        assert [Path(path).name for path, _ in rig.engine.told] == ["model.ckpt-2", "model.ckpt-3"]


class TestAFailingDisk:
    def test_is_tried_again_until_it_works(self, rig, caplog):
        rig.engine.fail_writes += [disk_error(), disk_error()]

        with caplog.at_level(logging.WARNING, "stepguard"):
            rig.save(3)

        assert rig.steps() == [3]
        assert rig.errors == []
        assert rig.stages() == []
        warnings = [record.getMessage() for record in caplog.records]
        assert len(warnings) == 2
        assert all("step 3" in one and "the disk is on fire" in one for one in warnings)

    def test_is_tried_again_less_and_less_often(self, rig, monkeypatch):
        waits: list[float] = []
        monkeypatch.setattr(rig.writer, "_may_wait", lambda wait_secs, *_: waits.append(wait_secs) or len(waits) < 12)
        rig.engine.fail_writes += [disk_error() for _ in range(12)]

        rig.save(3)

        for number, wait_secs in enumerate(waits):
            assert 0.75 * 0.01 * 2**number <= wait_secs <= 1.25 * 0.01 * 2**number
        assert len(set(waits)) == 12

    def test_does_not_make_a_save_wait_for_longer_than_a_minute(self, make_rig, monkeypatch):
        rig = make_rig(first_retry_secs=40.0)
        waits: list[float] = []
        monkeypatch.setattr(rig.writer, "_may_wait", lambda wait_secs, *_: waits.append(wait_secs) or len(waits) < 6)
        rig.engine.fail_writes += [disk_error() for _ in range(6)]

        rig.save(3)

        assert max(waits) <= 75

    def test_is_an_error_of_the_run_when_it_lasts_too_long(self, make_rig):
        rig = make_rig(max_unprotected_secs=0.05)
        rig.save(1)
        rig.engine.fail_writes += [disk_error() for _ in range(99)]

        rig.save(2)

        (error,) = rig.errors
        assert isinstance(error, SaveFailedError)
        assert error.path == rig.store.root
        assert str(error).startswith(f"{rig.store.root}: ")
        assert isinstance(error.__cause__, OSError)
        assert rig.steps() == [1]
        assert rig.stages() == []

    def test_has_until_the_end_of_the_grace_period_and_no_longer(self, make_rig):
        rig = make_rig(first_retry_secs=60.0)
        rig.engine.fail_writes += [disk_error()]
        rig.submit(1)
        wait_until(lambda: not rig.engine.fail_writes)

        # The next try, due in a minute, comes at once: this is the last chance.
        assert rig.writer.drain(SOON_SECS)

        assert rig.steps() == [1]
        assert rig.errors == []

    def test_that_an_earlier_wait_has_given_up_on_is_tried_again_for_the_next_snapshot(self, rig):
        rig.save(1)
        assert rig.writer.drain(0)
        rig.engine.fail_writes += [disk_error(), disk_error()]

        rig.submit(2)
        wait_until(lambda: not rig.writer.busy)

        assert rig.errors == []
        assert rig.steps() == [1, 2]

    def test_that_is_full_is_known_before_it_is_filled(self, rig, monkeypatch, caplog):
        rig.save(1)
        frees = [0, 1 << 40]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, free=frees.pop(0)))
        written: list[str] = []
        original = rig.engine.write
        rig.engine.write = lambda *arguments: written.append("once") or original(*arguments)  # type: ignore[method-assign]

        with caplog.at_level(logging.WARNING, "stepguard"):
            rig.save(2)

        assert written == ["once"]
        assert rig.steps() == [1, 2]
        assert "are free" in caplog.text

    def test_of_the_framework_is_known_by_its_own_errors(self, rig):
        class FrameworkDiskError(Exception):
            pass

        rig.engine.storage_error_types = (FrameworkDiskError,)
        writer = CheckpointWriter(
            Committer(rig.engine, rig.store), rig.errors.append, retry=Backoff(60, first_secs=0.01)
        )
        rig.engine.fail_writes += [FrameworkDiskError()]
        writer.submit(FakeSnapshot(3, (3,)))
        assert writer.drain(SOON_SECS)

        assert rig.steps() == [3]
        assert writer.close(SOON_SECS)

    def test_that_fails_its_framework_has_a_new_snapshot_taken_later(self, rig, caplog):
        rig.store.root.mkdir()
        failures = [disk_error()]

        def take() -> tuple[FakeSnapshot, float]:
            if failures:
                raise failures.pop()
            return written(rig, 8), 0.25

        with caplog.at_level(logging.WARNING, "stepguard"):
            assert rig.writer.retake(take, disk_error())
            assert not rig.writer.retake(take, disk_error())
            assert rig.writer.drain(SOON_SECS)

        assert rig.steps() == [8]
        assert rig.errors == []
        warnings = [record.getMessage() for record in caplog.records]
        assert len(warnings) == 2
        assert all("saving a checkpoint failed" in one and "the disk is on fire" in one for one in warnings)

    def test_that_fails_the_commit_of_what_its_framework_has_written_has_it_written_again(self, rig, monkeypatch):
        rig.store.root.mkdir()
        commit_in_place = rig.store.commit_in_place
        monkeypatch.setattr(rig.store, "commit_in_place", _raising_once(disk_error(), commit_in_place))

        rig.writer.submit(written(rig, 7), 0.0, lambda: (written(rig, 8), 0.0))
        assert rig.writer.drain(SOON_SECS)

        assert [one.step for one in rig.store.candidates() if one.is_committed] == [8]
        assert rig.errors == []

    def test_that_no_boundary_follows_is_tried_again_when_the_next_checkpoint_is_due(self, rig, caplog):
        def take() -> tuple[FakeSnapshot, float]:
            raise NoBoundaryError("a step is in the way")

        assert rig.writer.retake(take, disk_error())
        assert rig.writer.drain(SOON_SECS)
        rig.save(9)

        assert "checkpoint skipped: a step is in the way" in caplog.text
        assert rig.errors == []
        assert rig.steps() == [9]

    def test_that_never_takes_what_its_framework_writes_is_an_error_of_the_run(self, make_rig):
        rig = make_rig(max_unprotected_secs=0.05)

        def take() -> tuple[FakeSnapshot, float]:
            raise disk_error()

        rig.writer.retake(take, disk_error())
        assert rig.writer.drain(SOON_SECS)

        (error,) = rig.errors
        assert isinstance(error, SaveFailedError)
        assert isinstance(error.__cause__, OSError)

    def test_in_pruning_does_not_have_a_good_checkpoint_written_again(self, rig, monkeypatch):
        monkeypatch.setattr(rig.store, "prune", _raising_once(disk_error()))

        rig.save(3)

        assert rig.errors == []
        assert [record[0] for record in rig.events.records] == ["checkpointed"]


class TestAnErrorOfAnotherKind:
    def test_is_reported_at_once_and_the_writer_goes_on(self, rig):
        error = ZeroDivisionError("a bug")
        rig.engine.fail_writes += [error]

        rig.save(1)
        rig.save(2)

        assert rig.errors == [error]
        assert rig.steps() == [2]
        assert rig.stages() == []

    def test_leaves_a_snapshot_that_nobody_has_written_reported(self):
        errors: list[BaseException] = []
        writer = CheckpointWriter(Committer(FakeEngine(), None), errors.append, retry=Backoff(60))
        writer.submit(FakeSnapshot(7, (7,)))
        assert writer.drain(SOON_SECS)

        assert "step 7" in str(errors[0])
        assert writer.close(SOON_SECS)


class TestClosing:
    def test_waits_for_the_snapshot_that_is_being_written(self, rig):
        gate = _Gate(rig.engine)
        rig.submit(1)
        gate.wait_until_reached()
        closing = threading.Timer(0.05, gate.open)
        closing.start()

        assert rig.writer.close(SOON_SECS)

        assert rig.steps() == [1]
        closing.join()

    def test_gives_up_on_one_that_takes_longer_than_its_time(self, rig):
        gate = _Gate(rig.engine)
        rig.submit(1)
        gate.wait_until_reached()

        assert not rig.writer.close(0.05)

        gate.open()
        wait_until(lambda: not rig.writer.busy)

    def test_can_be_done_before_anything_and_again(self, rig):
        assert rig.writer.close(0)
        rig.save(1)
        assert rig.writer.close(SOON_SECS)
        assert rig.writer.close(SOON_SECS)

        assert rig.steps() == [1]

    def test_is_not_for_ever(self, rig):
        rig.save(1)
        assert rig.writer.close(SOON_SECS)

        rig.save(2)

        assert rig.steps() == [1, 2]

    def test_ends_its_thread_although_another_has_begun(self, rig):
        rig.writer.begin()
        with rig.writer._wake:  # As a thread of the program that trains on while the run is closed.
            closed, rig.writer._thread = rig.writer._thread, None
            rig.writer._start()
            rig.writer._wake.notify_all()
        closed.join(SOON_SECS)
        assert not closed.is_alive()


class _Gate:
    """Keeps the engine's write waiting."""

    def __init__(self, engine: FakeEngine) -> None:
        self._original = engine.write
        self._reached, self._opened = threading.Event(), threading.Event()
        self.thread_name = ""
        engine.write = self._write  # type: ignore[method-assign]

    def _write(self, *arguments: Any) -> Any:
        self.thread_name = threading.current_thread().name
        self._reached.set()
        assert self._opened.wait(SOON_SECS)
        return self._original(*arguments)

    def wait_until_reached(self) -> None:
        assert self._reached.wait(SOON_SECS)

    def open(self) -> None:
        self._opened.set()


def _raising_once(error: Exception, then: Callable[..., Any] = list) -> Callable[..., Any]:
    errors = [error]

    def call(*arguments: Any, **named: Any) -> Any:
        if errors:
            raise errors.pop()
        return then(*arguments, **named)

    return call
