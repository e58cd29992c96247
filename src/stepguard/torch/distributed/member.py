"""A process of a PyTorch training, as the rendezvous sees it: what it adds to a checkpoint, and writes of it itself."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stepguard.coordination.coordinator import Coordinator
from stepguard.engine import ValueWatch
from stepguard.errors import NonFiniteError
from stepguard.steps.exchange import Exchange
from stepguard.steps.member import SessionMember
from stepguard.torch.checkpoint.sharded_tensors import is_sharded
from stepguard.torch.checkpoint.snapshot import CopyStreams, HostMemory, non_finite
from stepguard.torch.checkpoint.state import Component
from stepguard.torch.distributed.joint_write import write_mine
from stepguard.torch.session import Session
from stepguard.words import listed


class TorchMember(SessionMember):
    """Holds what this process has of the snapshot taken last. Without ``root`` it sees no logdir."""

    def __init__(
        self,
        coord: Coordinator,
        session: Session,
        components: Sequence[Component],
        memory: HostMemory,
        root: Path | None,
    ) -> None:
        super().__init__(coord, session)
        self._torch_session = session
        self._components = components
        self._memory = memory
        self._root = root
        self._part: Mapping[str, Any] = {}
        self._copies = CopyStreams({})
        # Who has to look at what this process saves, if anybody.
        self.watch: ValueWatch | None = None

    def process_state(self) -> bytes:
        """Random states and positions; the parts of sharded objects are copied, to be written when asked for."""
        session = self._torch_session
        with session.boundary.hold("a checkpoint"):
            self._copy_part()
            buffer = io.BytesIO()
            torch.save(session.process_state.capture(), buffer)
        return buffer.getvalue()

    def _copy_part(self) -> None:
        copies = CopyStreams(self._torch_session.training_streams)
        with torch.no_grad():
            live = {one.name: one.state() for one in self._components}
            self._part = {
                name: self._memory.copy(name, state, copies) for name, state in live.items() if is_sharded(state)
            }
            copies.close()
        self._copies = copies

    def write_part(self, exchange: Exchange, place: str) -> None:
        """Write this process's part of the sharded objects into ``place`` below the logdir."""
        # Without a logdir of its own it does not see the chief's, and says so.
        write_mine(exchange, exchange.rank, (self._root or Path()) / place, self._finished_part)

    def _finished_part(self) -> Mapping[str, Any]:
        self._copies.finish()
        if self.watch is not None:
            _check_finite(self._part)
        return self._part


def loaded_process_state(content: bytes) -> dict[str, Any]:
    """What another process has given as its :meth:`TorchMember.process_state`."""
    return dict(torch.load(io.BytesIO(content), weights_only=True))


def _check_finite(states: Mapping[str, Any]) -> None:
    """Of what this process saves the chief sees nothing: an error here is one of the whole checkpoint."""
    names = [place for name, state in states.items() for place in non_finite(name, state)]
    if names:
        raise NonFiniteError(f"the state to be saved is not finite: {listed(names)}", step=None, names=names)
