"""The numbers that samplers and data sets count for themselves, such as the epochs that they have begun."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from multiprocessing import sharedctypes
from typing import Any

from stepguard.steps.attributes import attributes, has, has_dictionary
from stepguard.torch.data.contents import is_content
from stepguard.words import listed, logger

_log = logger(__name__)

_PLAIN = (bool, int, float, str, type(None))
# A multiprocessing.Value, with and without a lock.
_SHARED = (sharedctypes.Synchronized, vars(sharedctypes)["typecode_to_type"]["i"].__base__)
# The key in the state for what was not saved, which no attribute is called.
_NOT_SAVED = "not saved"


def numbers_of(objects: Iterable[Any]) -> list[Any]:
    """The integers, in their order, among the attributes of ``objects``, but for the number of the epoch."""
    held = [item for one in objects for item in attributes(one).items()]
    numbers = [(name, _number(value)) for name, value in held]
    return [value for name, value in numbers if type(value) is int and "epoch" not in name]


def warn_of_counts_in_workers(loader: str, position: Mapping[str, Any]) -> None:
    """Warn, at a restart from ``position``, of a data set that counts in its workers."""
    if position.get("counted"):
        _log.warning(
            "%s: the data set goes on changing numbers in its workers, and new workers begin anew. If its items depend "
            "on these numbers, they are not those of the interrupted run: let them depend on their index, and on the "
            "epoch that the data set is told by set_epoch()",
            loader,
        )


class Counts:
    """The plain attributes of ``objects``. Only those that have changed since the start are saved.

    With ``may_keep_more``, the objects may keep other things too, such as the items that they have read or an open
    file, which a number among their attributes may describe. If these have changed, no number is saved, and a restart
    that would have needed it warns.
    """

    def __init__(self, objects: Iterable[Any], *, may_keep_more: bool) -> None:
        # By their identity, because some compare as equal that are not the same.
        self._objects = list({id(one): one for one in objects if has_dictionary(one)}.values())
        self._at_start = [_plain(one) for one in self._objects]
        self._kept_at_start = [_kept(one) for one in self._objects] if may_keep_more else []

    def state(self) -> dict[str, Any]:
        """The values that have changed, by the number of their object and their name."""
        changed = {
            f"{number}.{name}": value
            for number, (one, before) in enumerate(zip(self._objects, self._at_start, strict=True))
            for name, value in _plain(one).items()
            if name not in before or before[name] != value
        }
        more = self._more()
        return {_NOT_SAVED: [sorted(changed), more]} if changed and more else changed

    def values(self) -> dict[str, Any]:
        """All values, by the number of their object and their name."""
        return {
            f"{number}.{name}": value for number, one in enumerate(self._objects) for name, value in _plain(one).items()
        }

    def _more(self) -> list[str]:
        """The attributes that are no numbers, and have another size or type than at the start."""
        return [
            f"{type(one).__name__}.{name}"
            for one, before in zip(self._objects, self._kept_at_start, strict=False)
            for name, kept in _kept(one).items()
            if before.get(name) != kept
        ]

    def put(self, state: Mapping[str, Any]) -> None:
        """Set the attributes in ``state``, which :meth:`state` has returned."""
        for key, value in state.items():
            if key == _NOT_SAVED:
                self._warn(*value)
                continue
            number, _, name = key.partition(".")
            if int(number) < len(self._objects):
                held = vars(self._objects[int(number)])
                if isinstance(held.get(name), _SHARED):
                    held[name].value = value
                else:
                    held[name] = value

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Set the attributes to what they were when :meth:`state` returned ``state``, at an earlier moment than now."""
        earlier = {
            f"{number}.{name}": value for number, one in enumerate(self._at_start) for name, value in one.items()
        }
        earlier.update((key, value) for key, value in state.items() if key != _NOT_SAVED)
        # Workers see a shared number as it is now, whenever they were started.
        self.put({key: value for key, value in earlier.items() if not self._is_shared(*key.split(".", 1))})

    def _is_shared(self, number: str, name: str) -> bool:
        return int(number) < len(self._objects) and isinstance(vars(self._objects[int(number)]).get(name), _SHARED)

    def _warn(self, keys: list[str], more: list[str]) -> None:
        numbers = [self._shown(*key.split(".", 1)) for key in keys]
        _log.warning(
            "the data set had changed %s when the checkpoint was made, and also %s, which no checkpoint has; it begins "
            "anew. If its items depend on these numbers, they are not those of the interrupted run: let them depend on "
            "their index, and on the epoch that the data set is told by set_epoch()",
            listed(numbers),
            listed(more),
        )

    def _shown(self, number: str, name: str) -> str:
        one = self._objects[int(number)] if int(number) < len(self._objects) else None
        return name if one is None else f"{type(one).__name__}.{name}"


def _plain(one: Any) -> dict[str, Any]:
    numbers = {name: _number(value) for name, value in vars(one).items()}
    return {name: value for name, value in numbers.items() if type(value) in _PLAIN}


def _number(value: Any) -> Any:
    """The number in a :class:`multiprocessing.Value`, which processes share; anything else as it is."""
    return value.value if isinstance(value, _SHARED) else value


def _kept(one: Any) -> dict[str, tuple[str, Any]]:
    """The types and sizes of the attributes that neither this class nor :class:`.Contents` saves."""
    return {
        name: (type(value).__name__, _size(value))
        for name, value in vars(one).items()
        if type(_number(value)) not in _PLAIN and not is_content(value)
    }


def _size(value: Any) -> Any:
    shape = value.shape if has(value, "shape") else None
    if isinstance(shape, tuple):
        return tuple(shape)
    return len(value) if isinstance(value, (list, tuple, dict, set, frozenset, bytes, bytearray)) else None
