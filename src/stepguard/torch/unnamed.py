"""Optimizers, schedules and gradient scalers that train with the program and are not in its state.

They begin anew at a restart: moments are lost, a learning rate begins its schedule again. PyTorch tells every step of
every optimizer, so that one can look.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from stepguard.steps.attributes import attributes
from stepguard.torch.checkpoint.in_place import tensors_in
from stepguard.torch.checkpoint.optimizers import has_hooks, optimizers_in, states_in
from stepguard.torch.checkpoint.sharded_tensors import is_dtensor
from stepguard.torch.checkpoint.state import leaves
from stepguard.torch.digests import hyperparameters
from stepguard.torch.gradients import Gradients
from stepguard.words import listed, logger

_log = logger(__name__)

Options = dict[str, float]
"""The numbers that the steps of an optimizer use."""

_PLAIN = (bool, int, float, str, bytes, type(None))
_MOST_MEMBERS = 1000
LOST = "a restart begins with a new one, so that it is not the same run; add it to the state of the Supervisor"
"""What follows for whatever is not in the state."""


class Unnamed:
    """Warns, once each, of what is missing in ``holders``, the objects of the state by their names.

    ``steps_done`` returns the number of the running training step, ``is_in_step`` whether this thread runs it.
    """

    def __init__(
        self, holders: Mapping[str, Any], steps_done: Callable[[], int], is_in_step: Callable[[], bool]
    ) -> None:
        self._holders = holders
        self._steps_done = steps_done
        self._is_in_step = is_in_step
        self._names = {id(one): name for name, one in holders.items() if isinstance(one, torch.optim.Optimizer)}
        self._reached = reached(holders.values())
        # The steps in which optimizers were first called, with their options then, and those that have been looked at.
        # By weak references: one that is gone leaves its id to the next.
        self._first: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, Options]] = weakref.WeakKeyDictionary()
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        # Those that were not found in the objects of the state; and those that are not saved either, in the order in
        # which they were found.
        self._watched: weakref.WeakKeyDictionary[torch.optim.Optimizer, Gradients] = weakref.WeakKeyDictionary()
        self._order: list[weakref.ref[torch.optim.Optimizer]] = []
        self._expected: Mapping[int, Mapping[str, Any]] = {}
        self._hook = register_optimizer_step_post_hook(self._after)

    def close(self) -> None:
        """Look no more."""
        self._hook.remove()
        for one in self._watched.values():
            one.close()

    def gradients(self) -> list[Gradients]:
        """The gradients of the optimizers that train and were not found in the objects of the state."""
        return list(self._watched.values())

    def changed(self) -> list[dict[str, Any]]:
        """The options of those optimizers, where they were changed since their first steps, as plain values."""
        found = []
        for number, reference in enumerate(self._order):
            optimizer = reference()
            if optimizer is not None:
                began, now = self._first[optimizer][1], _options(optimizer)
                if now != began:
                    found.append({"number": number, "began": began, "now": now})
        return found

    def expect(self, changed: Sequence[Mapping[str, Any]]) -> None:
        """Warn, as soon as they are found, of optimizers that have not the options of the earlier run."""
        self._expected = {one["number"]: one for one in changed}

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Look at an optimizer that was stepped. It runs inside the program's step, and raises nothing."""
        if optimizer in self._known:
            return
        try:
            self._look_at(optimizer)
        except Exception:  # noqa: BLE001 - a look at objects of the program, for a warning
            _log.debug("an optimizer could not be looked at", exc_info=True)

    def _look_at(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._is_in_step():
            return
        step = self._steps_done()
        if optimizer not in self._first:
            self._first[optimizer] = step, _options(optimizer)
        # In its second step: a schedule may be made after the session began, and an optimizer for one step is no part
        # of the training.
        if self._first[optimizer][0] == step:
            return
        self._known.add(optimizer)
        name = self._names.get(id(optimizer))
        if name is None:
            if self._is_saved(optimizer):
                return
            is_lost = not self._is_in_a_state(optimizer)
            self._watch(optimizer, is_lost=is_lost)
            if is_lost and (len(optimizer.state) or _is_scheduled(optimizer)):
                _log.warning(
                    "an optimizer (%s) trains in the steps, and it is not in the state: its moments and its learning "
                    "rate are lost; %s",
                    type(optimizer).__name__,
                    LOST,
                )
            return
        if _is_scheduled(optimizer) and not self._has_schedule(optimizer):
            _log.warning("%s has a learning rate scheduler, and that is not in the state: %s", name, LOST)
        scaler = _scaler_around()
        if scaler is not None and not self._is_reached(scaler):
            _log.warning("%s is stepped by a GradScaler, and that is not in the state: %s", name, LOST)

    def _watch(self, optimizer: torch.optim.Optimizer, *, is_lost: bool) -> None:
        if has_hooks(optimizer):
            self._watched[optimizer] = one = Gradients(type(optimizer).__name__, optimizer, self._steps_done)
            one.note_step()
        if not is_lost:
            return
        began, was = self._first[optimizer][1], self._expected.get(len(self._order), {"began": {}, "now": {}})
        self._order.append(weakref.ref(optimizer))
        lost = [
            f"{key} ({value} there, {began[key]} here)"
            for key, value in was["now"].items()
            # A program that sets it in its loop has set it before the first step.
            if key in began and began[key] == was["began"].get(key) != value
        ]
        if lost:
            _log.warning(
                "an optimizer trains in the steps, and it is not in the state: the run had changed what begins as the "
                "program makes it: %s; %s",
                listed(lost),
                LOST,
            )

    def _is_saved(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an object of the state that holds the optimizer saves what the optimizer keeps."""
        holders = [
            one
            for name, one in self._holders.items()
            if any(held is optimizer for held in optimizers_in(name, one).values())
        ]
        return any(_keeps(one.state_dict(), optimizer) for one in holders)

    def _is_in_a_state(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the state of an object has what the optimizer keeps, wherever the object has it from."""
        holders = [one for one in self._holders.values() if callable(getattr(type(one), "state_dict", None))]
        states = [one.state_dict() for one in holders]
        kept = [[part for _, part in tensors_in(one)] for one in optimizer.state.values()]
        if any(kept):
            # The largest of its parameters stands for all.
            largest = max(kept, key=lambda parts: sum(part.numel() for part in parts))
            saved_parts = [[part for _, part in tensors_in(state)] for state in states]
            return any(all(any(is_equal(part, one) for part in parts) for one in largest) for parts in saved_parts)
        rates = [group["lr"] for group in optimizer.param_groups]
        saved = [one["param_groups"] for state in states for _, one in states_in(state)]
        return any([group.get("lr") for group in groups] == rates for groups in saved)

    def _is_reached(self, one: Any) -> bool:
        return any(held is one for held in self._reached)

    def _has_schedule(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an object of the state schedules the optimizer, of whatever library."""
        # What holds one optimizer inside another gives both the same groups.
        groups = set(map(id, optimizer.param_groups))
        scheduled = [getattr(one, "optimizer", None) for one in self._reached]
        return any(
            one is optimizer or not groups.isdisjoint(map(id, getattr(one, "param_groups", ()))) for one in scheduled
        )


def reached(holders: Iterable[Any], depth: int = 2) -> list[Any]:
    """The objects of the state, and what they hold as attributes, in lists and in dictionaries: they save it."""
    found: list[Any] = []
    seen: set[int] = set()
    level = list(holders)
    for _ in range(depth + 1):
        level = [one for one in level if id(one) not in seen and not isinstance(one, (*_PLAIN, torch.Tensor))]
        seen.update(map(id, level))
        found += level
        level = [member for one in level for member in _members(one)]
    return found


def _members(one: Any) -> Iterable[Any]:
    if isinstance(one, dict):
        return list(one.values())[:_MOST_MEMBERS]
    if isinstance(one, (list, tuple)):
        return one[:_MOST_MEMBERS]
    if isinstance(one, (torch.nn.Module, torch.optim.Optimizer)):
        return ()
    return list(attributes(one).values())[:_MOST_MEMBERS]


def _options(optimizer: torch.optim.Optimizer) -> Options:
    return hyperparameters([(type(optimizer).__name__, optimizer)])


def _keeps(state: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the state of an object has what the optimizer keeps for its parameters."""
    kept = [one for one in optimizer.state.values() if isinstance(one, dict)]
    if not kept:
        return True
    states = [one["state"] for _, one in states_in(state)]
    if states:
        # An optimizer around another one may have a state of its own.
        return any(kept[0].keys() <= next(iter(one.values()), {}).keys() for one in states)
    return any(isinstance(part, torch.Tensor) for _, part in leaves("", state))


def is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both have the same contents: a state may have copies."""
    if one is other or is_dtensor(one) or is_dtensor(other):
        return one is other
    is_alike = one.shape == other.shape and one.dtype == other.dtype and one.layout == other.layout
    return is_alike and torch.equal(one.detach().to(other.device), other.detach())


def _is_scheduled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a scheduler has left its mark, which is not `initial_lr`: programs set that themselves.

    `ReduceLROnPlateau` leaves none.
    """
    return hasattr(vars(optimizer).get("step"), "_wrapped_by_lr_sched")


def _scaler_around() -> Any:
    """The GradScaler that calls the optimizer, if one does and it is enabled."""
    frame: types.FrameType | None = sys._getframe(2)
    for _ in range(8):
        if frame is None:
            return None
        # Only there: to read the variables of a function of the program would keep them alive.
        if frame.f_globals.get("__name__") == torch.amp.GradScaler.__module__:
            one = frame.f_locals.get("self")
            if isinstance(one, torch.amp.GradScaler):
                return one if one.is_enabled() else None
        frame = frame.f_back
    return None
