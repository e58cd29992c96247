"""Lets the tests of this folder import ``harness``, ``departures`` and ``coordinators``."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("harness", "coordinators")


@pytest.fixture
def hold() -> Iterator[threading.Event]:
    """What stubborn threads wait for: set when the test ends."""
    event = threading.Event()
    yield event
    event.set()
