"""What is inside a loader, also in wrappers around it: data sets, samplers, and generators of random numbers."""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from stepguard.steps.attributes import attributes, has
from stepguard.torch.data.generators import is_generator
from stepguard.words import logger

_log = logger(__name__)

# Far more than loaders have; a data set may refer to anything.
_MOST = 1000
_DEPTH = 6
_MEMBERS = 32


# Code of these draws from the global streams, or from what it is given.
_LIBRARIES = {"torch", "torchdata", "torchvision", "numpy", *sys.stdlib_module_names} - {"__main__"}


def warn_of_new_generators(loader: str, position: Mapping[str, Any]) -> None:
    """Warn, at a restart from ``position``, of generators that the data had made when it needed them first."""
    if position.get("new generators"):
        _log.warning(
            "%s: the data set had made a generator of random numbers when it first needed one. It is not saved, and "
            "begins anew: make it in __init__, or draw from the global generators",
            loader,
        )


class Inside:
    """The objects that can be reached from ``roots`` through attributes of objects that are iterated over or called.

    So are objects of the program's own classes. Others are not entered: they are not of the loader alone, as the state
    that all loaders of a library share.
    The functions of the program, and the methods of its classes, are followed too: to what they hold, and to the
    generators and functions of their modules that they name.
    """

    def __init__(self, *roots: Any) -> None:
        self.objects: list[Any] = []
        self.generators: list[Any] = []
        seen: set[int] = set()
        queue = deque((root, 0) for root in roots)
        while queue and len(self.objects) < _MOST and len(seen) < 10 * _MOST:
            one, depth = queue.popleft()
            if id(one) in seen:
                continue
            seen.add(id(one))
            if is_generator(one):
                self.generators.append(one)
                continue
            if isinstance(one, _CODE):
                queue.extend((held, depth + 1) for held in _held_by_code(one) if depth < _DEPTH)
                continue
            if not _is_entered(one, is_root=depth == 0):
                continue
            self.objects.append(one)
            if depth < _DEPTH:
                queue.extend((member, depth + 1) for member in _members(one))
                queue.extend((method, depth) for method in _methods(type(one)))
        self._form = self.form()

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

    def form(self) -> list[Any]:
        """The types of all attributes of the objects; others when an object has got a generator meanwhile."""
        return [[type(one) for one in attributes(held).values()] for held in self.objects]

    def new_generators(self, *roots: Any) -> int:
        """How many generators the objects, which ``roots`` led to, have got since they were looked at."""
        form = self.form()
        if form == self._form:
            return 0
        known = {id(one) for one in self.generators}
        found = sum(1 for one in Inside(*roots).generators if id(one) not in known)
        if not found:
            # Something else is new, such as a file that was opened. It is not looked for again.
            self._form = form
        return found

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
        yield from attributes(one).values()


_CODE = (types.FunctionType, types.MethodType, functools.partial, staticmethod, classmethod, property)


def _held_by_code(one: Any) -> Iterator[Any]:
    """What a function of the program holds: its object and arguments, its closure, and the generators that it names."""
    if isinstance(one, functools.partial):
        yield from (*one.args, *one.keywords.values(), one.func)
        return
    if isinstance(one, types.MethodType):
        yield one.__self__
    function = one.fget if isinstance(one, property) else getattr(one, "__func__", one)
    if not isinstance(function, types.FunctionType) or _is_of_library(function.__module__):
        return
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from _contents(function)
    named = (function.__globals__.get(name) for name in _names_in(function.__code__))
    yield from (found for found in named if is_generator(found) or isinstance(found, types.FunctionType))


def _contents(function: types.FunctionType) -> Iterator[Any]:
    """What the closure of a function holds."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # The variable has no value yet.
            continue


def _names_in(code: types.CodeType) -> Iterator[str]:
    """The names in a function, and in those that are defined inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _methods(kind: type) -> Iterator[Any]:
    for one in kind.__mro__:
        if not _is_of_library(one.__module__):
            yield from (member for member in vars(one).values() if isinstance(member, _CODE))


def _is_of_library(module: str | None) -> bool:
    return module is None or module.partition(".")[0] in _LIBRARIES


def _is_entered(one: Any, *, is_root: bool) -> bool:
    if isinstance(one, nn.Module):
        # A transform, and no model.
        return next(one.parameters(), None) is None
    if isinstance(one, (str, bytes, torch.Tensor, type, types.ModuleType)) or has(one, "__array__"):
        return False
    if is_root or isinstance(one, (list, tuple, dict)):
        return True
    if isinstance(one, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)):
        return False  # They are of the training, also where a data set refers to what holds them.
    kind = type(one)
    # Not by `hasattr`: every class can be called.
    enters = any(name in vars(base) for base in kind.__mro__ for name in ("__iter__", "__getitem__", "__call__"))
    # Functions and other objects of the interpreter have no attributes of interest.
    return kind.__module__ != "builtins" and (enters or _is_of_program(kind))


def _is_of_program(kind: type) -> bool:
    """Whether a class is the program's own, as that of a helper of its data set."""
    module = kind.__module__
    file = str(getattr(sys.modules.get(module), "__file__", None))
    is_installed = any(place in file for place in ("site-packages", "dist-packages"))
    return not is_installed and not _is_of_library(module) and module.partition(".")[0] != "stepguard"
