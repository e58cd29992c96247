"""Tests with real processes, signals and files."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from zygote import Zygote


@pytest.fixture(scope="module")
def memory_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in memory where there is one, for hundreds of small logdirs of which nothing must last."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("memory")
        return
    path = Path(tempfile.mkdtemp(prefix="stepguard-", dir=memory))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def fake_children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts processes that run functions of ``children_fake.py``."""
    zygote = Zygote(tmp_path_factory.mktemp("fake-children"), "children_fake")
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def tensorflow_children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts processes that run functions of ``children_tensorflow.py``."""
    zygote = Zygote(tmp_path_factory.mktemp("tensorflow-children"), "children_tensorflow")
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def jax_children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts processes that run functions of ``children_jax.py``."""
    zygote = Zygote(tmp_path_factory.mktemp("jax-children"), "children_jax")
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def torch_children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts processes that run functions of ``children_torch.py``."""
    zygote = Zygote(tmp_path_factory.mktemp("torch-children"), "children_torch")
    yield zygote
    zygote.close()
