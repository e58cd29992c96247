"""What the tests of the TensorFlow engine share."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("graphs")


@pytest.fixture
def graph() -> Iterator[tf.Graph]:
    """A new graph, the default one while the test lasts."""
    with tf.Graph().as_default() as one:
        yield one


@pytest.fixture(autouse=True)
def no_thread_left_behind() -> Iterator[None]:
    from graphs import wait_until

    before = set(threading.enumerate())
    yield
    wait_until(lambda: not set(threading.enumerate()) - before, "the end of all threads")
