"""Generators of random numbers that the program draws from in its steps, and that nothing saves.

They are found among the variables of the functions that run the loop, and of their modules. They cannot be restored,
because their names may mean something else at the next start; a restart that would have needed them warns.
"""

from __future__ import annotations

import inspect
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from stepguard.words import listed, logger

_log = logger(__name__)

_LIBRARIES = {*sys.stdlib_module_names, "stepguard", "torch", "jax", "tqdm", "pytest", "_pytest", "pluggy"} - {
    "__main__"
}
_MOST_FRAMES = 30


def state_of_generator(value: Any) -> Any:
    """The state of a generator of Python's or NumPy's, as something to compare; ``None`` for anything else."""
    if isinstance(value, random.Random):
        return None if value is getattr(random, "_inst", None) else value.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, (numpy.random.Generator, numpy.random.RandomState)):
        return None
    if value is getattr(numpy.random.mtrand, "_rand", None):
        return None
    state = value.bit_generator.state if hasattr(value, "bit_generator") else value.get_state(legacy=False)
    return repr(state)


class Strangers:
    """The generators around one loop. For the training thread, or a thread that holds the boundary."""

    def __init__(self, state_of: Callable[[Any], Any] = state_of_generator) -> None:
        self._state_of = state_of
        self._has_looked = False
        self._found: dict[str, tuple[Any, Any]] = {}

    def look(self) -> None:
        """Find them, the first time that this is called: by the first loop over steps."""
        if self._has_looked:
            return
        self._has_looked = True
        frame: types.FrameType | None = sys._getframe(1)
        for _ in range(_MOST_FRAMES):
            if frame is None:
                return
            if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
                for name, value in _variables(frame):
                    state = self._state_of(value)
                    if state is not None:
                        self._found.setdefault(name, (value, state))
            frame = frame.f_back

    def drawn(self, is_saved: Callable[[Any], bool]) -> list[str]:
        """The names of those that were drawn from since the start and are not saved."""
        return [
            name for name, (one, state) in self._found.items() if self._state_of(one) != state and not is_saved(one)
        ]


def warn_of(drawn: list[str]) -> None:
    """Warn, at a restart, of the generators that the run has drawn from."""
    if drawn:
        _log.warning(
            "the run has drawn random numbers from generators that are not saved, and they begin anew: %s. Give them "
            "to the Supervisor in its state, or draw from the global generators",
            listed(drawn),
        )


def _variables(frame: types.FrameType) -> Iterator[tuple[str, Any]]:
    found = dict(frame.f_locals)
    if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        # Before Python 3.13 this is a copy that the frame keeps, and the copy would keep the program's loaders alive.
        frame.f_locals.clear()
    for name, value in found.items():
        yield name, value
        if name == "self":
            yield from ((f"self.{member}", part) for member, part in list(getattr(value, "__dict__", {}).items()))
    yield from list(frame.f_globals.items())
