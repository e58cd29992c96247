"""What an optimizer keeps for each parameter, given back to that parameter by its name.

PyTorch's optimizers know their parameters by their order only. A checkpoint notes their names beside, so that a program
that builds its layers in another order, or adds the groups that it added while it ran, gives each its own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stepguard.saving.mismatch import Mismatch

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

GroupNames = Sequence[Sequence[str | None]]
"""The names of the parameters of each group; ``None`` for one that is in no module of the state."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How the saved state of one optimizer is put in place.

    ``order`` has, for each group, the numbers under which its parameters were saved; ``added`` the parameters of the
    groups that the program, as it is built, does not have yet.
    """

    order: list[list[Any]] = field(default_factory=list)
    added: list[list[torch.Tensor]] = field(default_factory=list)
    is_reordered: bool = False


def group_names(optimizer: torch.optim.Optimizer, known: Mapping[int, str]) -> list[list[str | None]]:
    """The names of the parameters, group by group."""
    return [[known.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]


def place(
    name: str,
    live: GroupNames,
    saved: Mapping[str, Any],
    saved_names: GroupNames | None,
    known: Mapping[str, torch.Tensor],
    is_left_out: Callable[[str], bool],
    found: Mismatch,
) -> Placement:
    """Where the saved state of the optimizer ``name`` belongs; what has no place is noted in ``found``.

    ``known`` are the parameters of all modules in the state, by their names. What is left out begins anew, and what was
    kept for it is forgotten.
    """
    numbers = [list(group["params"]) for group in saved["param_groups"]]
    if saved_names is None or [len(one) for one in saved_names] != [len(one) for one in numbers]:
        return Placement(numbers)
    added = _added(live, saved_names[len(live) :], known)
    wanted, held = _told_apart([*live, *added]), _told_apart(saved_names)
    number_of: dict[str, Any] = dict(zip(itertools.chain(*held), itertools.chain(*numbers), strict=True))
    for one in filter(is_left_out, itertools.chain(*wanted)):
        number_of[one] = f"left out: {one}"
    missing = [one for one in itertools.chain(*wanted) if one not in number_of]
    unexpected = number_of.keys() - set(itertools.chain(*wanted))
    found.missing += [f"{name}: the parameter {one}" for one in missing]
    found.unexpected += [f"{name}: the parameter {one}" for one in sorted(unexpected) if not is_left_out(one)]
    if missing:
        return Placement(numbers)
    order = [[number_of[one] for one in group] for group in wanted]
    return Placement(order, [[known[one] for one in group if one] for group in added], is_reordered=order != numbers)


def _added(live: GroupNames, behind: GroupNames, known: Mapping[str, torch.Tensor]) -> list[list[str | None]]:
    """The groups that were saved ``behind`` those that are there, if the modules have all of their parameters."""
    in_groups = set(itertools.chain(*live))
    added = [list(group) for group in behind]
    is_free = all(one in known and one not in in_groups for one in itertools.chain(*added))
    return added if is_free else []


def _told_apart(groups: GroupNames) -> list[list[str]]:
    # Parameters without a name are known by their order among each other.
    number = itertools.count()
    return [[f"number {next(number)} without a name" if one is None else one for one in group] for group in groups]


def check_placed(
    name: str, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], placement: Placement, found: Mismatch
) -> None:
    """Compare what the optimizer ``name`` has with what is placed there: groups, their keys, and shapes."""
    held = placed(saved, placement)["param_groups"]
    has = [*optimizer.param_groups, *({**held[0], "params": one} for one in placement.added)]
    if len(has) != len(held):
        found.reshaped[f"{name}.param_groups"] = (f"{len(has)} groups", f"{len(held)} groups")
        return
    for index, (one, other) in enumerate(zip(has, held, strict=True)):
        place = f"{name}.param_groups[{index}]"
        if len(one["params"]) != len(other["params"]):
            found.reshaped[place] = (f"{len(one['params'])} parameters", f"{len(other['params'])} parameters")
        # Without momentum, or with other betas: another optimizer.
        found.missing += [f"{place}.{key}" for key in one if key not in other and key != "param_names"]
        found.unexpected += [f"{place}.{key}" for key in other if key not in one and key != "param_names"]
    if not found and type(optimizer).step.__module__.startswith("torch.optim."):
        _compare_shapes(name, zip(has, held, strict=True), saved, found)


def _compare_shapes(name: str, groups: Iterable[tuple[Any, Any]], saved: Any, found: Mismatch) -> None:
    """What was kept for a parameter without a name is given to the one in its place, which may be another one."""
    for group, held in groups:
        for parameter, number in zip(group["params"], held["params"], strict=True):
            for key, part in saved["state"].get(number, {}).items():
                if key in _OF_PARAMETER_SHAPE and isinstance(part, torch.Tensor) and part.shape != parameter.shape:
                    pair = str(list(parameter.shape)), str(list(part.shape))
                    found.reshaped[f"{name}.state[{number}].{key}"] = pair


def add_groups(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], placement: Placement) -> None:
    """Add the groups that the program added while it ran, with the hyperparameters that they had."""
    for parameters, group in zip(placement.added, saved["param_groups"][len(optimizer.param_groups) :], strict=True):
        held = {key: copy.deepcopy(part) for key, part in group.items() if key not in ("params", "param_names")}
        if "param_names" in group:
            parameters = list(zip(group["param_names"], parameters, strict=True))
        optimizer.add_param_group({"params": parameters, **held})


def placed(saved: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    """The saved state with the parameters of its groups in the order of the program."""
    groups = []
    for group, order in zip(saved["param_groups"], placement.order, strict=True):
        group = {**group, "params": order}
        # Those of the program belong to its order.
        if placement.is_reordered:
            group.pop("param_names", None)
        groups.append(group)
    return {**saved, "param_groups": groups}


def keep_types(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Undo the casts of ``load_state_dict``: it turns what is kept for a parameter into the type of the parameter.

    An optimizer that keeps moments in float32 for parameters in bfloat16 would go on with rounded ones.
    """
    numbers = itertools.chain(*(group["params"] for group in saved["param_groups"]))
    parameters = itertools.chain(*(group["params"] for group in optimizer.param_groups))
    for number, parameter in zip(numbers, parameters, strict=True):
        kept = optimizer.state.get(parameter, {})
        for key, part in saved["state"].get(number, {}).items():
            now = kept.get(key)
            if isinstance(part, torch.Tensor) and isinstance(now, torch.Tensor) and now.dtype != part.dtype:
                kept[key] = part.detach().clone().to(now.device)
