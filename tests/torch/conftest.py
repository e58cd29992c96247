"""The tests of the PyTorch engine; they are passed over where PyTorch is not installed."""

import gc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["*"]

sys.path.insert(0, str(Path(__file__).parent))
# For what breaks disks: its modules know no framework.
sys.path.append(str(Path(__file__).parent.parent / "process"))


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> Iterator[None]:
    """Have the garbage collector pass over what is there before: with all frameworks loaded, that takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
