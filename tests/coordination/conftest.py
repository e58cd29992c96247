"""Lets the tests of this folder import ``stopping_threads``, and gives them a coordinator and threads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stepguard.coordination.coordinator import Coordinator

if TYPE_CHECKING:
    from stopping_threads import Threads

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("stopping_threads")


@pytest.fixture
def coord() -> Coordinator:
    from stopping_threads import CutShortError, InputEndedError

    return Coordinator(clean_stop_exception_types=(InputEndedError,), late_noise_types=(CutShortError,))


@pytest.fixture
def threads() -> Iterator[Threads]:
    from stopping_threads import SOON_SECS, Threads

    some = Threads()
    yield some
    some.release.set()
    for thread in some.started:
        thread.join(SOON_SECS)
        assert not thread.is_alive(), f"{thread.name} outlives its test"
