"""What is no file under a name that TensorFlow itself opens: it costs a step back or a warning, and no start hangs."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from stepguard.errors import CheckpointCorruptError, NoGoodCheckpointError
from stepguard.options import Saving
from stepguard.store import statefile
from stepguard.tensorflow import SessionManager, Supervisor
from stepguard.tensorflow.checkpoint import tensors

v1 = tf.compat.v1

SOON_SECS = 60


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """End the process if a native call waits for ever: no exception could."""
    timer = threading.Timer(SOON_SECS, os.kill, (os.getpid(), signal.SIGKILL))
    timer.start()
    yield
    timer.cancel()


def start(logdir: Path, steps: int = 1) -> int:
    """Train for so many steps; return the step from which the run started, at which all values must be."""
    with tf.Graph().as_default():
        step = v1.train.get_or_create_global_step()
        x = v1.get_variable("x", [3], tf.int64, v1.zeros_initializer())
        train = tf.group(x.assign_add([1, 1, 1]), v1.assign_add(step, 1))
        sv = Supervisor(logdir=str(logdir), save_model_secs=0, save_summaries_secs=0, saving=Saving(save_at_end=True))
        with sv.managed_session() as session:
            began = int(session.run(step))
            assert list(session.run(x)) == [began] * 3
            for _ in range(steps):
                session.run(train)
    return began


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_directory(path: Path) -> None:
    path.mkdir()


def saved_by_tensorflow(logdir: Path, kept: bool) -> None:
    """Two runs, of which TensorFlow's own tools might have saved: without manifests."""
    start(logdir, 2)
    start(logdir, 2)
    for one in logdir.glob("*.manifest.json"):
        one.unlink()
    if not kept:
        (logdir / statefile.FILE_NAME).unlink()


@pytest.mark.parametrize("make", [a_fifo, a_device])
@pytest.mark.parametrize("name", ["model.ckpt-4.index", "model.ckpt-4.data-00000-of-00001"])
def test_a_checkpoint_without_a_manifest_is_damaged(
    make: Callable[[Path], None], name: str, tmp_path: Path, caplog: Any
) -> None:
    saved_by_tensorflow(tmp_path, kept=True)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        assert start(tmp_path) == 2
    assert f"{name}: expected a regular file" in caplog.text


@pytest.mark.parametrize("name", ["other-9.index", "model.ckpt-9.index", "model.ckpt.index", "model.ckpt-9"])
def test_a_fifo_that_looks_like_the_newest_checkpoint_stops_no_start(name: str, tmp_path: Path) -> None:
    start(tmp_path, 2)
    os.mkfifo(tmp_path / name)
    assert start(tmp_path) == 2


@pytest.mark.parametrize("make", [a_fifo, a_device, a_directory])
def test_a_state_file_that_is_none_is_no_hint_where_there_is_no_checkpoint_either(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / statefile.FILE_NAME)
    assert start(tmp_path) == 0
    assert start(tmp_path) == 1


def test_a_session_manager_without_a_supervisor_does_not_wait_at_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / statefile.FILE_NAME)
    with tf.Graph().as_default():
        x = v1.get_variable("x", [], initializer=v1.zeros_initializer())
        manager = SessionManager()
        session = manager.prepare_session(
            "", init_op=x.initializer, saver=v1.train.Saver(), checkpoint_dir=str(tmp_path)
        )
        assert session.run(x) == 0
        session.close()


def test_a_state_file_that_leads_to_a_fifo_elsewhere_is_refused_with_a_sentence(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.mkfifo(elsewhere / "model.ckpt-9.index")
    logdir = tmp_path / "logdir"
    logdir.mkdir()
    statefile.write(logdir, str(elsewhere / "model.ckpt-9"), [str(elsewhere / "model.ckpt-9")])
    with pytest.raises(NoGoodCheckpointError, match="expected a regular file"):
        start(logdir)


@pytest.mark.parametrize("make", [a_fifo, a_device, a_directory])
def test_a_graph_that_cannot_be_written_costs_a_warning(
    make: Callable[[Path], None], tmp_path: Path, caplog: Any
) -> None:
    make(tmp_path / "graph.pbtxt")
    with caplog.at_level(logging.WARNING):
        assert start(tmp_path) == 0
    # The others are replaced.
    assert ("graph.pbtxt is not written" in caplog.text) == (make is a_directory)
    assert not list(tmp_path.glob("graph.pbtxt.tmp*"))
    assert start(tmp_path) == 1


def test_a_directory_is_listed_once_for_all_of_its_checkpoints(tmp_path: Path, monkeypatch: Any) -> None:
    os.mkfifo(tmp_path / "model.ckpt-7.index")
    os.utime(tmp_path, (1_000_000, 1_000_000))
    listed = []
    scan = os.scandir
    monkeypatch.setattr(tensors.os, "scandir", lambda place: listed.append(place) or scan(place))
    for step in range(5):
        tensors.check_readable(str(tmp_path / f"model.ckpt-{step}"))
    with pytest.raises(CheckpointCorruptError, match="expected a regular file"):
        tensors.check_readable(str(tmp_path / "model.ckpt-7"))
    assert len(listed) == 1
