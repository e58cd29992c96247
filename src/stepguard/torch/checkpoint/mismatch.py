"""Whether a saved state fits the objects of a program, found out before anything is changed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepguard.errors import CheckpointMismatchError
from stepguard.saving.mismatch import Mismatch
from stepguard.torch.checkpoint.files import SUFFIX, is_process
from stepguard.torch.checkpoint.state import Component, is_numpy_generator
from stepguard.words import listed

# What PyTorch's own optimizers keep in the shape of the parameter. Others may use the same names for what is smaller.
_OF_PARAMETER_SHAPE = {
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "acc_delta",
    "sum",
    "prev",
    "step_size",
    "ax",
}


def check_fits(
    path: Path, components: Sequence[Component], held: Sequence[str], states: Mapping[str, Any], *, is_sharded: bool
) -> None:
    """Compare the objects of the program with the checkpoint at ``path``, which ``is_sharded`` or not.

    ``held`` are the names of all that the checkpoint holds; ``states`` has the states of those that the program has.

    Raises:
        CheckpointMismatchError: there is a difference. It lists all of them.
    """
    names = [component.name for component in components]
    found = Mismatch(
        missing=[name for name in names if name not in held],
        unexpected=[name for name in held if name not in names],
    )
    for component in components:
        if component.name in held:
            found.add(mismatch(component, states[component.name]))
    if found:
        raise CheckpointMismatchError(
            f"{path} does not fit this program: {found}. Nothing was changed. Start the program that wrote it, or use "
            f"another logdir; a part of it can be loaded with {_by_hand(path, is_sharded)}",
            path=path,
            missing=found.missing,
            unexpected=found.unexpected,
            reshaped=found.reshaped,
        )


def mismatch(component: Component, saved: Any) -> Mismatch:
    """What keeps ``saved`` from being loaded into the object; nothing is changed."""
    found = Mismatch()
    holder, live = component.holder, component.state()
    if not _is_of_this_kind(holder, live, saved):
        found.reshaped[component.name] = (f"the state of a {type(holder).__name__}", _described(saved))
    elif isinstance(holder, torch.optim.Optimizer):
        _compare_groups(component.name, live, saved, found)
        if not found and type(holder).step.__module__.startswith("torch.optim."):
            _compare_parameters(component.name, holder, saved, found)
    elif isinstance(live, Mapping) and isinstance(saved, Mapping):
        # An object of another kind may itself accept a state of an older version, with fewer keys or more.
        if isinstance(holder, nn.Module):
            found.missing += [f"{component.name}.{key}" for key in live if key not in saved]
            found.unexpected += [f"{component.name}.{key}" for key in saved if key not in live]
        _compare_shapes(component.name, live, saved, found)
    return found


def _is_of_this_kind(holder: Any, live: Any, saved: Any) -> bool:
    """Whether ``saved`` may be the state of an object like ``holder``, as far as its kind has a form of its own."""
    if isinstance(live, Mapping) != isinstance(saved, Mapping):
        return False
    if isinstance(holder, torch.Generator):
        return set(saved) == {"state"} and isinstance(saved["state"], torch.Tensor)
    if isinstance(holder, random.Random):
        return set(saved) == {"state"} and isinstance(saved["state"], tuple)
    if is_numpy_generator(holder):
        return bool(saved.get("bit_generator") == live["bit_generator"])
    if isinstance(holder, torch.optim.Optimizer):
        return {"state", "param_groups"} <= set(saved)
    return True


def _compare_groups(name: str, live: Any, saved: Any, found: Mismatch) -> None:
    """An optimizer knows its parameters by their order only, so their number in each group has to agree."""
    has, held = live.get("param_groups", []), saved.get("param_groups", [])
    if len(has) != len(held):
        found.reshaped[f"{name}.param_groups"] = (f"{len(has)} groups", f"{len(held)} groups")
        return
    for index, (one, other) in enumerate(zip(has, held, strict=True)):
        place = f"{name}.param_groups[{index}]"
        if len(one["params"]) != len(other["params"]):
            found.reshaped[place] = (f"{len(one['params'])} parameters", f"{len(other['params'])} parameters")
        # Without momentum, or with other betas: another optimizer.
        found.missing += [f"{place}.{key}" for key in one if key not in other]
        found.unexpected += [f"{place}.{key}" for key in other if key not in one and key != "param_names"]


def _compare_parameters(name: str, optimizer: torch.optim.Optimizer, saved: Any, found: Mismatch) -> None:
    """What was kept for a parameter is given to the one in its place: in another order it would be that of another."""
    for group, held in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], held["params"], strict=True):
            for key, part in saved["state"].get(number, {}).items():
                if key in _OF_PARAMETER_SHAPE and isinstance(part, torch.Tensor) and part.shape != parameter.shape:
                    pair = str(list(parameter.shape)), str(list(part.shape))
                    found.reshaped[f"{name}.state[{number}].{key}"] = pair


def _described(state: Any) -> str:
    if not isinstance(state, Mapping):
        return f"a {type(state).__name__}"
    return f"values named {listed(map(str, state), most=10)}" if state else "nothing"


def _compare_shapes(path: str, live: Any, saved: Any, found: Mismatch) -> None:
    if isinstance(live, torch.Tensor) and isinstance(saved, torch.Tensor):
        if live.shape != saved.shape:
            found.reshaped[path] = (str(list(live.shape)), str(list(saved.shape)))
        elif live.layout != saved.layout:
            found.reshaped[path] = (str(live.layout), str(saved.layout))
    elif isinstance(live, Mapping) and isinstance(saved, Mapping):
        for key in live:
            if key in saved:
                _compare_shapes(f"{path}.{key}", live[key], saved[key], found)


def _by_hand(path: Path, is_sharded: bool) -> str:
    if is_sharded:
        return f"torch.distributed.checkpoint.load(..., checkpoint_id={str(path)!r})"
    # One that is there, to be copied.
    file = next((one for one in sorted(path.glob(f"*{SUFFIX}")) if not is_process(one.stem)), path)
    return f"torch.load({str(file)!r})"
