"""Loads the first weights of a run, for fine-tuning, from another run's checkpoint or from a plain ``state_dict``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepguard.errors import CheckpointError, CheckpointMismatchError
from stepguard.options import Restoring
from stepguard.saving.unfound import first_weights_at
from stepguard.torch.checkpoint.files import read_file
from stepguard.torch.checkpoint.mismatch import mismatch
from stepguard.torch.checkpoint.program import Program
from stepguard.torch.checkpoint.reading import load
from stepguard.torch.checkpoint.redistribution import cut
from stepguard.torch.checkpoint.state import Component
from stepguard.words import listed, logger

_log = logger(__name__)

_SAFETENSORS = ".safetensors"


def take_first_weights(program: Program, options: Restoring) -> None:
    """Load the weights in ``options.init_from`` into the modules of the program. Its other state and step are ignored.

    Raises:
        FileNotFoundError: there is no file or checkpoint at that path.
        CheckpointMismatchError: the weights do not fit the modules; with ``init_fit="part"``, none of them fits.
    """
    if options.init_from is None:
        return
    modules = {part.name: part for part in program.components if isinstance(part.holder, nn.Module)}
    if isinstance(options.init_from, Mapping):
        found = {name: _of_part(name, Path(place)) for name, place in options.init_from.items()}
    else:
        found = _of_all(list(modules), Path(options.init_from))
    strangers = [name for name in found if name not in modules]
    if strangers or not found:
        raise CheckpointMismatchError(
            f"init_from={options.init_from!r}: expected weights of {listed(modules) or 'a module in the state'}, found "
            f"those of {listed(strangers) or 'none of them'}",
            missing=[*modules],
            unexpected=strangers,
        )
    fitting = {name: _fitting(modules[name], state, options) for name, state in found.items()}
    for name, state in fitting.items():
        part = modules[name]
        part.load(cut(name, state, part.shardings()))


def _of_part(name: str, place: Path) -> Any:
    found = _read(place)
    return found[name] if isinstance(found.get(name), Mapping) else _plain(found)


def _of_all(modules: list[str], place: Path) -> dict[str, Any]:
    """The states at ``place`` of the named ``modules``; or its only state, for the only module or for ``model``."""
    found = _read(place)
    by_name = {name: found[name] for name in modules if isinstance(found.get(name), Mapping)}
    if by_name:
        return by_name
    only = modules if len(modules) == 1 else [name for name in modules if name == "model"]
    return {name: _plain(found) for name in only}


def _plain(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``state_dict`` in ``found``; other trainers store it under a key, or prefix its names."""
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(found.get(name), Mapping):
            found = found[name]
            break
    for prefix in ("module.", "_orig_mod."):
        if found and all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): part for key, part in found.items()}
    return found


def _read(place: Path) -> Mapping[str, Any]:
    with first_weights_at(place):
        return _contents(place)


def _contents(place: Path) -> Mapping[str, Any]:
    if place.is_dir():
        return load(place)
    if place.suffix == _SAFETENSORS:
        return _read_safetensors(place)
    found = read_file(place)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{place}: expected a state_dict, found a {type(found).__name__}", path=place)
    return found


def _read_safetensors(place: Path) -> Mapping[str, Any]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{place}: reading it needs the package safetensors: pip install safetensors"
        ) from error
    tensors: Mapping[str, Any] = load_file(os.fspath(place))
    return tensors


def _fitting(part: Component, found: Mapping[str, Any], options: Restoring) -> Any:
    """The state to load: all of ``found``, or with ``init_fit="part"`` the live state updated with all that fits."""
    reasons = mismatch(part, found, is_left_out=lambda _: False)
    if not reasons:
        _log.info("%s: all first weights come from %s", part.name, options.init_from)
        return found
    live = part.state()
    taken = [
        key
        for key, tensor in found.items()
        if isinstance(tensor, torch.Tensor) and key in live and tensor.shape == live[key].shape
    ]
    if options.init_fit == "whole" or not taken:
        raise CheckpointMismatchError(
            f"init_from={options.init_from!r} does not fit this program: {reasons}. Nothing was changed. "
            f"{_way_out(taken, found, live)}",
            missing=reasons.missing,
            unexpected=reasons.unexpected,
            reshaped=reasons.reshaped,
        )
    _log.warning(
        "%s: %d of %d first weights come from %s; left as the program made them: %s; not used: %s",
        part.name,
        len(taken),
        len(live),
        options.init_from,
        listed([key for key in live if key not in taken]) or "none",
        listed([key for key in found if key not in taken]) or "none",
    )
    live.update({key: found[key] for key in taken})
    return live


def _way_out(taken: list[str], found: Mapping[str, Any], live: Mapping[str, Any]) -> str:
    """What to do about weights that do not fit; ``taken`` are the names of those that would."""
    if taken:
        return f"Restoring(init_fit='part') takes the {len(taken)} that fit"
    nothing = "No weight fits by name and shape, so there is nothing to take"
    wanted = next(iter(live), None)
    same = next((key for key in found if wanted and (key.endswith(f".{wanted}") or wanted.endswith(f".{key}"))), None)
    if wanted is None or same is None:
        return f"{nothing}: is it of this model? If its layers have other names, rename them and save the state_dict"
    return f"{nothing}, but {same!r} may be {wanted!r} under another prefix: rename the keys and save the state_dict"
