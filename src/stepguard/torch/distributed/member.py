"""A process of a PyTorch training, as the rendezvous sees it: what it adds to a checkpoint, and writes of it itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
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
from stepguard.torch.distributed.joint_write import answer_error, write_mine, write_process
from stepguard.torch.session import Session
from stepguard.words import listed


class TorchMember(SessionMember):
    """Holds what this process adds to the snapshot taken last. Without ``root`` it sees no logdir."""

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
        self._is_sharded = any(is_sharded(one.state()) for one in components)
        self._process: Mapping[str, Any] = {}
        self._part: Mapping[str, Any] = {}
        self._copies = CopyStreams({})
        # Who has to look at what this process saves, if anybody.
        self.watch: ValueWatch | None = None

    def take_state(self) -> int:
        """Random states and positions, and the parts of sharded objects."""
        session = self._torch_session
        copies = CopyStreams(session.training_streams)
        with session.boundary.hold("a checkpoint"), torch.no_grad():
            steps = session.boundary.steps
            state = {"global_step": session.global_step, **session.process_state.capture()}
            self._process = self._memory.copy("process", state, copies)
            if self._is_sharded:
                live = {one.name: one.state() for one in self._components}
                self._part = {
                    name: self._memory.copy(name, state, copies) for name, state in live.items() if is_sharded(state)
                }
            copies.close()
        self._copies = copies
        return steps

    def write_part(self, exchange: Exchange, place: str, held: AbstractContextManager[None]) -> None:
        """Write the file of this process, and its part of the sharded objects, into ``place`` below the logdir."""
        # Without a logdir of its own it does not see the chief's, and says so.
        directory = (self._root or Path()) / place
        try:
            with held:
                self._copies.finish()
                write_process(exchange, directory, self._process)
                if self._is_sharded:
                    write_mine(exchange, exchange.rank, directory, self._finite_part)
        except Exception as error:  # noqa: BLE001 - a thread's edge: the chief raises it
            answer_error(exchange, "process", error)
            if self._is_sharded:
                answer_error(exchange, "has", error)

    def _finite_part(self) -> Mapping[str, Any]:
        if self.watch is not None:
            _check_finite(self._part)
        return self._part


def _check_finite(states: Mapping[str, Any]) -> None:
    """Of what this process saves the chief sees nothing: an error here is one of the whole checkpoint."""
    names = [place for name, state in states.items() for place in non_finite(name, state)]
    if names:
        raise NonFiniteError(f"the state to be saved is not finite: {listed(names)}", step=None, names=names)
