"""What is inside a loader, also in wrappers around it: data sets, samplers, and generators of random numbers."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from stepguard.torch.data.generators import is_generator

# Far more than loaders have; a data set may refer to anything.
_MOST = 1000
_DEPTH = 6
_MEMBERS = 32


class Inside:
    """The objects that can be reached from ``roots`` through attributes of objects that are iterated over or called.

    Other objects are not entered: they are not of the loader alone, as the state that all loaders of a library share.
    """

    def __init__(self, *roots: Any) -> None:
        self.objects: list[Any] = []
        self.generators: list[Any] = []
        seen: set[int] = set()
        queue = deque((root, 0) for root in roots)
        while queue and len(self.objects) < _MOST:
            one, depth = queue.popleft()
            if id(one) in seen:
                continue
            seen.add(id(one))
            if is_generator(one):
                self.generators.append(one)
                continue
            if not _is_entered(one, is_root=depth == 0):
                continue
            self.objects.append(one)
            if depth < _DEPTH:
                queue.extend((member, depth + 1) for member in _members(one))

    @property
    def loaders(self) -> list[DataLoader[Any]]:
        """The DataLoaders."""
        return [one for one in self.objects if issubclass(type(one), DataLoader)]

    @property
    def reads_by_index(self) -> bool:
        """Whether a DataLoader is inside, and none that reads from an iterable data set."""
        loaders = self.loaders
        return bool(loaders) and not any(isinstance(one.dataset, IterableDataset) for one in loaders)

    def holds(self, one: Any) -> int:
        """How often ``one`` is among the objects."""
        return sum(1 for held in self.objects if held is one)

    def set_epoch(self, epoch: int) -> None:
        """Tell the number of the epoch to those who have ``set_epoch``."""
        for one in self.objects:
            # The class is asked, because a wrapper may pass the attributes of its inner object on.
            if callable(getattr(type(one), "set_epoch", None)):
                one.set_epoch(epoch)


def _members(one: Any) -> Iterator[Any]:
    if isinstance(one, Mapping):
        yield from list(one.values())[:_MEMBERS] if len(one) <= _MEMBERS else ()
    elif isinstance(one, (list, tuple)):
        yield from one if len(one) <= _MEMBERS else ()
    else:
        yield from list(getattr(one, "__dict__", {}).values())


def _is_entered(one: Any, *, is_root: bool) -> bool:
    if isinstance(one, (str, bytes, torch.Tensor, nn.Module, type, types.ModuleType)) or hasattr(one, "__array__"):
        return False
    if is_root or isinstance(one, (list, tuple, dict)):
        return True
    kind = type(one)
    enters = any(hasattr(kind, name) for name in ("__iter__", "__getitem__", "__call__"))
    # Functions and other objects of the interpreter have no attributes of interest.
    return enters and kind.__module__ != "builtins"
