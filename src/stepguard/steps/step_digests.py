"""Digests what each step of a session is made of: its batch, the random states, the hyperparameters, the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stepguard.engine import StepTrace
from stepguard.steps.digests import AsBytes, array_bytes, digest, part_digests
from stepguard.steps.random_streams import RandomStreams

STATE_EVERY = 100
"""The state is digested at the first step of a session, and at each step whose number this divides."""

_SETTINGS_EVERY = 256


class StepDigests:
    """Tells a trace the digests of the steps of one session. For the training thread, inside a step.

    Args:
        trace: is told.
        streams: the random streams of the process.
        state: returns the state by part; by default it is not digested.
        settings: returns the hyperparameters by name; by default there are none.
        as_bytes: reads an array of the framework.
    """

    def __init__(
        self,
        trace: StepTrace,
        streams: RandomStreams,
        *,
        state: Callable[[], Mapping[str, Any]] | None = None,
        settings: Callable[[], Mapping[str, float]] | None = None,
        as_bytes: AsBytes = array_bytes,
    ) -> None:
        self._trace = trace
        self._streams = streams
        self._state = state
        self._settings = settings
        self._as_bytes = as_bytes
        self._known: Mapping[str, float] | None = None
        # What the step begins with, until it is known to have a batch.
        self._begun: dict[str, int] = {}

    def begin_step(self, step: int) -> None:
        """Digest what the step begins with, before its batch is fetched."""
        self._begun = {"random": digest(self._streams.capture(), self._as_bytes)}
        if self._state is not None and (self._known is None or step % STATE_EVERY == 0):
            for name, part in self._state().items():
                self._begun[f"state {name}"] = digest(part, self._as_bytes)

    def tell(self, step: int, epochs: int, batch: Any = None, source: str = "") -> None:
        """Tell the trace what the step begins with, and the digests of its batch, which the program has not seen yet.

        Called again for each other batch of the step. ``source`` names the loader; without one there is no batch.
        """
        found, self._begun = self._begun, {}
        if source:
            found.update(part_digests("batch", batch, self._as_bytes))
        if found:
            self._trace.digests(step, epochs, found, source=source)
        settings = {} if self._settings is None else self._settings()
        if settings and (settings != self._known or step % _SETTINGS_EVERY == 0):
            self._trace.settings(step, epochs, settings)
        self._known = settings
