"""Restores the state that an optimizer keeps for each parameter, by the name of the parameter.

PyTorch's optimizers know their parameters only by order. A checkpoint therefore also records their names. So each
parameter gets its own state back, even if the program builds its layers in another order or adds groups while it runs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stepguard.disk import schema
from stepguard.disk.schema import Each, Fields
from stepguard.saving.mismatch import Mismatch
from stepguard.steps.attributes import attributes
from stepguard.torch.checkpoint.in_place import Taken, taken_over
from stepguard.words import logger

_log = logger(__name__)

# The values that PyTorch's own optimizers keep in the shape of the parameter. Other optimizers may use these names for
# smaller tensors.
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

# What an optimizer holds by itself. Whatever else is in its attributes is of the class that the program has made.
_OWN = ("param_groups", "state", "defaults")
_MOST_MEMBERS = 1000
_HELD_DEPTH = 2
# What has no members to look at.
_LEAVES = (bool, int, float, str, bytes, torch.Tensor, type(None))

_FORM = Fields({"state": Each((object,), (object,)), "param_groups": Each(Fields({"params": Each((object,))}))})

GroupNames = Sequence[Sequence[str | None]]
"""The names of the parameters of each group; ``None`` for a parameter that is in no module of the state."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How the saved state of one optimizer is put in place.

    ``order`` has, for each group, the numbers under which its parameters were saved. ``added`` has the parameters of
    those saved groups that the newly built program does not have yet. ``moved`` names the parameters that now are in a
    group of other options.
    """

    order: list[list[Any]] = field(default_factory=list)
    added: list[list[torch.Tensor]] = field(default_factory=list)
    is_reordered: bool = False
    moved: list[str] = field(default_factory=list)


def is_of_optimizer(state: Any) -> bool:
    """Whether ``state`` has the form that PyTorch's own optimizers give theirs; a class of the program may give any."""
    return schema.is_like(state, _FORM)


def states_in(state: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """The states of optimizers in the state of an object, such as a trainer of the program, each with its place."""
    if is_of_optimizer(state):
        yield place, state
    elif len(place) < _HELD_DEPTH and isinstance(state, (Mapping, list, tuple)):
        for key, part in state.items() if isinstance(state, Mapping) else enumerate(state[:_MOST_MEMBERS]):
            if isinstance(part, (Mapping, list, tuple)):
                yield from states_in(part, (*place, key))


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
    """Decide where the saved state of the optimizer ``name`` goes; parameters without a place are added to ``found``.

    ``known`` has the parameters of all modules in the state, by their names. A parameter that is left out begins anew,
    and its saved state is dropped.
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
    return Placement(
        order,
        [[known[one] for one in group if one] for group in added],
        is_reordered=order != numbers,
        moved=list(_moved(name, wanted, held, saved["param_groups"])),
    )


def _moved(optimizer: str, wanted: GroupNames, held: GroupNames, groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    options = [
        repr({key: one for key, one in group.items() if key not in ("params", "param_names")}) for group in groups
    ]
    was = {name: index for index, group in enumerate(held) for name in group}
    for index, group in enumerate(wanted[: len(groups)]):
        for name in group:
            before = was.get(name, index)
            if options[before] != options[index]:
                yield f"{optimizer}: {name} (group {index} in the program, {before} in the checkpoint)"


def _added(live: GroupNames, behind: GroupNames, known: Mapping[str, torch.Tensor]) -> list[list[str | None]]:
    """The groups that were saved ``behind`` the live ones, if modules of the state have all their parameters."""
    in_groups = set(itertools.chain(*live))
    added = [list(group) for group in behind]
    is_free = all(one in known and one not in in_groups for one in itertools.chain(*added))
    return added if is_free else []


def _told_apart(groups: GroupNames) -> list[list[str]]:
    # Parameters without a name are told apart by their order.
    number = itertools.count()
    return [[f"number {next(number)} without a name" if one is None else one for one in group] for group in groups]


def check_placed(
    name: str, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], placement: Placement, found: Mismatch
) -> None:
    """Compare the optimizer ``name`` with the state that is placed in it: its groups, their keys, and shapes."""
    # A group that is added has the keys of the saved one that it goes on as.
    like = zip(saved["param_groups"][len(optimizer.param_groups) :], placement.added, strict=False)
    has = [*optimizer.param_groups, *({**one, "params": added} for one, added in like)]
    count = len(saved["param_groups"])
    if len(has) != count:
        found.reshaped[f"{name}.param_groups"] = (
            f"{len(has)} groups",
            f"{count} groups: build those that stepguard.torch.newest(logdir).groups shows",
        )
        return
    held = placed(saved, placement)["param_groups"]
    for index, (one, other) in enumerate(zip(has, held, strict=True)):
        place = f"{name}.param_groups[{index}]"
        if len(one["params"]) != len(other["params"]):
            found.reshaped[place] = (f"{len(one['params'])} parameters", f"{len(other['params'])} parameters")
        # Other keys mean another kind of optimizer.
        found.missing += [f"{place}.{key}" for key in one if key not in other and key != "param_names"]
        found.unexpected += [f"{place}.{key}" for key in other if key not in one and key != "param_names"]
    if not found and type(optimizer).step.__module__.startswith("torch.optim."):
        _compare_shapes(name, zip(has, held, strict=True), saved, found)


def _compare_shapes(name: str, groups: Iterable[tuple[Any, Any]], saved: Any, found: Mismatch) -> None:
    """Compare the shapes of the saved state with those of the parameters.

    A parameter without a name gets the state that was saved in its position, which may belong to another parameter.
    """
    for group, held in groups:
        for parameter, number in zip(group["params"], held["params"], strict=True):
            for key, part in saved["state"].get(number, {}).items():
                if key in _OF_PARAMETER_SHAPE and isinstance(part, torch.Tensor) and part.shape != parameter.shape:
                    pair = str(list(parameter.shape)), str(list(part.shape))
                    found.reshaped[f"{name}.state[{number}].{key}"] = pair


def add_groups(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], placement: Placement) -> None:
    """Add the groups that the saved run had added, with their hyperparameters."""
    for parameters, group in zip(placement.added, saved["param_groups"][len(optimizer.param_groups) :], strict=True):
        held = {key: copy.deepcopy(part) for key, part in group.items() if key not in ("params", "param_names")}
        named: Any = parameters
        if "param_names" in group:
            named = list(zip(group["param_names"], parameters, strict=True))
        optimizer.add_param_group({"params": named, **held})
    if placement.added:
        _let_be_added_again(optimizer, optimizer.param_groups[-len(placement.added) :])


def _let_be_added_again(optimizer: torch.optim.Optimizer, restored: Sequence[dict[str, Any]]) -> None:
    """Let the program, which comes to the same place again, add each of the ``restored`` groups once without effect."""
    left, add = list(restored), optimizer.add_param_group

    def add_param_group(group: dict[str, Any]) -> None:
        given = group.get("params")
        if isinstance(given, Iterator):
            given = group["params"] = list(given)
        parameters = [given] if isinstance(given, torch.Tensor) else list(given or ())
        wanted = {id(one[1] if isinstance(one, tuple) else one) for one in parameters}
        for one in left:
            held = set(map(id, one["params"]))
            if held == wanted:
                left.remove(one)
                _log.info(
                    "a parameter group was added again, and stays as the checkpoint has it: %d parameters", len(held)
                )
                # The program may go on with the dictionary that it has given.
                group.clear()
                group.update(one)
                optimizer.param_groups[:] = [group if each is one else each for each in optimizer.param_groups]
                return
            if held & wanted:
                raise ValueError(
                    f"add_param_group: expected the group of {len(held)} parameters that the run had added, found "
                    f"one of {len(wanted)}, with {len(held & wanted)} of these; add the same group as before, or look "
                    f"first what the checkpoint has: stepguard.torch.newest(logdir).groups"
                )
        add(group)

    optimizer.add_param_group = add_param_group


def placed(saved: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    """The saved state with the parameters of its groups in the order of the program."""
    groups = []
    for group, order in zip(saved["param_groups"], placement.order, strict=True):
        group = {**group, "params": order}
        # The saved names are in the saved order; the optimizer's own names are in the program's order.
        if placement.is_reordered:
            group.pop("param_names", None)
        groups.append(group)
    return {**saved, "param_groups": groups}


def optimizers_in(name: str, holder: Any) -> dict[str, torch.optim.Optimizer]:
    """The optimizers that ``holder``, an object of the state, is or has in its attributes, by their places in it."""
    found: dict[str, torch.optim.Optimizer] = {}
    level, seen = {name: holder}, set[int]()
    for _ in range(_HELD_DEPTH + 1):
        level = {place: one for place, one in level.items() if id(one) not in seen}
        seen.update(map(id, level.values()))
        # The type decides, because some objects run code if they are asked for their class.
        found.update({place: one for place, one in level.items() if issubclass(type(one), torch.optim.Optimizer)})
        level = {f"{place}.{key}": one for place, holds in level.items() for key, one in _members(holds)}
    return found


def _members(one: Any) -> Iterable[tuple[Any, Any]]:
    kind = type(one)
    if issubclass(kind, (list, tuple)):
        return [(number, part) for number, part in enumerate(one[:_MOST_MEMBERS]) if not isinstance(part, _LEAVES)]
    if issubclass(kind, torch.nn.Module):
        return ()
    held = one if issubclass(kind, dict) else attributes(one)
    own = _OWN if issubclass(kind, torch.optim.Optimizer) else ()
    members = itertools.islice(held.items(), _MOST_MEMBERS)
    return [(key, part) for key, part in members if not isinstance(part, _LEAVES) and key not in own]


def has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks can be registered: a class of the program may leave out the constructor of its base."""
    return "_optimizer_step_post_hooks" in getattr(optimizer, "__dict__", ())


def _has_load_hooks(optimizer: torch.optim.Optimizer) -> bool:
    return "_optimizer_load_state_dict_post_hooks" in getattr(optimizer, "__dict__", ())


@contextlib.contextmanager
def kept(optimizers: Iterable[torch.optim.Optimizer], *, types: bool) -> Iterator[None]:
    """A block in which ``load_state_dict`` leaves these optimizers the objects that a program may hold.

    They are the list of groups, each group, learning rates that are tensors, and the dictionary of the state. With
    ``types`` the saved tensors keep their types.
    """
    held: dict[int, tuple[Any, ...]] = {}

    def before(optimizer: torch.optim.Optimizer, saved: Any) -> None:
        groups = optimizer.param_groups
        held[id(optimizer)] = groups, list(groups), optimizer.state, saved

    def after(optimizer: torch.optim.Optimizer) -> None:
        groups, each, state, saved = held.pop(id(optimizer))
        if types:
            keep_types(optimizer, saved)
        _put_back(optimizer, groups, each, state)

    with contextlib.ExitStack() as stack:
        for one in filter(_has_load_hooks, optimizers):
            stack.callback(one.register_load_state_dict_pre_hook(before).remove)
            # First, because a hook of the program may hand on what it finds.
            stack.callback(one.register_load_state_dict_post_hook(after, prepend=True).remove)
        yield


def _put_back(optimizer: torch.optim.Optimizer, groups: list[Any], each: list[dict[str, Any]], state: Any) -> None:
    loaded, taken = optimizer.param_groups, Taken()
    for group, new in zip(each, loaded, strict=True):
        if group is not new:
            contents = {key: taken_over(group.get(key), part, taken) for key, part in new.items()}
            group.clear()
            group.update(contents)
    groups[:] = each
    optimizer.param_groups = groups
    if optimizer.state is not state and isinstance(state, dict):
        contents = dict(optimizer.state)
        state.clear()
        state.update(contents)
        optimizer.state = state


def keep_types(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Undo the casts of ``load_state_dict``, which converts the state of a parameter to the parameter's type.

    Without this, an optimizer that keeps float32 moments for bfloat16 parameters would continue with rounded moments.
    """
    numbers = itertools.chain(*(group["params"] for group in saved["param_groups"]))
    parameters = itertools.chain(*(group["params"] for group in optimizer.param_groups))
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in saved["state"] and parameter in optimizer.state:
            optimizer.state[parameter] = _with_types(optimizer.state[parameter], saved["state"][number])


def _with_types(now: Any, saved: Any) -> Any:
    if isinstance(now, torch.Tensor) and isinstance(saved, torch.Tensor):
        return now if now.dtype == saved.dtype else saved.detach().clone().to(now.device)
    if isinstance(now, dict) and isinstance(saved, Mapping):
        now.update({key: _with_types(part, saved[key]) for key, part in now.items() if key in saved})
    elif isinstance(now, (list, tuple)) and type(now) is type(saved) and len(now) == len(saved):
        return type(now)(_with_types(part, other) for part, other in zip(now, saved, strict=True))
    return now
