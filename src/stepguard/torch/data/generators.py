"""Random number generators that a loader, its samplers or its data set hold, beside the streams of the process.

What these count for themselves decides, as a generator does, what they give next: :class:`.Counts` is kept like one,
and so is :class:`.Contents`.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch

from stepguard.steps.process_file import taking
from stepguard.torch.checkpoint.state import with_arrays, without_arrays
from stepguard.torch.data.contents import Contents
from stepguard.torch.data.counts import Counts


def is_generator(value: Any) -> bool:
    """Whether ``value`` is a generator of its own, and none of the global ones."""
    if isinstance(value, torch.Generator):
        return value is not torch.default_generator
    if isinstance(value, random.Random):
        return value is not getattr(random, "_inst", None)
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, (numpy.random.Generator, numpy.random.RandomState)):
        return False
    return value is not getattr(numpy.random.mtrand, "_rand", None)


def states(generators: Sequence[Any]) -> list[Any]:
    """The states of ``generators``, as tensors and plain values."""
    return [_state(one) for one in generators]


class _Making(threading.local):
    """What the feeds share that this thread is just making."""

    known: dict[int, Any] | None = None


_making = _Making()


@contextmanager
def put_back_once(known: dict[int, Any]) -> Iterator[None]:
    """A block that makes feeds which share ``known``, what a restart has put back, by its identity.

    Two loaders may draw from one generator. The first that goes on puts it back; when the other goes on, maybe much
    later, the generator is further.
    """
    _making.known = known
    try:
        yield
    finally:
        _making.known = None


def known_as_put_back() -> dict[int, Any]:
    """What the feeds of this restart share; for a feed without a session, its own."""
    return {} if _making.known is None else _making.known


def put_back(
    held: Iterable[tuple[Any, Any]], known: dict[int, Any], now: Mapping[int, Any] = MappingProxyType({})
) -> None:
    """Set each of ``held`` to its state, unless it was put back before: that one has, or gets, its state ``now``."""
    before = {*known}
    for one, state in held:
        if id(one) not in before:
            restore([one], [state])
        elif id(one) in now:
            restore([one], [now[id(one)]])
        known[id(one)] = one


def restore(generators: Sequence[Any], saved: Sequence[Any]) -> None:
    """Set ``generators`` to the states that :func:`states` has returned."""
    for generator, state in zip(generators, saved, strict=False):
        with taking(f"a {type(generator).__name__} in the data"):
            _restore(generator, state)


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, (Counts, Contents)):
        generator.put(state)
    elif isinstance(generator, random.Random):
        version, internal, gauss_next = state
        generator.setstate((version, tuple(internal), gauss_next))
    else:
        _put_numpy(generator, state)


def reseed(generators: Sequence[Any], seed: str) -> None:
    """Begin ``generators`` anew; the same text gives each of them the same numbers."""
    for number, generator in enumerate(generators):
        source = random.Random(f"{seed}/{number}")
        if isinstance(generator, torch.Generator):
            generator.manual_seed(source.getrandbits(63))
        elif isinstance(generator, random.Random):
            generator.setstate(source.getstate())
        elif hasattr(generator, "bit_generator"):
            generator.bit_generator.state = type(generator.bit_generator)(source.getrandbits(63)).state
        else:
            generator.seed(source.getrandbits(32))


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, (Counts, Contents)):
        return generator.state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return without_arrays(_numpy_state(generator))


def _numpy_state(generator: Any) -> Mapping[str, Any]:
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def _put_numpy(generator: Any, state: Mapping[str, Any]) -> None:
    state = with_arrays(state, _numpy_state(generator))
    if hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
