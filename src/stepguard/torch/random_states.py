"""The random states of the process: those of every program, and PyTorch's on the CPU and on CUDA.

A generator of the program's own is saved as state (``Supervisor({"noise": generator, ...})``); those of a loader and
its sampler go with the position in the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepguard.steps.random_streams import RandomStreams


class TorchStreams(RandomStreams):
    """Adds PyTorch's own, as tensors."""

    def capture(self) -> dict[str, Any]:
        """The states, as tensors and plain values."""
        states = {**super().capture(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
        return states

    def restore(self, states: Mapping[str, Any]) -> None:
        """Continue the streams; devices that are not there any more are passed over."""
        super().restore(states)
        torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
                torch.cuda.set_rng_state(state, device)


STREAMS = TorchStreams()
"""Those of this process."""
