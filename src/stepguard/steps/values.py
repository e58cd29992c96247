"""Plain values that the program saves with the model, such as the best loss so far or a list of seen files."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from stepguard.words import logger

_log = logger(__name__)


class Values:
    """Attributes that are saved and restored: numbers, strings, tensors, and lists and dictionaries of them.

    ::

        progress = Values(best_loss=float("inf"), patience=3)
        sv = Supervisor({"model": model, "progress": progress}, logdir="runs/digits")
        ...
        progress.best_loss = min(progress.best_loss, loss)

    With several processes, the values are those of the chief, and a restart gives them to all. ``per_process=True``
    gives each process its own values back. A process that did not exist before begins with those of the program.
    """

    # Outside of `__dict__`, which has the values and nothing else.
    __slots__ = ("__dict__", "_is_per_process")

    def __init__(self, *, per_process: bool = False, **initial: Any) -> None:
        if not isinstance(per_process, bool):
            raise TypeError(f"Values: expected per_process to be True or False, found {per_process!r:.80}")
        self._is_per_process = per_process
        self.__dict__.update(initial)

    @property
    def is_per_process(self) -> bool:
        """Whether each process has values of its own."""
        return self._is_per_process

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError. Python calls this only for a name that has no value."""
        raise AttributeError(f"no value {name!r}; there are: {', '.join(sorted(self.__dict__)) or 'none'}")

    def __repr__(self) -> str:
        """The expression that makes these values."""
        own = ["per_process=True"] if self._is_per_process else []
        return f"Values({', '.join(own + [f'{name}={value!r}' for name, value in self.__dict__.items()])})"

    def state_dict(self) -> dict[str, Any]:
        """The values by name."""
        return dict(self.__dict__)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set all values in ``state``, including names that are not set here yet.

        Values that ``state`` lacks, because the program was extended after the save, keep what the program has set. A
        warning names them. Dictionaries, lists and deques stay the same objects, because a variable may hold them too;
        and one that two names shared is shared again.
        """
        kept = [name for name in self.__dict__ if name not in state]
        if kept:
            shown = ", ".join(f"{name}={self.__dict__[name]!r:.80}" for name in kept)
            _log.warning("values that the checkpoint does not have are kept as the program has them: %s", shown)
        taken: dict[int, Any] = {}
        self.__dict__.update({name: _in_place(self.__dict__.get(name), value, taken) for name, value in state.items()})


def _in_place(held: Any, value: Any, taken: dict[int, Any]) -> Any:
    """``value``; if ``held`` is a dictionary, a list or a deque too, it gets the contents of ``value`` and is returned.

    ``taken`` has those that were taken already, by their identities, because two names may share one: for a ``value``
    what it has become, and each ``held`` that has got other contents.
    """
    if not isinstance(value, (dict, list, deque)):
        return value
    if id(value) in taken:
        return taken[id(value)]
    taken[id(value)] = found = held if _is_alike(held, value) and id(held) not in taken else value
    if found is value:
        return value
    taken[id(held)] = held
    if isinstance(value, dict):
        contents = {key: _in_place(held.get(key), part, taken) for key, part in value.items()}
        held.clear()
        held.update(contents)
    elif isinstance(value, deque):
        held.clear()
        held.extend(_in_place(None, part, taken) for part in value)
    else:
        rest = [_in_place(None, part, taken) for part in value[len(held) :]]
        held[:] = [_in_place(old, part, taken) for old, part in zip(held, value, strict=False)] + rest
    return held


def _is_alike(held: Any, value: Any) -> bool:
    if type(held) is not type(value):
        return False
    if isinstance(held, deque):
        return bool(held.maxlen == value.maxlen)
    return isinstance(held, dict) or type(held) is list
