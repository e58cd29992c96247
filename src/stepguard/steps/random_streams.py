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
        numpy = sys.modules.get("numpy")
        _put(states, random, None if numpy is None else numpy.random)

    def check(self, states: Mapping[str, Any]) -> None:
        """Raise an error of any type unless :meth:`restore` can take ``states``. The streams stay as they are."""
        numpy = sys.modules.get("numpy")
        _put(states, random.Random(), None if numpy is None else numpy.random.RandomState())

    def draw_seeds(self) -> dict[str, int]:
        """One number from each stream. A subclass adds its own."""
        seeds = {"python": random.getrandbits(63)}
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            seeds["numpy"] = int(numpy.random.randint(2**32, dtype=numpy.uint64))
        return seeds

    def reseed(self, seeds: Mapping[str, int], name: str) -> None:
        """Begin each stream anew from its own number and ``name``. A subclass adds its own."""
        random.seed(f"{name}/{seeds['python']}")
        numpy = sys.modules.get("numpy")
        if numpy is not None and "numpy" in seeds:
            numpy.random.seed(random.Random(f"{name}/{seeds['numpy']}").getrandbits(32))

    def fork(self, name: str) -> dict[str, Any]:
        """The states of new streams. One draw from each stream decides the new one of its kind.

        A program that seeds only the stream that it uses therefore gets the same numbers in each of its runs.
        """
        seeds = self.draw_seeds()
        with self.preserved():
            self.reseed(seeds, name)
            return self.capture()

    def side(self, name: str) -> dict[str, Any]:
        """The states of new streams, as of :meth:`fork`, and nothing is drawn from these."""
        with self.preserved():
            return self.fork(name)

    def are_equal(self, states: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
        """Whether nothing was drawn between two captures. A subclass whose states are arrays compares them itself."""
        return states == others

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """A block after which the streams are as they were before, whatever it draws."""
        states = self.capture()
        try:
            yield
        finally:
            self.restore(states)


def _put(states: Mapping[str, Any], python: Any, numpy: Any) -> None:
    version, internal, gauss_next = states["python"]
    # Python takes any object here, and fails when it is drawn.
    if gauss_next is not None and not isinstance(gauss_next, float):
        raise TypeError(f"expected a number or nothing as the next of Python's, found {gauss_next!r:.80}")
    python.setstate((version, tuple(internal), gauss_next))
    if numpy is not None and "numpy" in states:
        name, keys, position, has_gauss, cached_gaussian = states["numpy"]
        # NumPy takes any position, and reads beside its keys then; older ones read beside a tuple that is too short.
        if not 0 <= position <= len(keys):
            raise ValueError(f"expected a position of NumPy from 0 to {len(keys)}, found {position!r:.80}")
        numpy.set_state((name, keys, position, has_gauss, cached_gaussian))
