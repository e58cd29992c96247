"""Disks that are full, read-only, slow, failing or gone, while training goes on."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import breaks
import psutil
import pytest
import tensorflow as tf
from model import Model, read, wrong
from mounts import MEGABYTE, Mount, mounted
from zygote import Zygote, wait_until

from stepguard.errors import LogdirInUseError, SaveFailedError
from stepguard.options import Saving
from stepguard.saving.commit import Committer
from stepguard.saving.retry import Backoff
from stepguard.saving.writer import CheckpointWriter
from stepguard.store import CheckpointStore
from stepguard.tensorflow import Supervisor, events
from stepguard.testing import FakeEngine, FakeSession
from stepguard.watching import heartbeat, ledger

v1 = tf.compat.v1

NOBODY = 65534
MODEL_MEGABYTES = 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mount]:
    with mounted(tmp_path / "disk") as mount:
        yield mount


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first retry after a twentieth of a second."""
    assert Backoff.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(Backoff.__init__.__kwdefaults__, "first_secs", 0.05)


class Run:
    """A TensorFlow program in training; a checkpoint every tenth of a second."""

    def __init__(self, logdir: Path, **options: Any) -> None:
        self.logdir = logdir
        graph = tf.Graph()
        with graph.as_default():
            self.model = Model(megabytes=MODEL_MEGABYTES)
            self.sv = Supervisor(
                logdir=str(logdir),
                saver=v1.train.Saver(max_to_keep=2),
                **{"save_model_secs": 0.1, "save_summaries_secs": 0, "summary_writer": None, **options},
            )
        self.session: Any = None

    def train_until(self, condition: Callable[[], Any], what: str) -> Any:
        """Train, and so show that training goes on, until something has come about."""

        def step_and_look() -> Any:
            self.session.run(self.model.train_op)
            return condition()

        return wait_until(step_and_look, what)

    def committed(self) -> list[int]:
        found = CheckpointStore(self.logdir).candidates()
        return [one.step for one in found if one.is_committed and one.step is not None]

    def train_until_saved(self) -> int:
        """Train until another checkpoint is there; its step."""
        before = self.committed()[:1]
        return int(self.train_until(lambda: self.committed()[:1] != before and self.committed(), "a checkpoint")[0])


def warned_of_failure(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        one.getMessage()
        for one in caplog.records
        if one.name.startswith("stepguard") and one.levelno >= logging.WARNING and "fail" in one.getMessage()
    ]


def assert_whole(logdir: Path, step: int) -> None:
    state = read(logdir / f"model.ckpt-{step}")
    assert wrong(step, state) == []


def leftovers(logdir: Path) -> list[str]:
    return [
        str(one.relative_to(logdir))
        for one in logdir.rglob("*")
        if one.name.startswith(".") and one.name != ".stepguard.lock"
    ]


@pytest.mark.usefixtures("quick_retries")
class TestAFullDisk:
    def test_does_not_stop_training_and_the_save_is_retried(
        self, disk: Mount, caplog: pytest.LogCaptureFixture
    ) -> None:
        run = Run(disk.path / "run")
        with run.sv.managed_session() as run.session:
            run.train_until_saved()
            run.train_until(lambda: disk.fill() and len(warned_of_failure(caplog)) >= 2, "two warnings")
            before = run.committed()
            for step in before:
                assert_whole(run.logdir, step)
            assert all("No space left" in one for one in warned_of_failure(caplog))
            disk.fill().unlink()
            saved = run.train_until_saved()
            assert saved > before[0]
            assert_whole(run.logdir, saved)
        assert leftovers(run.logdir) == []
        # The end of the run, with all of it.
        (last, *_) = run.committed()
        assert_whole(run.logdir, last)

    def test_that_fills_up_in_the_middle_of_a_save_is_left_as_it_was(
        self, disk: Mount, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Other programs fill the disk after the look at what is free.
        monkeypatch.setattr(Committer, "_check_space", lambda *_: None)
        run = Run(disk.path / "run")
        with run.sv.managed_session() as run.session:
            run.train_until_saved()
            half = MODEL_MEGABYTES / 2
            run.train_until(lambda: disk.fill(half) and len(warned_of_failure(caplog)) >= 2, "two warnings")
            for step in run.committed():
                assert_whole(run.logdir, step)
            wait_until(lambda: disk.free_bytes() >= 0.9 * half * MEGABYTE, "the removal of what was written in vain")
            disk.fill().unlink()
            assert_whole(run.logdir, run.train_until_saved())
        assert leftovers(run.logdir) == []

    def test_for_longer_than_the_run_may_be_unprotected_stops_it(self, disk: Mount) -> None:
        run = Run(disk.path / "run", saving=Saving(max_unprotected_secs=0.3))

        def train_onto_a_full_disk() -> None:
            with run.sv.managed_session() as run.session:
                run.train_until_saved()
                run.train_until(lambda: disk.fill() and run.sv.should_stop(), "the stop")

        with pytest.raises(SaveFailedError) as caught:
            train_onto_a_full_disk()
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ENOSPC
        assert caught.value.path == run.logdir
        for step in run.committed():
            assert_whole(run.logdir, step)
        assert run.committed()
        assert leftovers(run.logdir) == []

    def test_before_the_first_checkpoint_is_waited_for(self, disk: Mount, caplog: pytest.LogCaptureFixture) -> None:
        filler = disk.fill(leave_megabytes=0.5)
        run = Run(disk.path / "run")
        with run.sv.managed_session() as run.session:
            run.train_until(lambda: warned_of_failure(caplog), "a warning")
            assert run.committed() == []
            filler.unlink()
            assert_whole(run.logdir, run.train_until_saved())

    def test_with_the_event_file_on_it_does_not_stop_training_either(
        self, disk: Mount, caplog: pytest.LogCaptureFixture
    ) -> None:
        run = Run(disk.path / "run", summary_writer=Supervisor.USE_DEFAULT, save_summaries_secs=0.05)
        with run.sv.managed_session() as run.session:
            run.train_until_saved()
            run.train_until(lambda: disk.fill() and len(warned_of_failure(caplog)) >= 2, "two warnings")
            disk.fill().unlink()
            assert_whole(run.logdir, run.train_until_saved())


@pytest.mark.usefixtures("quick_retries")
class TestARestartOnAFullDisk:
    def test_trains_and_saves_and_opens_its_event_log_when_there_is_room(
        self, disk: Mount, caplog: pytest.LogCaptureFixture
    ) -> None:
        logdir = disk.path / "run"
        first = Run(logdir, summary_writer=Supervisor.USE_DEFAULT, save_summaries_secs=0.05)
        with first.sv.managed_session() as first.session:
            first.train_until_saved()
        (logdir / "graph.pbtxt").unlink()
        logs = sorted(logdir.glob("*tfevents*"))
        disk.fill()

        second = Run(logdir, summary_writer=Supervisor.USE_DEFAULT, save_summaries_secs=0.05)
        with second.sv.managed_session() as second.session:
            second.train_until(lambda: len(warned_of_failure(caplog)) >= 2, "two failed saves")
            assert "the event log in" in caplog.text
            assert "graph.pbtxt is written at the next checkpoint" in caplog.text
            disk.fill().unlink()
            second.train_until_saved()
            second.train_until((logdir / "graph.pbtxt").exists, "the graph")
            new = second.train_until(
                lambda: [one for one in sorted(logdir.glob("*tfevents*")) if one not in logs and one.stat().st_size],
                "a log",
            )
        records = [event for path in new for event in v1.train.summary_iterator(str(path))]
        assert any(one.HasField("session_log") and one.session_log.status == v1.SessionLog.START for one in records)
        assert any(one.HasField("graph_def") for one in records)
        assert not list(logdir.glob("graph.pbtxt.tmp*"))

    def test_that_fills_up_between_the_look_and_the_opening_of_the_log_stops_no_start(
        self, disk: Mount, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        logdir = disk.path / "run"
        first = Run(logdir)
        with first.sv.managed_session() as first.session:
            first.train_until_saved()
        disk.fill()
        monkeypatch.setattr(events, "_no_room", lambda logdir: None)
        second = Run(logdir, summary_writer=Supervisor.USE_DEFAULT)
        with second.sv.managed_session() as second.session:
            assert "the event log in" in caplog.text
            disk.fill().unlink()
            second.train_until_saved()

    def test_keeps_ledger_heartbeat_and_lock_for_later(self, disk: Mount) -> None:
        logdir = disk.path / "run"
        logdir.mkdir()
        disk.fill()
        run = Run(logdir, summary_writer=None)
        with run.sv.managed_session() as run.session:
            for _ in range(5):
                run.session.run(run.model.train_op)
            disk.fill().unlink()
            run.train_until_saved()
        events = [one["event"] for one in ledger.read(logdir)]
        assert events[0] == "start"
        assert events[-1] == "stop"
        (beat,) = heartbeat.read(logdir)
        assert beat.phase == "stopped"


@pytest.mark.usefixtures("quick_retries")
class TestALogdirThatCannotBeWritten:
    def test_any_more_for_a_while_is_written_to_again_afterwards(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """``chattr +i`` binds root as well, as permissions do not."""
        run = Run(tmp_path / "run")
        with run.sv.managed_session() as run.session:
            run.train_until_saved()
            if subprocess.run(["chattr", "+i", str(run.logdir)], check=False, capture_output=True).returncode:
                pytest.skip("a directory cannot be made immutable here")
            try:
                run.train_until(lambda: len(warned_of_failure(caplog)) >= 2, "two warnings")
                for step in run.committed():
                    assert_whole(run.logdir, step)
            finally:
                subprocess.run(["chattr", "-i", str(run.logdir)], check=True)
            assert_whole(run.logdir, run.train_until_saved())
        # What could not be removed just then, an empty directory, the next chief removes.
        with CheckpointStore(run.logdir).acquire():
            CheckpointStore(run.logdir).sweep()
        assert leftovers(run.logdir) == []

    @pytest.fixture
    def open_to_all(self) -> Iterator[Path]:
        """A place that another user can reach; the test's own directory is not."""
        if os.geteuid() != 0:
            pytest.skip("only root can run a program as another user")
        place = Path(tempfile.mkdtemp())
        place.chmod(0o755)
        yield place
        shutil.rmtree(place)

    def test_by_this_user_is_an_error_before_training(self, fake_children: Zygote, open_to_all: Path) -> None:
        logdir = open_to_all / "run"
        logdir.mkdir(mode=0o755)
        child = fake_children.start("train", logdir=str(logdir), uid=NOBODY)

        assert child.wait() == 1
        assert "PermissionError" in child.output
        assert str(logdir) in child.output
        assert child.reports("start") == []
        assert list(logdir.iterdir()) == []

    def test_because_of_files_of_another_user_is_gone_on_with_where_a_directory_is_shared(
        self, fake_children: Zygote, open_to_all: Path
    ) -> None:
        """As after a first run by root in a container."""
        logdir = open_to_all / "run"
        first = fake_children.start("train", logdir=str(logdir))
        first.wait_for("saved")
        first.kill()
        logdir.chmod(0o777)
        child = fake_children.start("train", logdir=str(logdir), uid=NOBODY)
        child.wait_for("saved")

        with pytest.raises(LogdirInUseError):
            CheckpointStore(logdir).acquire()
        child.kill()

    def test_by_this_user_any_more_is_retried(self, fake_children: Zygote, open_to_all: Path) -> None:
        logdir = open_to_all / "run"
        logdir.mkdir()
        os.chown(logdir, NOBODY, NOBODY)
        child = fake_children.start("train", logdir=str(logdir), uid=NOBODY)
        child.wait_for("saved")

        logdir.chmod(0o555)

        wait_until(
            lambda: any("fail" in one["text"] and "ermission" in one["text"] for one in child.reports("warning")),
            "the warning",
        )
        saved = len(child.reports("saved"))
        logdir.chmod(0o755)
        child.wait_for("saved", count=saved + 2)
        child.kill()

    def test_because_its_mount_has_vanished_is_retried_until_it_is_back(
        self, disk: Mount, caplog: pytest.LogCaptureFixture
    ) -> None:
        run = Run(disk.path / "run")
        with run.sv.managed_session() as run.session:
            run.train_until_saved()
            disk.vanish()
            run.train_until(lambda: len(warned_of_failure(caplog)) >= 2, "two warnings")
            # The directory below belongs to another disk, which must not be filled in place of the one that is gone.
            assert list(disk.path.iterdir()) == []
            disk.come_back()
            (disk.path / "run").mkdir()
            assert_whole(run.logdir, run.train_until_saved())


class Save:
    """Saves of a fake engine through the real writer and the real store."""

    def __init__(self, logdir: Path) -> None:
        self.store = CheckpointStore(logdir, engine="fake", max_to_keep=2)
        self.engine = FakeEngine(self.store, size=8)
        self.session: FakeSession = self.engine.prepare().session
        self.errors: list[BaseException] = []
        self.writer = CheckpointWriter(
            Committer(self.engine, self.store), self.errors.append, retry=Backoff(60, first_secs=0.002)
        )

    def save(self) -> int:
        self.session.run_step()
        self.writer.submit(self.engine.snapshot(self.session))
        assert self.writer.drain(60)
        return self.session.step


def calls_of_a_save(logdir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the third of three saves, with its pruning."""
    counting = breaks.BreakingOs(breaks.wait(0), at=None)
    breaks.put_under_files(counting, monkeypatch.setattr)
    one = Save(logdir)
    one.save()
    one.save()
    counting.arm()
    one.save()
    one.writer.close(60)
    return counting.calls


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_an_error_at_any_call_of_a_save_is_survived_by_trying_again(
    number: int, memory_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = calls_of_a_save(memory_path / f"counted-{number}", monkeypatch)
    assert len(calls) >= 20
    for at in range(1, len(calls) + 1):
        failing = breaks.BreakingOs(breaks.fail(number), at=at)
        breaks.put_under_files(failing, monkeypatch.setattr)
        logdir = memory_path / f"{number}-{at}"
        one = Save(logdir)
        threads, open_files = threading.active_count(), psutil.Process().num_fds()
        one.save()
        one.save()
        caplog.clear()
        failing.arm()
        step = one.save()
        where = f"call {at}: {calls[at - 1]}"
        assert len(failing.calls) >= at, where
        saved = [each.step for each in one.store.candidates()]
        assert saved[:2] == [3, 2], where
        one.save()
        one.writer.close(60)

        assert one.errors == [], where
        # A step that is saved is not called unsaved because the state file, the last that is opened, could not be
        # written, or something old not be removed.
        assert bool(warned_of_failure(caplog)) == (at < len(calls) - calls[::-1].index("open")), where
        # What could not be removed then is removed now.
        assert [each.step for each in one.store.candidates()] == [4, 3], where
        again = CheckpointStore(logdir)
        if at >= failing.calls.index("rmdir") + 1:
            # What is cleared up after the commit is not worth a second try; the next chief finds it.
            with again.acquire():
                again.sweep()
        recovery = again.newest_good(quarantine=False)
        assert recovery.damaged == (), where
        assert recovery.checkpoint is not None
        assert recovery.checkpoint.step == step + 1 == 4, where
        assert leftovers(logdir) == [], where
        assert threading.active_count() <= threads, where
        assert psutil.Process().num_fds() <= open_files, where


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_errors_at_all_calls_from_any_one_on_leave_the_checkpoints_before_as_they_were(
    number: int, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails for good in the middle of a save, so nothing can be cleared up either."""
    calls = calls_of_a_save(memory_path / f"counted-for-good-{number}", monkeypatch)
    for at in range(1, len(calls) + 1):
        failing = breaks.BreakingOs(breaks.fail(number), at=at, onwards=True)
        breaks.put_under_files(failing, monkeypatch.setattr)
        logdir = memory_path / f"for-good-{number}-{at}"
        one = Save(logdir)
        one.writer._retry = Backoff(0.005, first_secs=0.002)
        one.save()
        one.save()
        failing.arm()
        one.save()
        one.writer.close(60)

        where = f"call {at}: {calls[at - 1]}"
        breaks.put_under_files(os, monkeypatch.setattr)
        again = CheckpointStore(logdir)
        before = again.newest_good(quarantine=False)
        assert before.damaged == (), where
        assert before.checkpoint is not None
        assert before.checkpoint.step in (2, 3), where
        # The next chief clears up, finishes the save if every byte of it is there, and goes on.
        with again.acquire():
            again.sweep()
        assert leftovers(logdir) == [], where
        recovery = again.newest_good(quarantine=False)
        assert recovery.damaged == (), where
        assert recovery.checkpoint is not None
        assert before.checkpoint.step <= recovery.checkpoint.step <= 3, where
        next_run = Save(logdir)
        assert next_run.session.step == recovery.checkpoint.step
        assert next_run.save() == recovery.checkpoint.step + 1
        next_run.writer.close(60)


def test_a_disk_that_is_slow_at_every_call_delays_a_save_and_not_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = breaks.BreakingOs(breaks.wait(0.06), at=None, every=True)
    breaks.put_under_files(slow, monkeypatch.setattr)
    run = Run(tmp_path / "run", save_model_secs=0.01)
    # Of one of the saves: a machine has pauses of its own. A save that the steps wait for is one long step each time.
    longest_share = 1.0
    with run.sv.managed_session() as run.session:
        run.train_until_saved()
        slow.arm()
        for number in range(10):
            before = run.committed()[:1]
            began = time.monotonic()
            longest_secs = 0.0
            while run.committed()[:1] == before:
                step_began = time.monotonic()
                run.session.run(run.model.train_op)
                longest_secs = max(longest_secs, time.monotonic() - step_began)
                assert time.monotonic() < began + 60
            save_secs = time.monotonic() - began
            if number == 0:  # It may have begun before the disk was slow.
                continue
            assert save_secs > 0.9, "twenty calls and more, of 60 ms each"
            longest_share = min(longest_share, longest_secs / save_secs)
            if longest_share < 0.5:
                break
    # A step of a few milliseconds, and a copy of 2 MB.
    assert longest_share < 0.5
    assert_whole(run.logdir, run.committed()[0])
