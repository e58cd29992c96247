"""Random numbers that a JAX program draws in its steps from what is not in its state.

These are the generators of :mod:`stepguard.steps.strangers`; streams of Flax nnx, which steps change in place; and keys
that a loop carries from step to step in a variable of its own, as ``key, sub = jax.random.split(key)`` does.
"""

from __future__ import annotations

import dis
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from stepguard.steps.strangers import Strangers, program_frames, state_of_generator, variables_of

_ACCESS = re.compile(r"(LOAD|STORE)_(?:FAST|DEREF|GLOBAL|NAME)")
# The shapes of keys that are plain numbers, as jax.random.PRNGKey makes them.
_PLAIN_SHAPES = ((2,), (4,))


class StrangersOfJax(Strangers):
    """The generators, streams and keys around one loop. ``leaves`` returns the values in the state, by their places."""

    def __init__(self, leaves: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__(_state_of)
        self._leaves = leaves
        self._keys: list[str] = []

    def note_step(self) -> None:
        """Look, in the first steps, for keys that the loop carries too."""
        super().note_step()
        held = list(self._leaves().values())
        self._keys = [
            name
            for frame in program_frames(sys._getframe(1))
            for name, value in _carried(frame)
            if _is_key(value) and not any(_is_same(value, one) for one in held)
        ]

    def drawn(self, saved: Callable[[], list[Any]]) -> list[str]:
        """The names, with those of the keys."""
        return sorted({*super().drawn(saved), *self._keys})


def streams_in(parts: Iterable[Any]) -> list[Any]:
    """The streams in ``parts``, objects of Flax nnx."""
    return [one for part in parts for _, one in sys.modules["flax.nnx"].iter_graph(part) if _is_stream(one)]


def _is_stream(value: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and issubclass(type(value), nnx.RngStream)


def _state_of(value: Any) -> Any:
    if not _is_stream(value):
        return state_of_generator(value)
    count = value.count[...]
    is_here = not isinstance(count, jax.Array) or (count.is_fully_addressable and not count.is_deleted())
    return np.asarray(count).tobytes() if is_here else None


def _carried(frame: types.FrameType) -> Iterable[tuple[str, Any]]:
    """The variables that a loop around the running instruction reads first and then sets, so that it carries them."""
    instructions = list(dis.get_instructions(frame.f_code))
    loops = [
        (one.argval, one.offset)
        for one in instructions
        if "JUMP" in one.opname and isinstance(one.argval, int) and one.argval <= frame.f_lasti <= one.offset
    ]
    names: set[str] = set()
    for begin, end in loops:
        reads, sets = set[str](), set[str]()
        for one in instructions:
            if begin <= one.offset <= end:
                found = one.argval if isinstance(one.argval, tuple) else (one.argval,)
                for kind, name in zip(_ACCESS.findall(one.opname), found, strict=False):
                    (sets if kind == "STORE" else reads if name not in sets else set()).add(name)
        names |= reads & sets
    variables = variables_of(frame) if names else {}
    return [(name, variables[name]) for name in names if name in variables]


def _is_key(value: Any) -> bool:
    if not isinstance(value, jax.Array):
        return False
    is_plain = value.dtype == np.uint32 and value.shape in _PLAIN_SHAPES
    return is_plain or jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def _is_same(key: jax.Array, other: Any) -> bool:
    if key is other:
        return True
    if not isinstance(other, jax.Array) or (key.dtype, key.shape) != (other.dtype, other.shape):
        return False
    if any(one.is_deleted() or not one.is_fully_addressable for one in (key, other)):
        return False
    return bool((_numbers(key) == _numbers(other)).all())


def _numbers(key: jax.Array) -> Any:
    is_plain = key.dtype == np.uint32
    return np.asarray(key if is_plain else jax.random.key_data(key))
