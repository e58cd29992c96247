"""Tells a trace what the runs of a session that train are: the scalars that they return, and what they are fed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepguard.engine import StepTrace
from stepguard.steps.digests import array_bytes, digest
from stepguard.steps.random_streams import RandomStreams
from stepguard.tensorflow.boundary import Boundary
from stepguard.tensorflow.scalars import of_run

_MOST_FEEDS = 16


class RunTrace:
    """Counts the runs that train, because asking for the global step would cost a run of its own. Any thread.

    The count begins at the global step. Where a step has several runs, or a run raises the global step by more than
    one, the two part; :meth:`saved` tells the trace where a checkpoint belongs.
    """

    def __init__(self, trace: StepTrace, boundary: Boundary, step: int) -> None:
        self._trace = trace
        self._boundary = boundary
        self._wants_digests = trace.wants_digests
        self._streams = RandomStreams()
        self._before = 0
        self.count_from(step)

    def count_from(self, step: int) -> None:
        """The next run is the first one after the global step ``step``."""
        self._before = step - self._boundary.steps

    def ran(self, fetches: Any, result: Any, feeds: Any) -> None:
        """Tell of a run that has just ended."""
        step = self._before + self._boundary.steps - 1
        if self._wants_digests:
            self._trace.digests(step, 0, self._digests(feeds), source="the feeds" if feeds else "")
        if result is not None:
            self.report(of_run(fetches, result), step)

    def report(self, numbers: Mapping[str, float], step: int | None = None) -> None:
        """Tell of numbers that the program has computed: those of ``step``, by default between two runs."""
        if numbers:
            now = self._before + self._boundary.steps
            self._trace.numbers(now if step is None else step, 0, numbers, is_inside=step is not None)

    def saved(self, checkpoint_step: int) -> None:
        """Tell that a checkpoint is being taken. Inside the boundary."""
        self._trace.saved(self._before + self._boundary.steps, checkpoint_step)

    def _digests(self, feeds: Any) -> dict[str, int]:
        """Digests of Python's and NumPy's random states, and of what was fed."""
        found = {"random": digest(self._streams.capture(), array_bytes)}
        for key, value in list((feeds or {}).items())[:_MOST_FEEDS]:
            found[f"batch[{getattr(key, 'name', key)}]"] = digest(value, array_bytes)
        return found
