"""Optimizers, schedules and gradient scalers that train with the program and are not in its state.

They begin anew at a restart: moments are lost, a learning rate begins its schedule again. PyTorch tells every step of
every optimizer, so that one can look.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from stepguard.words import logger

_log = logger(__name__)

_PLAIN = (bool, int, float, str, bytes, type(None))
_MOST_MEMBERS = 1000
_LOST = "a restart begins with a new one, so that it is not the same run; add it to the state of the Supervisor"


class Unnamed:
    """Warns, once each, of what is missing in ``holders``, the objects of the state by their names.

    ``step`` returns the number of the running training step on this thread, or ``None``.
    """

    def __init__(self, holders: Mapping[str, Any], step: Callable[[], int | None]) -> None:
        self._holders = holders
        self._step = step
        self._names = {id(one): name for name, one in holders.items() if isinstance(one, torch.optim.Optimizer)}
        self._reached = reached(holders.values())
        # The steps in which optimizers were first called, and those that have been looked at. By weak references: one
        # that is gone leaves its id to the next.
        self._first: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._hook = register_optimizer_step_post_hook(self._after)

    def close(self) -> None:
        """Look no more."""
        self._hook.remove()

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Look at an optimizer that was stepped. It runs inside the program's step, and raises nothing."""
        if optimizer in self._known:
            return
        try:
            self._look_at(optimizer)
        except Exception:  # noqa: BLE001 - a look at objects of the program, for a warning
            _log.debug("an optimizer could not be looked at", exc_info=True)

    def _look_at(self, optimizer: torch.optim.Optimizer) -> None:
        step = self._step()
        # In its second step: a schedule may be made after the session began, and an optimizer for one step is no part
        # of the training.
        if step is None or self._first.setdefault(optimizer, step) == step:
            return
        self._known.add(optimizer)
        name = self._names.get(id(optimizer))
        if name is None:
            if self._is_reached(optimizer):
                return
            if len(optimizer.state) or _is_scheduled(optimizer):
                _log.warning(
                    "an optimizer (%s) trains in the steps, and it is not in the state: its moments and its learning "
                    "rate are lost; %s",
                    type(optimizer).__name__,
                    _LOST,
                )
            return
        if _is_scheduled(optimizer) and not self._has_schedule(optimizer):
            _log.warning("%s has a learning rate scheduler, and that is not in the state: %s", name, _LOST)
        scaler = _scaler_around()
        if scaler is not None and not self._is_reached(scaler):
            _log.warning("%s is stepped by a GradScaler, and that is not in the state: %s", name, _LOST)

    def _is_reached(self, one: Any) -> bool:
        return any(held is one for held in self._reached)

    def _has_schedule(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an object of the state schedules the optimizer, of whatever library."""
        return any(getattr(one, "optimizer", None) is optimizer for one in self._reached)


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
    return list(getattr(one, "__dict__", {}).values())[:_MOST_MEMBERS]


def _is_scheduled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a scheduler has left its mark. `ReduceLROnPlateau` leaves none."""
    return any("initial_lr" in group for group in optimizer.param_groups)


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
