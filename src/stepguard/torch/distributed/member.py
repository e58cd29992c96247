"""One process of a distributed PyTorch training, as the rendezvous sees it: its part of the state, and writing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from stepguard.coordination.coordinator import Coordinator
from stepguard.engine import ValueWatch
from stepguard.errors import NonFiniteError
from stepguard.steps.gate import Moment
from stepguard.steps.member import SessionMember
from stepguard.steps.part_messages import PartMessages
from stepguard.torch.checkpoint.packed import unpacked
from stepguard.torch.checkpoint.sharded_tensors import is_sharded
from stepguard.torch.checkpoint.snapshot import CopyStreams, HostMemory, non_finite
from stepguard.torch.checkpoint.state import Component
from stepguard.torch.distributed.joint_write import answer_error, write_mine, write_process
from stepguard.torch.session import Session
from stepguard.words import listed


class TorchMember(SessionMember):
    """Holds the part of the last snapshot that belongs to this process. Without ``root`` the process has no logdir."""

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
        # The watch that must see the values that this process saves, if there is one.
        self.watch: ValueWatch | None = None

    def take_state(self) -> Moment:
        """Copy the random states, the positions in the data and this process's parts of sharded objects."""
        session = self._torch_session
        copies = CopyStreams(session.training_streams)
        with session.boundary.hold("a checkpoint"), torch.no_grad():
            moment = self.moment()
            state = {"global_step": session.global_step, **session.process_state.capture()}
            self._process = self._memory.copy("process", state, copies)
            if self._is_sharded:
                live = {one.name: one.state() for one in self._components}
                self._part = {
                    name: self._memory.copy(name, state, copies) for name, state in live.items() if is_sharded(state)
                }
            copies.close()
        self._copies = copies
        return moment

    def write_part(self, messages: PartMessages, place: str, held: AbstractContextManager[None]) -> None:
        """Write the file of this process, and its part of the sharded objects, into ``place`` below the logdir."""
        # Without a logdir this directory does not exist, and `write_process` reports that to the chief.
        directory = (self._root or Path()) / place
        try:
            with held:
                self._copies.finish()
                unpacked(self._process)
                write_process(messages, directory, self._process)
                if self._is_sharded:
                    write_mine(messages, messages.rank, directory, self._finite_part)
        except Exception as error:  # noqa: BLE001 - a thread's edge: the chief raises it
            answer_error(messages, "process", error)
            if self._is_sharded:
                answer_error(messages, "has", error)

    def _finite_part(self) -> Mapping[str, Any]:
        if self.watch is not None:
            _check_finite(self._part)
        return self._part


def _check_finite(states: Mapping[str, Any]) -> None:
    """Raise NonFiniteError if a value is not finite. The chief cannot see these values; the error ends its save too."""
    names = [place for name, state in states.items() for place in non_finite(name, state)]
    if names:
        raise NonFiniteError(f"the state to be saved is not finite: {listed(names)}", step=None, names=names)
