"""Small graphs and waits for the tests of the TensorFlow engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from stepguard.store import CheckpointStore

v1 = tf.compat.v1

# More than anything here takes on a busy machine, and less than anyone would wait.
SOON_SECS = 60.0


def wait_until(condition: Callable[[], object], what: str, *, within_secs: float = SOON_SECS) -> None:
    """Wait for ``condition``, or fail saying ``what`` did not come."""
    deadline = time.monotonic() + within_secs
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_secs:g} s"
        time.sleep(0.002)


def counting_step() -> Any:
    """A training step that raises ``w`` and the global step by one each."""
    w = v1.get_variable("w", [2], tf.float32, v1.zeros_initializer())
    with tf.control_dependencies([w.assign_add([1.0, 1.0])]):
        return v1.assign_add(v1.train.get_or_create_global_step(), 1).op


def committed(logdir: Path) -> list[int]:
    """The steps of the committed checkpoints, oldest first."""
    return sorted(one.step for one in CheckpointStore(logdir).candidates() if one.is_committed)
