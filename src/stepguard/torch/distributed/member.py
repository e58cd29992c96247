"""One process of a distributed PyTorch training, as the rendezvous sees it: its part of the state, and writing it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepguard.coordination.coordinator import Coordinator
from stepguard.disk.new_file import repeating
from stepguard.errors import NonFiniteError
from stepguard.steps.copying_budget import COPYING_SHARE, CopyingBudget
from stepguard.steps.gate import Moment
from stepguard.steps.member import SessionMember
from stepguard.steps.part_messages import PartMessages
from stepguard.torch.checkpoint.of_rank import OWN, SAMPLED, Samples, left_out, own_of
from stepguard.torch.checkpoint.packed import unpacked
from stepguard.torch.checkpoint.sharded_tensors import is_sharded
from stepguard.torch.checkpoint.snapshot import CopyStreams, HostMemories, HostMemory, non_finite
from stepguard.torch.checkpoint.state import Component
from stepguard.torch.distributed.joint_write import answer_error, write_mine, write_process
from stepguard.torch.session import Session
from stepguard.words import listed

_TORCH = os.path.join(os.path.dirname(torch.__file__), "")


@dataclass(frozen=True, slots=True)
class TorchPart:
    """A copy of the state of one process, and of its parts of the sharded objects, in memory of its own."""

    moment: Moment
    steps: int
    process: Mapping[str, Any]
    sharded: Mapping[str, Any]
    frozen: Mapping[str, Collection[str]]
    copies: CopyStreams
    samples: Samples | None


class TorchMember(SessionMember):
    """Takes and writes the part of a checkpoint that belongs to this process.

    Without ``root`` the process has no logdir. ``is_watched`` says whether the values that are saved must be finite,
    ``frozen_apart`` whether frozen parameters get a file of their own.
    """

    def __init__(
        self,
        coord: Coordinator,
        session: Session,
        components: Sequence[Component],
        root: Path | None,
        is_watched: Callable[[], bool],
        frozen_apart: bool,
    ) -> None:
        super().__init__(coord, session)
        self._torch_session = session
        self._components = components
        self._root = root
        # The memories, each with a weak reference to what belongs to the part in it.
        self._memories = HostMemories()
        self._is_sharded = any(is_sharded(one.state()) for one in components)
        self._is_watched = is_watched
        self._frozen_apart = frozen_apart
        # Spent before that of the parts at the ends of loops, which the checkpoints need.
        self._sampling = CopyingBudget(COPYING_SHARE / 2)
        # The directory that this process has written into last; it is a checkpoint if the chief has committed it.
        self._before: str | None = None

    def is_collective(self, file: str) -> bool:
        """Collective operations wait in PyTorch's own modules: those of DDP in the backward pass."""
        return file.startswith(_TORCH)

    def take_part(self) -> TorchPart:
        """Copy the random states, the positions in the data and this process's parts of sharded objects."""
        session = self._torch_session
        copies = CopyStreams(session.training_streams)
        memory = self._memories.free()
        with session.boundary.hold("a checkpoint"), torch.no_grad():
            moment, steps = self.moment(), self.steps_done()
            state = {"global_step": session.global_step, **session.process_state.capture()}
            own = own_of(self._components)
            process = {**memory.copy("process", {**state, OWN: own}, copies), "numpys": memory.numpys}
            live = {one.name: one.state() for one in self._components} if self._is_sharded else {}
            samples = self._sampled(own, memory, copies)
            sharded = {name: memory.copy(name, state, copies) for name, state in live.items() if is_sharded(state)}
            apart = [one for one in self._components if one.name in sharded] if self._frozen_apart else []
            frozen = {one.name: one.frozen() for one in apart}
            copies.close()
        self._memories.keep(memory, copies)
        return TorchPart(moment, steps, process, sharded, frozen, copies, samples)

    def _sampled(self, own: Mapping[str, Any], memory: HostMemory, copies: CopyStreams) -> Samples | None:
        """Samples of what is saved as rank 0 has it, unless short loops would feel it."""
        if not (self._sampling.costs_nothing or self._sampling.allows_one()):
            return None
        began = time.monotonic()
        states = {one.name: one.state() for one in self._components if not one.is_stream}
        samples = Samples(states, left_out(self._components, own), memory, copies)
        self._sampling.spend(time.monotonic() - began)
        return samples

    def write_part(self, messages: PartMessages, place: str, part: Callable[[], TorchPart]) -> None:
        """Write the file of this process, and its part of the sharded objects, into ``place`` below the logdir."""
        # Without a logdir this directory does not exist, and `write_process` reports that to the chief.
        directory = (self._root or Path()) / place
        try:
            mine = part()
            mine.copies.finish()
            unpacked(mine.process)
            sampled = {} if mine.samples is None else {SAMPLED: mine.samples.digests()}
            write_process(messages, directory, {**mine.process, **sampled})
            if self._is_sharded:
                before, self._before = self._before, directory.name
                with repeating(lambda path: self._earlier(path, before)):
                    write_mine(messages, messages.rank, directory, lambda: self._finite(mine.sharded), mine.frozen)
        except Exception as error:  # noqa: BLE001 - a thread's edge: the chief raises it
            answer_error(messages, "process", error)
            if self._is_sharded:
                answer_error(messages, "has", error)

    def _earlier(self, path: Path, before: str | None) -> Path | None:
        """The file that equals the one at ``path`` if that is of frozen parameters; see `repeating`."""
        if self._root is None or before is None or before == path.parent.name:
            return None
        return self._root / before / path.name

    def _finite(self, sharded: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._is_watched():
            _check_finite(sharded)
        return sharded


def _check_finite(states: Mapping[str, Any]) -> None:
    """Raise NonFiniteError if a value is not finite. The chief cannot see these values; the error ends its save too."""
    names = [place for name, state in states.items() for place in non_finite(name, state)]
    if names:
        raise NonFiniteError(f"the state to be saved is not finite: {listed(names)}", step=None, names=names)
