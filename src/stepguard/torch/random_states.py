"""The random states of a PyTorch process: Python's and NumPy's, and PyTorch's on the CPU and on CUDA.

A program passes its own generators as state (``Supervisor({"noise": generator, ...})``). The generators of a loader
and of its sampler are saved with the position in the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepguard.steps.random_streams import RandomStreams


class TorchStreams(RandomStreams):
    """Adds PyTorch's random states, as tensors."""

    def capture(self) -> dict[str, Any]:
        """The states, as tensors and plain values."""
        states = {**super().capture(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
        return states

    def restore(self, states: Mapping[str, Any]) -> None:
        """Continue the streams. States of devices that no longer exist are ignored."""
        super().restore(states)
        torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
                torch.cuda.set_rng_state(state, device)


STREAMS = TorchStreams()
"""The random streams of this process."""
