"""Frozen parameters in a file of their own.

The file of a module changes with every step. With ``Saving(frozen_apart=True)`` the parameters that do not train are in
``frozen/NAME.pt`` beside ``NAME.pt``. This is a plain ``state_dict`` too. It equals the one of the checkpoint before,
so it is not written again. What reads a checkpoint joins the two. Of a sharded module, each process has a second file
for them, ``__RANK_1.distcp``, which ``.metadata`` knows like the first.

Buffers stay with the parameters that train, because a frozen layer may still count in them. So does a frozen parameter
that shares its memory with one that trains.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from stepguard.errors import CheckpointCorruptError

DIRECTORY = "frozen"
"""The directory of these files in a checkpoint."""


def split(state: Any, names: Collection[str]) -> tuple[Any, OrderedDict[str, Any], list[int]]:
    """A module's state without the frozen parameters ``names``, those, and their places among all names.

    ``state`` is in host memory, where tied tensors are one object.
    """
    if not names or not isinstance(state, Mapping):
        return state, OrderedDict(), []
    trained = {id(part) for name, part in state.items() if name not in names}
    apart = [name for name, part in state.items() if name in names and id(part) not in trained]
    rest = copy.copy(state)  # With the attributes that PyTorch gives a state_dict.
    frozen = OrderedDict((name, rest.pop(name)) for name in apart)  # type: ignore[attr-defined]
    return rest, frozen, [number for number, name in enumerate(state) if name in frozen]


def joined(part: str, state: Any, frozen: Any, apart: Any) -> Any:
    """The whole state of ``part``, with its names in the order that they had.

    ``apart`` has the places of the frozen parameters of each part, as the checkpoint has them; ``state`` is ``None`` if
    it has no file of that.

    Raises CheckpointCorruptError if one of the two is no ``state_dict``, or the places are none.
    """
    if not isinstance(state, Mapping) or not isinstance(frozen, Mapping):
        raise CheckpointCorruptError(
            f"{part}: expected its state in two files, each with parameters by their names, found a "
            f"{type(state).__name__} and a {type(frozen).__name__}"
        )
    places = apart.get(part, []) if isinstance(apart, Mapping) else None
    if not isinstance(places, list) or not all(isinstance(place, int) for place in places):
        raise CheckpointCorruptError(f"{part}: expected the places of its frozen parameters, found {apart!r:.80}")
    whole = copy.copy(state)
    whole.clear()  # type: ignore[attr-defined]
    whole.update(_in_order(state, frozen, places))  # type: ignore[attr-defined]
    return whole


def _in_order(state: Mapping[str, Any], frozen: Mapping[str, Any], places: Sequence[int]) -> Iterator[tuple[str, Any]]:
    taken, rest = dict(zip(places, frozen.items(), strict=False)), iter(state.items())
    for number in range(len(state) + len(frozen)):
        found = taken.pop(number, None) or next(rest, None)
        if found is not None:
            yield found
    # Nothing new comes of these unless the places are not those of this state.
    yield from rest
    yield from frozen.items()
