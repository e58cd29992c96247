"""The session of a JAX program: that of every loop framework, with the state that each step replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stepguard.coordination.coordinator import Coordinator
from stepguard.jax.checkpoint.snapshot import Donations, HostMemory, take
from stepguard.jax.data.feeds import feed_of
from stepguard.jax.distributed.world import world
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
        super().__init__(coord, write_summary, _JaxProcessState(STREAMS, processes), gate=gate)
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


class _JaxProcessState(ProcessState):
    def new_feed(self, loader: Any) -> Feed:
        return feed_of(loader, self.streams)
