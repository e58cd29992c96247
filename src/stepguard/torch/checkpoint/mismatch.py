"""Checks whether a saved state fits the objects of a program, before anything is changed."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepguard.errors import CheckpointMismatchError
from stepguard.saving.mismatch import Mismatch
from stepguard.steps.values import Values
from stepguard.torch.checkpoint.in_place import part_at, tensors_in
from stepguard.torch.checkpoint.names import Names
from stepguard.torch.checkpoint.optimizers import is_of_optimizer
from stepguard.torch.checkpoint.state import Component, is_numpy_generator
from stepguard.words import listed, logger

_log = logger(__name__)


def mismatch_error(path: Path, found: Mismatch, held: Sequence[str]) -> CheckpointMismatchError:
    """The error for the checkpoint at ``path``, with the parts ``held``, that does not fit because of ``found``."""
    return CheckpointMismatchError(
        f"{path} does not fit this program: {found}. Nothing was changed. Start the program that wrote it, or use "
        f"another logdir; or restore a part of it with restoring=Restoring(only=..., leave_out=...), or by hand with "
        f"stepguard.torch.load({str(path)!r}), which has {listed(held)}",
        path=path,
        missing=found.missing,
        unexpected=found.unexpected,
        reshaped=found.reshaped,
    )


def mismatch(
    component: Component,
    saved: Any,
    *,
    is_left_out: Callable[[str], bool],
    built: Collection[str] | None = None,
    added: Collection[str] = (),
) -> Mismatch:
    """The reasons why ``saved`` cannot be loaded into the object, without the names for which ``is_left_out`` is true.

    ``built`` is what :meth:`Component.built` had returned then: a run may replace tensors in values by larger ones;
    ``added`` is that of :meth:`Component.added`. The parameters of an optimizer are compared in
    :mod:`stepguard.torch.checkpoint.optimizers`.
    """
    found = Mismatch()
    name, holder, live = component.name, component.holder, component.state()
    if not _is_of_this_kind(holder, live, saved):
        expected = f"the state of a {type(holder).__name__}" if live or not isinstance(live, Mapping) else "nothing"
        found.reshaped[name] = (expected, _described(saved))
    elif isinstance(holder, nn.Module):
        # Buffers that both programs build as `None` are there or not, as the first batch has made them.
        made = component.unfilled.keys() & set(built or ())
        # Those that steps register are there as soon as such a step was done.
        made |= {key for key in added if component.can_add(key)} | (set(component.added()) - saved.keys())
        _compare_modules(name, holder, live, saved, lambda key: key in made or is_left_out(f"{name}.{key}"), found)
    elif isinstance(holder, Values) and built is not None:
        for place, tensor in tensors_in(live):
            if repr(place) in built:
                _compare_shapes(".".join(map(str, (name, *place))), tensor, part_at(saved, place), found)
    elif isinstance(live, Mapping) and not isinstance(holder, torch.optim.Optimizer):
        # Only shapes are compared: the object may accept a state of an older version, with fewer or more keys.
        _compare_shapes(name, live, saved, found)
    return found


def _compare_modules(
    name: str, module: nn.Module, live: Any, saved: Any, is_left_out: Callable[[str], bool], found: Mismatch
) -> None:
    kept = {key: part for key, part in saved.items() if not is_left_out(key)}
    wanted = {key: part for key, part in live.items() if not is_left_out(key)}
    own = Mismatch(
        missing=[f"{name}.{key}" for key in wanted if key not in kept],
        unexpected=[f"{name}.{key}" for key in kept if key not in wanted],
    )
    _compare_shapes(name, wanted, kept, own)
    if own and not _adapts(module, {**live, **kept}):
        found.add(own)


def _adapts(module: nn.Module, saved: Mapping[str, Any]) -> bool:
    """Whether PyTorch loads ``saved`` because parts of the module have their own way of loading.

    This is tried on a copy on the meta device, which has shapes and no values.
    """
    if not any(_loads_by_itself(part) for part in module.modules()):
        return False
    tensors = itertools.chain(module.parameters(), module.buffers())
    bare: dict[int, Any] = {}
    for tensor in tensors:
        kind = nn.Parameter if isinstance(tensor, nn.Parameter) else lambda one, **_: one
        bare[id(tensor)] = kind(torch.empty_like(tensor, device="meta"), requires_grad=tensor.requires_grad)
    try:
        trial = copy.deepcopy(module, bare)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns that a load into meta tensors copies nothing.
            trial.load_state_dict(Names(trial).as_live(saved, trial))
    except Exception as error:  # noqa: BLE001 - the program's own code; any error means that the state does not fit
        _log.debug("not adapted: %s", error)
        return False
    return True


def _loads_by_itself(module: nn.Module) -> bool:
    kind = type(module)
    return (
        kind.set_extra_state is not nn.Module.set_extra_state
        or (
            kind._load_from_state_dict is not nn.Module._load_from_state_dict
            and not kind._load_from_state_dict.__module__.startswith("torch.nn.modules.")
        )
        or kind.load_state_dict is not nn.Module.load_state_dict
        or bool(module._load_state_dict_pre_hooks)
    )


def casts(component: Component, saved: Any) -> list[str]:
    """The tensors of a module that have another type in the checkpoint, so that loading casts them."""
    if not isinstance(component.holder, nn.Module):
        return []
    return [
        f"{component.name}.{key} ({saved[key].dtype} in the checkpoint, {part.dtype} in the program)"
        for key, part in component.state().items()
        if isinstance(part, torch.Tensor)
        and isinstance(saved.get(key), torch.Tensor)
        and not _is_extra(key)
        and saved[key].dtype != part.dtype
    ]


def _is_extra(key: str) -> bool:
    # A module defines the form and size of its extra state itself.
    return key.rpartition(".")[2] == "_extra_state"


def _is_of_this_kind(holder: Any, live: Any, saved: Any) -> bool:
    """Whether ``saved`` has the form of a state of an object like ``holder``, as far as that form is known."""
    if isinstance(live, Mapping) != isinstance(saved, Mapping):
        return False
    if isinstance(holder, torch.Generator):
        return set(saved) == {"state"} and isinstance(saved["state"], torch.Tensor)
    if isinstance(holder, random.Random):
        return set(saved) == {"state"} and isinstance(saved["state"], tuple)
    if is_numpy_generator(holder):
        return bool(saved.get("bit_generator") == live["bit_generator"])
    if isinstance(holder, torch.optim.Optimizer) and is_of_optimizer(live) != is_of_optimizer(saved):
        return False
    # A disabled GradScaler has an empty state, which an enabled one refuses.
    return isinstance(holder, (nn.Module, Values)) or not isinstance(live, Mapping) or bool(live) == bool(saved)


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
            if key in saved and not _is_extra(str(key)):
                _compare_shapes(f"{path}.{key}", live[key], saved[key], found)
