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
from contextlib import contextmanager
from typing import Any

from stepguard.steps.attributes import attributes
from stepguard.words import listed, logger

_log = logger(__name__)

_LIBRARIES = {
    *sys.stdlib_module_names,
    "stepguard",
    "torch",
    "jax",
    "tqdm",
    "pytest",
    "_pytest",
    "pluggy",
    "builtins",
} - {"__main__"}
_MOST_FRAMES = 30
# How many beginnings of steps are looked at: those of the first three.
_STEPS_SEEN = 3
# Whoever holds the dictionary of a frame's variables: the frame, a variable here, and the call that counts.
_HOLDERS_OF_LOCALS = 3


def state_of_generator(value: Any) -> Any:
    """The state of a generator of Python's or NumPy's, as something to compare; ``None`` for anything else.

    The type decides, because some objects run code if they are asked for their class.
    """
    kind = type(value)
    if issubclass(kind, random.Random):
        is_other = value is getattr(random, "_inst", None) or issubclass(kind, random.SystemRandom)
        return None if is_other else value.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if issubclass(kind, numpy.random.Generator):
        return repr(value.bit_generator.state)
    if issubclass(kind, numpy.random.RandomState) and value is not getattr(numpy.random.mtrand, "_rand", None):
        state = value.get_state(legacy=False)
        return repr({name: part for name, part in state.items() if name != "state"}), {
            name: part.tobytes() if hasattr(part, "tobytes") else part for name, part in state.get("state", {}).items()
        }
    return None


class Strangers:
    """The generators around one loop. For the training thread, or a thread that holds the boundary."""

    def __init__(
        self, state_of: Callable[[Any], Any] = state_of_generator, seed_of: Callable[[Any], Any] = lambda _: None
    ) -> None:
        self._state_of = state_of
        # The last seed of a generator; `None` if its kind keeps none.
        self._seed_of = seed_of
        self._seeds: list[dict[int, Any]] = []
        self.is_young = True
        """Whether to call :meth:`note_step` when a step begins."""
        self._has_looked = False
        # By their identities: the name, the generator, and its state at the beginning.
        self._found: dict[int, tuple[str, Any, Any]] = {}

    def look(self) -> None:
        """Find them, the first time that this is called: by the first loop over steps."""
        if self._has_looked:
            return
        self._has_looked = True
        of_loaders: list[Any] = []
        for frame in program_frames(sys._getframe(1)):
            for name, value in variables(frame):
                of_loaders.append(attributes(value).get("generator"))
                state = self._state_of(value)
                if state is not None:
                    self._found.setdefault(id(value), (name, value, state))
        for one in of_loaders:
            # A loader draws a seed from its generator for each of its iterators, also in an evaluation.
            self._found.pop(id(one), None)

    def note_step(self) -> None:
        """Leave out those that each step seeds anew, as far as the first steps tell."""
        self._seeds.append({key: self._seed_of(one) for key, (_, one, _) in self._found.items()})
        self.is_young = len(self._seeds) < _STEPS_SEEN
        if not self.is_young:
            first, second = self._seeds[-2:]
            for key, seed in second.items():
                if seed != first.get(key, seed):
                    del self._found[key]

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """A block, as of an evaluation, whose draws do not count, but from those that the training draws from too."""
        idle = [key for key, (_, one, state) in self._found.items() if self._state_of(one) == state]
        yield
        for key in idle:
            if key in self._found:
                name, one, _ = self._found[key]
                self._found[key] = name, one, self._state_of(one)

    def leave_out_drawn(self) -> None:
        """Leave out those that were drawn from since the start: they are of the data, whose first batch was fetched."""
        for key, (_, one, state) in list(self._found.items()):
            if self._state_of(one) != state:
                del self._found[key]

    def drawn(self, saved: Callable[[], list[Any]]) -> list[str]:
        """The names of those that were drawn from since the start and are not among ``saved()``."""
        found = [(name, one) for name, one, state in self._found.values() if self._state_of(one) != state]
        held = {id(one) for one in saved()} if found else set()
        return sorted({name for name, one in found if id(one) not in held})


def warn_of(drawn: list[str]) -> None:
    """Warn, at a restart, of the generators that the run has drawn from."""
    if drawn:
        _log.warning(
            "the run has drawn random numbers from generators or keys that are not saved, and they begin anew: %s. "
            "Put them in the state, or draw from the global generators",
            listed(drawn),
        )


def program_frames(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    """``frame`` and those around it, as far as they run code of the program."""
    for _ in range(_MOST_FRAMES):
        if frame is None:
            return
        if not _is_of_library(frame.f_globals.get("__name__")):
            yield frame
        frame = frame.f_back


def variables_of(frame: types.FrameType) -> dict[str, Any]:
    """The variables of a function of the program and of its module, by their names."""
    return {**frame.f_globals, **_locals(frame)}


def variables(frame: types.FrameType) -> Iterator[tuple[str, Any]]:
    """The variables of a function of the program and of its module, and the attributes of the program's objects."""
    for name, value in [*_locals(frame).items(), *list(frame.f_globals.items())]:
        yield name, value
        if not _is_of_library(type(value).__module__):
            yield from ((f"{name}.{member}", part) for member, part in attributes(value).items())


def _is_of_library(module: Any) -> bool:
    return str(module).partition(".")[0] in _LIBRARIES


def _locals(frame: types.FrameType) -> dict[str, Any]:
    variables = frame.f_locals
    found = dict(variables)
    if (
        sys.version_info < (3, 13)
        and frame.f_code.co_flags & inspect.CO_OPTIMIZED
        and sys.getrefcount(variables) <= _HOLDERS_OF_LOCALS
    ):
        # Before Python 3.13 this is a copy that the frame keeps, and the copy would keep the program's loaders alive.
        # A program that has called locals() holds the same copy.
        variables.clear()
    return found
