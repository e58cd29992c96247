"""One suite for every engine: each test takes the fixture ``engine`` and is run once for each of them.

An engine joins by one module ``programs_<name>.py`` beside this file, and one line below.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ENGINES = {
    "fake": ("programs_fake", "FakeUnderTest"),
    "jax": ("programs_jax", "JaxUnderTest"),
    "numpy": ("programs_numpy", "NumPyUnderTest"),
    "tensorflow": ("programs_tensorflow", "TensorFlowUnderTest"),
    "torch": ("programs_torch", "TorchUnderTest"),
}

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("programs", *(module for module, _ in ENGINES.values()))

from programs import EngineUnderTest, Gate, wait_until  # noqa: E402

_ready: dict[str, EngineUnderTest] = {}


@pytest.fixture(params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineUnderTest:
    """The engine under test. One run of it is over already: what a framework opens once for ever is open."""
    name = request.param
    if name not in _ready:
        module, kind = ENGINES[name]
        adapter = getattr(importlib.import_module(module), kind)()
        adapter.program(tmp_path_factory.mktemp("warm-up")).train(1)
        _ready[name] = adapter
    return _ready[name]


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate for the threads of one test."""
    one = Gate()
    yield one
    one.open()


@pytest.fixture(autouse=True)
def nothing_left_behind(engine: EngineUnderTest, tmp_path: Path) -> Iterator[None]:
    """After every test of the suite: no thread, no open file, nothing half-written that was not there before."""
    threads_before = set(threading.enumerate())
    files_before = _open_files()
    yield
    wait_until(
        lambda: not set(threading.enumerate()) - threads_before,
        f"the end of {[thread.name for thread in set(threading.enumerate()) - threads_before]}",
    )
    wait_until(lambda: not _open_files() - files_before, f"the closing of {_open_files() - files_before}")
    hidden = [
        os.path.join(directory, name)
        for directory, folders, files in os.walk(tmp_path)
        for name in [*folders, *files]
        if (name.startswith(".") and name not in (".stepguard.lock", ".stepguard.lease", ".stepguard.conditions"))
        or name.endswith(".tmp")
    ]
    assert hidden == []


def _open_files() -> set[tuple[int, str]]:
    return {(one.fd, one.path) for one in psutil.Process().open_files()}
