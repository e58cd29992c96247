"""Signs of life, and what is known of a process by the last one."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from stepguard.disk import files
from stepguard.watching import heartbeat
from stepguard.watching.heartbeat import LATE_SECS, Heartbeat


@pytest.fixture
def sleeper():
    """A process that waits, and is gone at the end."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def logdir(tmp_path):
    """A logdir that the chief has prepared."""
    heartbeat.prepare(tmp_path)
    return tmp_path


def of(process, **fields):
    """A heartbeat of another process, as it would be just now."""
    known = {"pid": process.pid, "process_start": heartbeat.process_start(process.pid), "time": time.time()}
    return Heartbeat("chief", **{**known, **fields})


def test_a_heartbeat_is_read_as_it_was_written(logdir):
    written = Heartbeat("worker-1", engine="fake", step=5, warnings=["slow"], last_checkpoint={"step": 4})
    heartbeat.write(logdir, written)
    assert heartbeat.read(logdir) == [written]
    assert written.time > 0
    assert heartbeat.read_one(logdir, "worker-1") == written
    assert heartbeat.read_one(logdir, "chief") is None


def test_a_logdir_that_was_cleared_has_heartbeats_again_and_one_that_is_gone_stays_so(logdir, tmp_path):
    shutil.rmtree(logdir / "heartbeats")
    heartbeat.write(logdir, Heartbeat("chief", step=5))
    assert [one.step for one in heartbeat.read(logdir)] == [5]
    with pytest.raises(FileNotFoundError):
        heartbeat.write(tmp_path / "gone", Heartbeat("chief"))
    assert not (tmp_path / "gone").exists()


def test_the_chief_is_the_first_of_all(logdir):
    for role in ("a", "worker-1", "chief"):
        heartbeat.write(logdir, Heartbeat(role))
    assert [one.role for one in heartbeat.read(logdir)] == ["chief", "a", "worker-1"]


def test_a_logdir_without_heartbeats_has_none(tmp_path):
    assert heartbeat.read(tmp_path) == []
    assert heartbeat.read(tmp_path / "missing") == []


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"{", b"[]", b"{}", b'"chief"', b"null"])
def test_a_damaged_heartbeat_is_passed_over(logdir, content):
    heartbeat.write(logdir, Heartbeat("chief"))
    (logdir / heartbeat.DIR_NAME / "worker-1.json").write_bytes(content)
    assert [one.role for one in heartbeat.read(logdir)] == ["chief"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"time": None},
        {"time": float("nan")},
        {"time": 10**400},
        {"started": "now"},
        {"step": "abc"},
        {"step": 4.5},
        {"pid": None},
        {"pid": True},
        {"last_checkpoint": "model.ckpt-4"},
        {"cadence": {"overhead": 0.01}},
        {"cadence": {"overhead": 0.01, "interval_secs": 4.0, "cost": None, "bytes_per_day": 5}},
        {"replay": "same"},
        {"replay": {"outcome": "same"}},
        {"replay": {"outcome": "same", "message": 5}},
        {"warnings": [1]},
        {"error": []},
    ],
)
def test_a_heartbeat_with_a_field_of_another_type_is_passed_over(logdir, wrong):
    heartbeat.write(logdir, Heartbeat("chief", step=3))
    heartbeat.write(logdir, Heartbeat("worker-1", step=3))
    path = logdir / heartbeat.DIR_NAME / "worker-1.json"
    assert [one.role for one in heartbeat.read(logdir)] == ["chief", "worker-1"]
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    assert [one.role for one in heartbeat.read(logdir)] == ["chief"]


def test_times_without_a_fraction_are_times(logdir):
    heartbeat.write(logdir, Heartbeat("chief", started=5))
    (found,) = heartbeat.read(logdir)
    assert found.started == 5


def test_a_pid_that_no_process_can_have_is_dead(logdir):
    assert heartbeat.state(Heartbeat("chief", pid=10**30, time=time.time())) == "dead"


def test_fields_of_a_later_version_are_passed_over(logdir):
    heartbeat.write(logdir, Heartbeat("chief", step=3))
    path = logdir / heartbeat.DIR_NAME / "chief.json"
    path.write_bytes(path.read_bytes().replace(b'"step"', b'"mood": "good", "step"'))
    (found,) = heartbeat.read(logdir)
    assert found.step == 3


def test_a_full_disk_is_told_and_leaves_the_one_before(logdir, monkeypatch):
    class FullDisk:
        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, descriptor, content):
            os.write(descriptor, bytes(content)[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    heartbeat.write(logdir, Heartbeat("chief", step=3))
    monkeypatch.setattr(files, "os", FullDisk())
    with pytest.raises(OSError, match="space"):
        heartbeat.write(logdir, Heartbeat("chief", step=4))
    (found,) = heartbeat.read(logdir)
    assert found.step == 3
    assert os.listdir(logdir / heartbeat.DIR_NAME) == ["chief.json"]


def test_a_new_chief_forgets_the_others_that_are_gone(logdir, sleeper):
    for role, process_start in (("chief", 1), ("worker-1", 1), ("worker-2", heartbeat.process_start(sleeper.pid))):
        beat = of(sleeper, process_start=process_start)
        beat.role = role
        heartbeat.write(logdir, beat)
    heartbeat.write(logdir, Heartbeat("worker-3", host="elsewhere", phase="stopped"))
    heartbeat.forget_the_gone(logdir, "chief")
    assert [one.role for one in heartbeat.read(logdir)] == ["chief", "worker-2"]


def test_a_process_that_writes_is_alive(sleeper):
    assert heartbeat.state(of(sleeper)) == "alive"


def test_a_process_that_writes_no_more_is_silent(sleeper):
    assert heartbeat.state(of(sleeper, time=time.time() - LATE_SECS - 1)) == "silent"


def test_a_process_that_was_killed_is_dead(sleeper):
    beat = of(sleeper)
    sleeper.kill()
    sleeper.wait()
    assert heartbeat.state(beat) == "dead"


def test_a_process_that_nobody_waited_for_is_dead(sleeper):
    beat = of(sleeper)
    os.kill(sleeper.pid, signal.SIGKILL)
    # Waited for without taking its end: it stays a zombie.
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    os.kill(sleeper.pid, 0)
    assert heartbeat.state(beat) == "dead"


def test_another_process_of_the_same_pid_is_not_it(sleeper):
    before = of(sleeper, process_start=heartbeat.process_start(sleeper.pid) - 1)
    assert heartbeat.state(before) == "dead"


def test_of_another_host_only_its_silence_is_seen(sleeper):
    sleeper.kill()
    sleeper.wait()
    now = time.time()
    there = of(sleeper, host="elsewhere", process_start=1, time=now)
    assert heartbeat.state(there, now) == "alive"
    assert heartbeat.state(there, now + LATE_SECS + 1) == "silent"


def test_what_has_said_that_it_stopped_is_stopped(sleeper):
    beat = of(sleeper, phase="stopped", reason="finished", time=0.0)
    sleeper.kill()
    sleeper.wait()
    assert heartbeat.state(beat) == "stopped"
