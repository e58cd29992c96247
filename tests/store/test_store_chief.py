"""The chief's lock, with real processes."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from stores import ENVIRONMENT, good_of, names_in, open_store, put, save, tensorflow_content

from stepguard.errors import (
    LogdirInUseError,
)

CHIEF = r"""
import os, signal, sys, time
from stepguard.store import CheckpointStore
hold = CheckpointStore(sys.argv[1]).acquire()
if "fork" in sys.argv:
    child = os.fork()
    if child == 0:
        os.write(1, f"child {os.getpid()}\n".encode())
        signal.pause()
os.write(1, f"chief {os.getpid()}\n".encode())
if "forget" in sys.argv:
    del hold
    os.write(1, b"forgotten\n")
sys.stdin.readline()
"""


class Chief:
    """Another process that holds the lock of a logdir."""

    def __init__(self, logdir: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHIEF, str(logdir), *options],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.pids = {}
        for _ in range(2 if options else 1):
            words = self.process.stdout.readline().split()
            self.pids[words[0]] = int(words[-1]) if len(words) > 1 else 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait()


@pytest.fixture
def chief_of() -> Iterator[Callable[..., Chief]]:
    chiefs: list[Chief] = []

    def start(logdir: Path, *options: str) -> Chief:
        chiefs.append(Chief(logdir, *options))
        return chiefs[-1]

    yield start
    for chief in chiefs:
        chief.close()
        if "child" in chief.pids:
            os.kill(chief.pids["child"], signal.SIGKILL)


def test_a_second_process_is_told_who_is_chief(tmp_path: Path, chief_of: Callable[..., Chief]) -> None:
    before = time.time()
    chief = chief_of(tmp_path / "logdir")
    with pytest.raises(LogdirInUseError) as caught:
        open_store(tmp_path / "logdir").acquire()
    error = caught.value
    assert error.logdir == tmp_path / "logdir"
    assert error.pid == chief.pids["chief"]
    assert error.host == os.uname().nodename
    assert error.since is not None
    assert before - 1 <= error.since <= time.time() + 1
    assert str(error.pid) in str(error)
    assert error.__cause__ is None  # A traceback tells it once.
    chief.close()
    open_store(tmp_path / "logdir").acquire().release()


def test_two_stores_of_one_process_save_side_by_side(tmp_path: Path) -> None:
    stores = [open_store(tmp_path, basename=basename, max_to_keep=2) for basename in ("generator", "critic")]
    with ThreadPoolExecutor(len(stores)) as threads:
        for saving in [threads.submit(lambda store: [save(store, step) for step in range(50)], one) for one in stores]:
            saving.result()
    for store in stores:
        assert good_of(store).step == 49
        assert [one.step for one in store.owned] == [48, 49]
    assert {name for name in names_in(tmp_path) if name.startswith(".")} == set()


def test_what_a_kill_left_aside_is_swept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    left = {".checkpoint.123.tmp", ".model.ckpt-2.manifest.json.123.tmp", ".checkpoint.tmp"}
    for name in (*left, ".mine.tmp"):
        (tmp_path / name).touch()
    assert {path.name for path in store.sweep()} == left


def test_a_killed_chief_leaves_no_lock(tmp_path: Path, chief_of: Callable[..., Chief]) -> None:
    chief_of(tmp_path).kill()
    with open_store(tmp_path).acquire() as hold:
        assert hold.is_locked
        assert json.loads((tmp_path / ".stepguard.lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".stepguard.lock").read_bytes() == b""


def test_a_forked_child_that_survives_its_killed_chief_holds_no_lock(
    tmp_path: Path, chief_of: Callable[..., Chief]
) -> None:
    chief = chief_of(tmp_path, "fork")
    with pytest.raises(LogdirInUseError):
        open_store(tmp_path).acquire()
    chief.kill()
    os.kill(chief.pids["child"], 0)  # It is alive.
    open_store(tmp_path).acquire().release()


def test_a_hold_that_nobody_refers_to_is_given_back(tmp_path: Path, chief_of: Callable[..., Chief]) -> None:
    chief_of(tmp_path, "forget")
    open_store(tmp_path).acquire().release()


def test_stores_of_one_process_share_the_lock_in_turn_and_at_once(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    never_released = open_store(tmp_path).acquire()
    for _ in range(3):
        with open_store(tmp_path / ".").acquire():
            pass
    other = [sys.executable, "-c", CHIEF, str(tmp_path)]
    refused = subprocess.run(other, env=ENVIRONMENT, input="\n", text=True, capture_output=True, check=False)
    assert "LogdirInUseError" in refused.stderr
    # Opening and closing the lock file, as a copy of the logdir does, gives nothing away.
    (tmp_path / ".stepguard.lock").read_bytes()
    assert (
        subprocess.run(other, env=ENVIRONMENT, input="\n", text=True, capture_output=True, check=False).returncode == 1
    )
    del never_released
    assert (
        subprocess.run(other, env=ENVIRONMENT, input="\n", text=True, capture_output=True, check=False).returncode == 0
    )
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_logdir_that_was_removed_and_made_again_is_locked_anew(
    tmp_path: Path, chief_of: Callable[..., Chief]
) -> None:
    root = tmp_path / "logdir"
    old = open_store(root).acquire()
    (root / ".stepguard.lock").unlink()
    root.rmdir()
    chief_of(root)
    with pytest.raises(LogdirInUseError):
        open_store(root).acquire()
    old.release()


def clear(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def test_the_chief_of_a_logdir_that_was_cleared_locks_it_again_when_it_saves(
    tmp_path: Path, chief_of: Callable[..., Chief], caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "logdir"
    store = open_store(root, max_to_keep=3)
    hold = store.acquire()
    other = open_store(root, basename="other").acquire()
    save(store, 1)
    clear(root)
    save(store, 2)
    other_process = [sys.executable, "-c", CHIEF, str(root)]
    refused = subprocess.run(other_process, env=ENVIRONMENT, input="\n", text=True, capture_output=True, check=False)
    assert "LogdirInUseError" in refused.stderr
    assert "is locked again" in caplog.text
    assert [one.name for one in store.listed_by_state()] == ["model.ckpt-2"]
    assert [one.name for one in store.owned] == ["model.ckpt-2"]
    hold.release()
    other.release()
    chief_of(root)


def test_a_logdir_that_is_removed_while_a_run_trains_is_made_again_where_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "runs" / "logdir"
    store = open_store(root)
    hold = store.acquire()
    save(store, 1)
    shutil.rmtree(root)
    save(store, 2)
    assert good_of(store).step == 2
    assert hold.is_locked
    assert (root / ".stepguard.lock").exists()
    assert "made again" in caplog.text
    shutil.rmtree(root.parent)
    with pytest.raises(FileNotFoundError):
        save(store, 3)
    assert not root.parent.exists()
    hold.release()


def test_a_logdir_that_has_vanished_with_its_filesystem_is_not_made_on_the_one_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "logdir"
    store = open_store(root)
    hold = store.acquire()
    monkeypatch.setattr(store._logdir, "_device", -1)
    shutil.rmtree(root)
    with pytest.raises(FileNotFoundError):
        save(store, 1)
    assert not root.exists()
    hold.release()


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_save_after_another_process_has_become_chief_of_a_cleared_logdir_is_refused(
    moment: str, tmp_path: Path, chief_of: Callable[..., Chief]
) -> None:
    root = tmp_path / "logdir"
    store = open_store(root)
    hold = store.acquire()
    if moment == "while":
        put(store.stage("model.ckpt-1"), tensorflow_content("model.ckpt-1", ""))
        (root / ".stepguard.lock").unlink()
    else:
        clear(root)
    chief_of(root)
    with pytest.raises(LogdirInUseError):
        save(store, 1) if moment == "before" else store.commit("model.ckpt-1", 1)
    assert store.candidates() == []
    hold.release()
    assert not hold.renew()


def test_a_filesystem_without_locks_is_warned_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from stepguard.store import lock

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    assert lock.fcntl is not None
    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        hold = open_store(tmp_path).acquire()
    assert not hold.is_locked
    assert "only one process trains here" in caplog.text
    hold.release()
