"""Puts saved tensors into the program's own ones, which its variables, data sets or optimizers may hold too."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

import torch

from stepguard.torch.checkpoint.packed import LONG

Place = tuple[Any, ...]

Taken = dict[int, tuple[Any, Any]]
"""The tensors that have got other contents already, and those contents, by the identities of the tensors."""


def taken_over(held: Any, value: Any, taken: Taken) -> Any:
    """``held`` with the contents of ``value``, if both are tensors of one form; else ``value``.

    Two places of the program may share a tensor, which takes one of two contents.
    """
    if not (isinstance(held, torch.Tensor) and isinstance(value, torch.Tensor)) or _form(held) != _form(value):
        return value
    if id(held) in taken:
        return held if taken[id(held)][1] is value else value
    # The result of a graph is needed for its gradients as it is; and a tensor of `inference_mode` cannot be changed.
    if held.grad_fn is not None or held.is_inference():
        return value
    try:
        with torch.no_grad():
            held.copy_(value)
    except RuntimeError:  # Several of its values are in one place in memory.
        return value
    taken[id(held)] = held, value
    return held


class Built:
    """The tensors with which the program has built a nested state, as far as they are still in their places.

    A run that has put another tensor in a place has left the first one to whoever holds it.
    """

    def __init__(self, state: Any) -> None:
        self._tensors = [(place, weakref.ref(tensor)) for place, tensor in tensors_in(state)]

    def places(self, state: Any) -> list[str]:
        """The places of those that ``state``, the present one, has."""
        return [repr(place) for place, built in self._tensors if part_at(state, place) is built()]

    def filled(self, state: Any, saved: Any, places: Collection[str]) -> Any:
        """``saved``, with the tensors of ``state`` at ``places``, where they can take the saved contents.

        Its containers are changed.
        """
        taken = Taken()
        for place, built in self._tensors:
            if repr(place) in places and part_at(state, place) is built():
                saved = _replaced(saved, place, built(), taken)
        return saved


def tensors_in(value: Any, place: Place = ()) -> Iterator[tuple[Place, torch.Tensor]]:
    """The tensors in a nested state, but for those of long lists, such as a replay buffer."""
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, dict) or (isinstance(value, (list, tuple, deque)) and len(value) < LONG):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(part, (*place, key))


def part_at(state: Any, place: Place) -> Any:
    """The part of a nested state at ``place``; ``None`` if there is none."""
    for key in place:
        try:
            state = state[key]
        except (LookupError, TypeError):
            return None
    return state


def _replaced(saved: Any, place: Place, held: Any, taken: Taken) -> Any:
    """``saved``, which gets ``held`` at ``place``."""
    if not place:
        return taken_over(held, saved, taken)
    key, rest = place[0], place[1:]
    if isinstance(saved, tuple):
        return tuple(_replaced(part, rest, held, taken) if n == key else part for n, part in enumerate(saved))
    if (isinstance(saved, dict) and key in saved) or (isinstance(saved, (list, deque)) and key < len(saved)):
        saved[key] = _replaced(saved[key], rest, held, taken)
    return saved


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    # Parameters are of another class than the tensors that are saved of them; DTensors and the like are not.
    kind = torch.Tensor if type(tensor) is torch.nn.Parameter else type(tensor)
    return kind, tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor.is_quantized
