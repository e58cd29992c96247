"""The random states of a PyTorch process: Python's and NumPy's, and PyTorch's on the CPU and on CUDA.

A program passes its own generators as state (``Supervisor({"noise": generator, ...})``). The generators of a loader
and of its sampler are saved with the position in the data.
"""

from __future__ import annotations

import random
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

    def check(self, states: Mapping[str, Any]) -> None:
        """Raise an error of any type unless :meth:`restore` can take ``states``."""
        super().check(states)
        torch.Generator().set_state(states["torch"])
        if not all(isinstance(one, torch.Tensor) and one.dtype is torch.uint8 for one in states.get("cuda", ())):
            raise TypeError("expected the states of CUDA as bytes, found something else")

    def draw_seeds(self) -> dict[str, int]:
        """One number from each stream of the CPU. Those of CUDA go on: a loader rarely draws from them."""
        return {**super().draw_seeds(), "torch": int(torch.randint(2**62, ()))}

    def reseed(self, seeds: Mapping[str, int], name: str) -> None:
        """Begin each stream of the CPU anew from its own number and ``name``."""
        super().reseed(seeds, name)
        torch.default_generator.manual_seed(random.Random(f"{name}/{seeds['torch']}").getrandbits(63))

    def are_equal(self, states: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
        """Whether nothing was drawn between two captures."""
        return states.keys() == others.keys() and all(
            _equal(state, others[name]) if name in ("torch", "cuda") else state == others[name]
            for name, state in states.items()
        )


def _equal(state: Any, other: Any) -> bool:
    if isinstance(state, torch.Tensor):
        return torch.equal(state, other)
    return len(state) == len(other) and all(map(torch.equal, state, other))


STREAMS = TorchStreams()
"""The random streams of this process."""
