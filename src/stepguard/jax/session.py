"""The session of a JAX program: that of every loop framework, with the state that each step replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from stepguard.coordination.coordinator import Coordinator
from stepguard.jax.checkpoint.snapshot import Donations, HostMemory, take
from stepguard.jax.checkpoint.tree import nnx_objects
from stepguard.jax.data.feeds import feed_of
from stepguard.jax.distributed.world import world
from stepguard.jax.keys import StrangersOfJax, streams_in
from stepguard.steps.feeds import Feed
from stepguard.steps.gate import Gate
from stepguard.steps.process_state import ProcessState
from stepguard.steps.random_streams import RandomStreams
from stepguard.steps.session import Session as LoopSession
from stepguard.words import logger

_log = logger(__name__)

STREAMS = RandomStreams()
"""The random streams of this process: Python's and NumPy's. JAX's keys are values, and part of the state."""


class Session(LoopSession):
    """A run of a JAX program, from its start or restart to its stop.

    ``state`` is the state of the last step, and each step replaces it::

        sess.state, loss = train_step(sess.state, batch)

    It is any pytree. Objects that steps change in place, such as the modules of Flax nnx, are part of it too.
    ``global_step`` is the number of steps done; inside the first step it is 0. :meth:`steps` runs many steps,
    :meth:`step` runs one.
    """

    def __init__(
        self,
        state: Any,
        coord: Coordinator,
        write_summary: Callable[[Mapping[str, Any], int], Mapping[str, float] | None],
        *,
        gate: Gate | None = None,
        processes: int = 1,
    ) -> None:
        super().__init__(coord, write_summary, _JaxProcessState(STREAMS, processes, lambda: self.state), gate=gate)
        self.state = state
        """The state of the last step. The program replaces it in each step."""
        self._state_at_start: Any = None
        self.donations = Donations()
        """For the engine: which arrays the steps donate."""
        self.memory = HostMemory()
        """For the engine: memory for the copies of donated arrays."""

    def note_start(self) -> None:
        """For the engine: the state is that with which the program begins."""
        self._state_at_start = self.state
        begun = leaves_of(self.state)

        def note_work_before() -> None:
            self.process_state.note_work_before(changed_leaves(begun, leaves_of(self.state)), {}, {})

        self.call_before_loops(note_work_before)

    def _has_trained_outside(self) -> bool:
        return self.state is not self._state_at_start

    def _step_is_ending(self) -> None:
        was_known = self.donations.is_known
        problem = self.donations.after_step(self.state)
        if self.donations.names and not was_known:
            # The first copy makes the memory, so that each snapshot is as fast as the later ones.
            take(self.state, self.global_step, {}, self.donations, self.memory, world()[0])
        if problem is not None:
            _log.warning(
                "%s, so that checkpoints would hold a state that is not trained: assign the result of the step, as in "
                "`sess.state, loss = train_step(sess.state, batch)`",
                problem,
            )


def leaves_of(state: Any) -> dict[str, Any]:
    """The arrays and numbers of a state, by their places."""
    return {jax.tree_util.keystr(place): leaf for place, leaf in jax.tree_util.tree_leaves_with_path(state)}


def changed_leaves(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The places where there is another object than before."""
    return [place for place, leaf in now.items() if before.get(place) is not leaf]


class _JaxProcessState(ProcessState):
    # A restart could not give them back: the program may hold the whole state in a variable.
    saves_copies = False

    def __init__(self, streams: RandomStreams, processes: int, state: Callable[[], Any]) -> None:
        super().__init__(streams, processes)
        self._state = state
        self._put_back: dict[int, Any] = {}
        self.strangers = StrangersOfJax(self._leaves)

    def _leaves(self) -> dict[str, Any]:
        return leaves_of(self._state())

    def saved_generators(self) -> list[Any]:
        return streams_in(nnx_objects(self._state()))

    def copies_of(self, names: Sequence[str]) -> dict[str, Any]:
        leaves = self._leaves() if names else {}
        return {name: leaves[name] for name in names if name in leaves}

    def digest_of(self, value: Any) -> int:
        return id(value)

    def new_feed(self, loader: Any) -> Feed:
        return feed_of(loader, self.streams, self._put_back)
