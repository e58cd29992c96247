"""Tells a trace what the runs of a session that train are: the scalars that they return, and what they are fed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stepguard.engine import StepTrace
from stepguard.steps.digests import array_bytes, digest
from stepguard.tensorflow.boundary import Boundary
from stepguard.tensorflow.scalars import of_run

_MOST_FEEDS = 16
_MOST_NAMES = 4096


class RunTrace:
    """Counts the runs that train, because asking for the global step would cost a run of its own. Any thread.

    The count begins at the global step. Where a step has several runs, or a run raises the global step by more than
    one, the two part; :meth:`saved` tells the trace where a checkpoint belongs.
    """

    def __init__(self, trace: StepTrace, boundary: Boundary, step: int) -> None:
        self._trace = trace
        self._boundary = boundary
        self.wants_digests = trace.wants_digests
        # The names of fetches by their ids, with the fetches, so that no id is reused: TensorFlow makes them up anew.
        self._names: dict[int, tuple[Any, str]] = {}
        self._before = 0
        self.count_from(step)

    def count_from(self, step: int) -> None:
        """The next run is the first one after the global step ``step``."""
        self._before = step - self._boundary.steps

    def ran(self, fetches: Any, result: Any, feeds: Any) -> None:
        """Tell of a run that has just ended."""
        step = self._before + self._boundary.steps - 1
        if self.wants_digests and feeds:
            self._trace.digests(step, 0, self._digests(feeds), source="the feeds")
        numbers = self._scalars(fetches, result)
        if numbers:
            self._trace.numbers(step, 0, numbers)

    def report(self, numbers: Mapping[str, float]) -> None:
        """Tell of numbers that the program has computed between two runs."""
        if numbers:
            self._trace.numbers(self._before + self._boundary.steps, 0, numbers, False)

    def saved(self, checkpoint_step: int) -> None:
        """Tell that a checkpoint is being taken. Inside the boundary."""
        self._trace.saved(self._before + self._boundary.steps, checkpoint_step)

    def _scalars(self, fetches: Any, result: Any) -> dict[str, float]:
        """As :func:`of_run`, and fast for what training loops fetch: a list or a dictionary of tensors."""
        kind = type(result)
        if kind is list and type(fetches) in (list, tuple) and len(fetches) == len(result):
            pairs = zip(fetches, result, strict=True)
        elif kind is dict and type(fetches) is dict:
            pairs = zip(fetches.values(), result.values(), strict=True)
        else:
            pairs = zip((fetches,), (result,), strict=True)
        found: dict[str, float] = {}
        names = self._names
        for fetch, value in pairs:
            if type(value) is np.float32:
                known = names.get(id(fetch))
                found[self._new_name(fetch) if known is None else known[1]] = value  # type: ignore[assignment]
            elif value is not None:
                found.update(of_run(fetch, value))
        return found

    def _new_name(self, fetch: Any) -> str:
        if len(self._names) >= _MOST_NAMES:
            self._names.clear()
        name = str(getattr(fetch, "name", fetch))
        self._names[id(fetch)] = fetch, name
        return name

    def _digests(self, feeds: Any) -> dict[str, int]:
        """Digests of what was fed. Not of random states: a restart puts those of Python and NumPy back as little as
        those inside of TensorFlow's operations.
        """
        found = {}
        for key, value in list((feeds or {}).items())[:_MOST_FEEDS]:
            found[f"batch[{getattr(key, 'name', key)}]"] = digest(value, array_bytes)
        return found
