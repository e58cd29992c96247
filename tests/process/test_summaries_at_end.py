"""What a program has written to its event file is there after a signal, also when it never stops its Supervisor."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import tensorflow as tf
from zygote import Zygote, wait_until


def curves(logdir: Path) -> dict[str, list[int]]:
    """The steps of each curve in the event files."""
    found: dict[str, list[int]] = {}
    for path in logdir.glob("events.out.tfevents.*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found


def written(logdir: Path) -> bytes:
    """What stands in the event files now, perhaps in the middle of a record."""
    return b"".join(path.read_bytes() for path in logdir.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_graceful_stop_writes_all_summaries(tensorflow_children: Zygote, tmp_path: Path, number: int) -> None:
    child = tensorflow_children.start("summarises", logdir=str(tmp_path), is_managed=True)
    child.wait_for("wrote")
    child.send(number)
    assert child.wait() == -number
    found = curves(tmp_path)
    assert found["computed"] == list(range(1, 51))
    assert found["own"] == list(range(1, 51))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_session_that_nobody_stops_leaves_its_summaries(
    tensorflow_children: Zygote, tmp_path: Path, number: int
) -> None:
    child = tensorflow_children.start("summarises", logdir=str(tmp_path), is_managed=False)
    child.wait_for("wrote")
    if number != signal.SIGINT:
        # Outside a block SIGTERM kills at once, as SIGKILL does: the thread of the writer needs a moment for the last
        # events, and no flush is asked for. Ctrl-C is an exception, and the exit of the interpreter flushes.
        wait_until(lambda: written(tmp_path).count(b"own") == 50, "the last event")
    child.send(number)
    assert child.wait() == -number
    found = curves(tmp_path)
    assert found["computed"] == list(range(1, 51))
    assert found["own"] == list(range(1, 51))
