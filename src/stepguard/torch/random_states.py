"""The random states of the process: Python's, NumPy's where it is loaded, PyTorch's on the CPU and on CUDA.

Those are the generators that a program uses when it names none. A generator of the program's own is saved as state
(``Supervisor({"noise": generator, ...})``); those of a loader and its sampler go with the position in the data.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def capture() -> dict[str, Any]:
    """The states, as tensors and plain values. Any thread."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    # A program that has not loaded NumPy has drawn nothing from it.
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, cached_gaussian = numpy.random.get_state()
        # No copy would be the generator's own memory, which goes on changing.
        states["numpy"] = (name, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached_gaussian)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore(states: dict[str, Any]) -> None:
    """Continue the streams that :func:`capture` has seen. Devices that are not there any more are passed over."""
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        import numpy as np

        name, keys, position, has_gauss, cached_gaussian = states["numpy"]
        np.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached_gaussian))
    if "cuda" in states and torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def preserved() -> Iterator[None]:
    """A block that draws as it likes, and leaves the streams as they were."""
    states = capture()
    try:
        yield
    finally:
        restore(states)
