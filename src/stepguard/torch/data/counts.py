"""The numbers that samplers and data sets count for themselves, such as the epochs that they have begun."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_PLAIN = (bool, int, float, str, type(None))


class Counts:
    """The plain attributes of ``objects``. Only those that have changed since the start are saved."""

    def __init__(self, objects: Iterable[Any]) -> None:
        # By their identity, because some compare as equal that are not the same.
        self._objects = list({id(one): one for one in objects if hasattr(one, "__dict__")}.values())
        self._at_start = [_plain(one) for one in self._objects]

    def state(self) -> dict[str, Any]:
        """The values that have changed, by the number of their object and their name."""
        return {
            f"{number}.{name}": value
            for number, (one, before) in enumerate(zip(self._objects, self._at_start, strict=True))
            for name, value in _plain(one).items()
            if name not in before or before[name] != value
        }

    def put(self, state: Mapping[str, Any]) -> None:
        """Set the attributes in ``state``, which :meth:`state` has returned."""
        for key, value in state.items():
            number, _, name = key.partition(".")
            if int(number) < len(self._objects):
                vars(self._objects[int(number)])[name] = value


def _plain(one: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(one).items() if type(value) in _PLAIN}
