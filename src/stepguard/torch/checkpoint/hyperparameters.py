"""Compares the hyperparameters that the program sets (learning rates, betas, schedules) with those of the checkpoint.

``load_state_dict`` silently replaces the hyperparameters of an optimizer by the saved ones, so a learning rate that was
changed in the program would have no effect. Each checkpoint therefore records the values that its program had set
when it was built, besides the current values that a schedule has changed. They are compared at a restore, and
differences are reported. So are the numbers in the states of objects of other classes, such as a schedule or an average
of the program's own: one that differs when the object is built was changed by the user, and not by the training.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import time
import types
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from stepguard.steps.attributes import attributes
from stepguard.steps.values import Values
from stepguard.torch.checkpoint.in_place import part_at
from stepguard.torch.checkpoint.optimizers import states_in
from stepguard.torch.checkpoint.state import Component, is_numpy_scalar

Place = tuple[Any, ...]
"""The keys and indices that lead from the state of an object to a value in it."""

Settings = dict[str, Any]
"""The values that a program has set for one object, by their places as :func:`_shown` writes them."""

# These keys hold the progress of a schedule, not its settings.
_MOVES = {
    "last_epoch",
    "_step_count",
    "_last_lr",
    "_get_lr_called_within_step",
    "_is_initial",
    "_growth_tracker",
    "best",
    "cooldown_counter",
    "num_bad_epochs",
}

_NUMBERS = (bool, int, float, complex, str, type(None))

# What steps with these options keep besides, and what has its form.
_SUMS = {
    "amsgrad": ("max_exp_avg_sq", "exp_avg_sq"),
    "centered": ("grad_avg", "square_avg"),
    "momentum": ("momentum_buffer", "square_avg"),
}

_MOST_NUMBERS = 100
_MOST_PLACES = 1000
_MOST_CHARACTERS = 100
_DEPTH = 5
_DAY_SECS = 86400

_WITH_SETTINGS = (torch.optim.Optimizer, LRScheduler, torch.amp.GradScaler)


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that the program sets differently from the run that wrote the checkpoint."""

    part: str
    kind: str
    place: str
    in_program: Any
    in_checkpoint: Any
    program_wins: bool = False

    def __str__(self) -> str:
        """The place, and the values in the program and in the checkpoint."""
        return (
            f"{self.part}.{self.place} of {self.kind} ({self.in_program} in the program, {self.in_checkpoint} in the "
            f"checkpoint)"
        )


def settings(component: Component) -> Settings:
    """The numbers that the program has set in the state of an object, and the class of an optimizer or a schedule."""
    places = {_shown(place): value for place, value in _places(component, component.state())}
    if not isinstance(component.holder, _WITH_SETTINGS):
        return places
    return {"class": type(component.holder).__name__, **places, **_of_functions(component.holder)}


def _places(component: Component, state: Any) -> Iterator[tuple[Place, Any]]:
    holder = component.holder
    if isinstance(holder, nn.Module) or component.is_stream:
        return iter(())
    if isinstance(holder, (LRScheduler, torch.amp.GradScaler)):
        return _numbers((), state)
    optimizers = dict(states_in(state))
    found = [_numbers((*place, "param_groups"), one["param_groups"]) for place, one in optimizers.items()]
    if not isinstance(holder, torch.optim.Optimizer):
        kinds = (bool, int, float) if isinstance(holder, Values) else _NUMBERS
        own = (one for one in _own_numbers((), state, optimizers) if isinstance(one[1], kinds))
        found.append(itertools.islice(own, _MOST_PLACES))
    return itertools.chain(*found)


def _own_numbers(place: Place, value: Any, besides: Mapping[Place, Any]) -> Iterator[tuple[Place, Any]]:
    """The numbers and strings in the state of an object of the program's own class, without long lists."""
    if place in besides or len(place) > _DEPTH:
        return
    if type(value) in (dict, OrderedDict):
        for key, part in value.items():
            if isinstance(key, (str, int)) and key not in _MOVES:
                yield from _own_numbers((*place, key), part, besides)
    elif type(value) in (list, tuple):
        for index, part in enumerate(value if len(value) <= _MOST_NUMBERS else ()):
            yield from _own_numbers((*place, index), part, besides)
    elif _is_number(value) and not _is_of_this_start(value):
        yield place, _as_plain(value)


def _is_of_this_start(value: Any) -> bool:
    """Whether the value tells the time, or is a text that may be anything."""
    if isinstance(value, str):
        return len(value) > _MOST_CHARACTERS
    return isinstance(value, (int, float)) and abs(value - time.time()) < _DAY_SECS


def _numbers(place: Place, value: Any) -> Iterator[tuple[Place, Any]]:
    """The numbers and strings in a nested state that are settings, so that they do not change during a run."""
    if isinstance(value, Counter):
        # The milestones of MultiStepLR.
        yield place, sorted(value.elements())
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if key not in ("params", "param_names") and key not in _MOVES:
                yield from _numbers((*place, key), part)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _numbers((*place, index), part)
    elif isinstance(value, torch.Tensor):
        if value.numel() == 1:
            yield place, value.item()
    elif _is_number(value):
        yield place, _as_plain(value)


def _of_functions(holder: Any) -> Settings:
    """The numbers that the functions of a LambdaLR use; the length of a schedule is often one of them."""
    found = {}
    for index, function in enumerate(getattr(holder, "lr_lambdas", ())):
        for name, value in _bound(function):
            if _is_number(value):
                found[f"lr_lambdas[{index}].{name}"] = _as_plain(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(_as_plain(value), _NUMBERS)


def _as_plain(value: Any) -> Any:
    """The number that a file can hold: NumPy's float64 is a float too, and reading one would run code."""
    return value.item() if is_numpy_scalar(value) else value


def _bound(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function uses beside its arguments: bound ones, defaults, its object, its closure, and globals."""
    if isinstance(function, functools.partial):
        yield from function.keywords.items()
        yield from ((f"argument {number}", value) for number, value in enumerate(function.args))
        function = function.func
    if isinstance(function, types.MethodType):
        yield from attributes(function.__self__).items()
        function = function.__func__
    if isinstance(function, types.FunctionType):
        code, defaults = function.__code__, function.__defaults__ or ()
        positional = code.co_varnames[: code.co_argcount]
        yield from zip(positional[len(positional) - len(defaults) :], defaults, strict=True)
        yield from (function.__kwdefaults__ or {}).items()
        variables = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # The variable has no value yet.
                variables[name] = cell.cell_contents
        for name, value in variables.items():
            yield name, value
            yield from ((f"{name}.{key}", part) for key, part in _named_in(code, value))


def _named_in(code: types.CodeType, value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes or items of a configuration that a function names, as ``args.warmup`` or ``config["warmup"]``."""
    if type(value) is dict:
        yield from ((key, part) for key, part in value.items() if isinstance(key, str) and key in code.co_consts)
    elif not isinstance(value, (type, types.ModuleType, types.FunctionType)):
        yield from ((key, part) for key, part in attributes(value).items() if key in code.co_names)


def _shown(place: Place) -> str:
    return "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in place).removeprefix(".")


def differences(
    component: Component, saved: Any, program: Settings, before: Settings, *, all_of_program: bool
) -> list[Difference]:
    """The values that the program sets differently from the run ``before``.

    Ignored are values that only one of them sets, and those that the run had changed to the program's by itself: the
    ``saved`` state has them.
    """
    held = {_shown(place): value for place, value in _places(component, saved)}
    return [
        Difference(
            component.name,
            type(component.holder).__name__,
            place,
            value,
            before[place],
            program_wins=all_of_program or _program_must_win(program, place, before),
        )
        for place, value in program.items()
        if place in before and _differ(value, before[place]) and (place not in held or _differ(value, held[place]))
    ]


def _differ(one: Any, other: Any) -> bool:
    return bool(one != other) and not (one != one and other != other)


def in_force(component: Component, found: Sequence[Difference]) -> list[Difference]:
    """The differences in an object that was loaded, each with the winner: the object itself may keep the program's."""
    now = {_shown(place): value for place, value in _places(component, component.state())}
    return [
        replace(one, program_wins=True) if one.place in now and now[one.place] == one.in_program else one
        for one in found
    ]


def _program_must_win(program: Settings, place: str, checkpoint: Settings) -> bool:
    """Whether the checkpoint's value cannot be used.

    A checkpoint holds no functions and no classes. And a OneCycleLR with the checkpoint's smaller ``total_steps`` would
    raise an error after its cycle.
    """
    if place == "class" or place.startswith("lr_lambdas"):
        return True
    if program.get("class") != "OneCycleLR" or not place.startswith(("total_steps", "_schedule_phases")):
        return False
    return bool(program.get("total_steps", 0) > checkpoint.get("total_steps", 0))


def with_programs(component: Component, saved: Any, found: Sequence[Difference], before: Settings) -> Any:
    """The saved state, with the program's values in the places of those differences where the program wins.

    If a schedule has changed the learning rate during the run, the program's rate is scaled by the same factor.
    """
    won = {one.place for one in found if one.program_wins}
    if not won:
        return saved
    now = settings(component)
    for place, value in _places(component, component.state()):
        if _shown(place) in won:
            if value and place[-1] in _SUMS:
                saved = _with_sums(saved, place)
            is_rate = place[-1] == "lr"
            saved = _replaced(saved, place, _moved(saved, place, value, before, now) if is_rate else value)
    return saved


def _with_sums(saved: Any, place: Place) -> Any:
    """The saved state with the sums, at 0 as in a first step, that the steps need with the option at ``place``."""
    sums, like = _SUMS[place[-1]]
    *around, _, index, _ = place
    optimizer = part_at(saved, tuple(around))
    for number in optimizer["param_groups"][index]["params"]:
        held = optimizer["state"].get(number, {})
        if like in held and sums not in held:
            saved = _replaced(saved, (*around, "state", number), {**held, sums: torch.zeros_like(held[like])})
    return saved


def _moved(saved: Any, place: Place, value: float, before: Settings, now: Settings) -> float:
    group, initial = saved, _shown((*place[:-1], "initial_lr"))
    if not before.get(initial) or initial not in now:
        return value
    for key in place[:-1]:
        group = group[key]
    return float(group["lr"]) * float(now[initial]) / float(before[initial])


def _replaced(state: Any, place: Place, value: Any) -> Any:
    """A copy of a nested state with another value in one place; the state itself if it has no such place."""
    if not place:
        if isinstance(state, torch.Tensor):
            return torch.full_like(state, value)
        return Counter(value) if isinstance(state, Counter) else value
    key, rest = place[0], place[1:]
    if isinstance(state, Mapping):
        if key not in state:
            return state
        changed = copy.copy(state)
        changed[key] = _replaced(state[key], rest, value)  # type: ignore[index]
        return changed
    if key >= len(state):
        return state
    parts = list(state)
    parts[key] = _replaced(state[key], rest, value)
    return type(state)(parts)
