"""The session of a PyTorch program: that of every loop framework, with PyTorch's loaders and streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from stepguard.coordination.coordinator import Coordinator
from stepguard.steps.feeds import Feed
from stepguard.steps.gate import Gate
from stepguard.steps.process_state import ProcessState
from stepguard.steps.session import Session as LoopSession
from stepguard.torch.data.feeds import feed_of
from stepguard.torch.random_states import STREAMS


class Session(LoopSession):
    """A run of a PyTorch program, from its start or restart to its stop.

    ``global_step`` is the number of steps done; inside the first step it is 0. :meth:`steps` runs many steps,
    :meth:`step` runs one.
    """

    def __init__(
        self,
        coord: Coordinator,
        write_summary: Callable[[Mapping[str, Any], int], None],
        *,
        gate: Gate | None = None,
        processes: int = 1,
    ) -> None:
        super().__init__(coord, write_summary, _TorchProcessState(STREAMS, processes), gate=gate)
        self._training_streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def training_streams(self) -> Mapping[torch.device, torch.cuda.Stream]:
        """The CUDA streams on which the last step was run."""
        return self._training_streams

    def _step_is_ending(self) -> None:
        if torch.cuda.is_initialized():
            stream = torch.cuda.current_stream()
            self._training_streams[stream.device] = stream


class _TorchProcessState(ProcessState):
    def new_feed(self, loader: Any) -> Feed:
        return feed_of(loader)
