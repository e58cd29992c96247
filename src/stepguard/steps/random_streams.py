"""The random streams of the process: the global generators, which a program uses if it names none."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class RandomStreams:
    """Python's stream, and NumPy's if the program has imported it. A framework's subclass adds its own. Any thread."""

    def capture(self) -> dict[str, Any]:
        """The states, as plain values."""
        states: dict[str, Any] = {"python": random.getstate()}
        # A program that has not imported NumPy has drawn nothing from it.
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            name, keys, position, has_gauss, cached_gaussian = numpy.random.get_state()
            states["numpy"] = (name, tuple(keys.tolist()), position, has_gauss, cached_gaussian)
        return states

    def restore(self, states: Mapping[str, Any]) -> None:
        """Set the streams to the states that :meth:`capture` has returned."""
        version, internal, gauss_next = states["python"]
        random.setstate((version, tuple(internal), gauss_next))
        numpy = sys.modules.get("numpy")
        if numpy is not None and "numpy" in states:
            numpy.random.set_state(tuple(states["numpy"]))

    def reseed(self, seed: str) -> None:
        """Begin the streams anew from ``seed``; the same text gives the same streams. A subclass adds its own."""
        # Python's generator seeds its whole state from a string; the others are seeded by numbers from it.
        random.seed(seed)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(random.getrandbits(32))

    def fork(self) -> dict[str, Any]:
        """The states of new streams, which one draw from Python's stream decides."""
        seed = str(random.getrandbits(128))
        with self.preserved():
            self.reseed(seed)
            return self.capture()

    def side(self, name: str) -> dict[str, Any]:
        """The states of new streams, which these and ``name`` decide. Nothing is drawn from these."""
        with self.preserved():
            self.reseed(f"{random.getrandbits(128)}/{name}")
            return self.capture()

    def are_equal(self, states: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
        """Whether nothing was drawn between two captures. A subclass compares its own."""
        return states == others

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """A block after which the streams are as they were before, whatever it draws."""
        states = self.capture()
        try:
            yield
        finally:
            self.restore(states)
