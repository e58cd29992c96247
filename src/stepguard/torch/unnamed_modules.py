"""Modules that the steps change and that are not in the state, such as averaged weights or a loss with a running mean.

They are looked for among the variables around the loop. A few values of each of their tensors are compared, between the
beginning of a loop and a checkpoint in it: what the program copies for an evaluation between two loops is not meant.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from stepguard.steps.strangers import program_frames, variables
from stepguard.torch.checkpoint.in_place import tensors_in
from stepguard.torch.checkpoint.sharded_tensors import is_dtensor
from stepguard.torch.unnamed import LOST, is_equal
from stepguard.words import listed, logger

_log = logger(__name__)

_SAMPLED = 4
_MOST_LOOKS = 100


class UnnamedModules:
    """Warns, once each, of modules that are not in ``holders``. For a thread that holds the boundary."""

    def __init__(self, holders: Mapping[str, Any]) -> None:
        self._holders = holders
        self._found: dict[str, weakref.ref[nn.Module]] | None = None
        # By their variables: a few values of each tensor, at the beginning of the loop.
        self._began: dict[str, dict[str, list[Any]]] = {}
        # Each look waits for a device: what the first loops and checkpoints do not tell is left untold.
        self._looks_left = _MOST_LOOKS

    def begin_loop(self) -> None:
        """Look at the modules at the beginning of a loop."""
        try:
            if self._found is None:
                self._found = dict(self._find())
            self._began = dict(self._look()) if self._found else {}
        except Exception:  # noqa: BLE001 - a look at objects of the program, for a warning
            _log.debug("the modules around the loop could not be looked at", exc_info=True)

    def warn(self) -> None:
        """Warn of those that were changed since the loop began. Called for a checkpoint in the loop."""
        try:
            self._compare()
        except Exception:  # noqa: BLE001 - as above
            _log.debug("the modules around the loop could not be looked at", exc_info=True)

    def _compare(self) -> None:
        for place, now in list(self._look()) if self._began else ():
            began = self._began.get(place, {})
            changed = [name for name, values in now.items() if name in began and repr(values) != repr(began[name])]
            if not changed or self._found is None:
                continue
            module = self._found.pop(place)()
            lost = [] if module is None else [name for name in changed if not self._is_saved(_tensors(module)[name])]
            if lost:
                _log.warning(
                    "the steps change a module (%s) that is not in the state: %s; %s",
                    place,
                    listed([f"{place}.{name}" for name in lost]),
                    LOST,
                )

    def _find(self) -> Iterator[tuple[str, weakref.ref[nn.Module]]]:
        modules = [one for one in self._holders.values() if isinstance(one, nn.Module)]
        held = {id(tensor) for one in modules for tensor in _tensors(one).values()}
        seen = set()
        for frame in program_frames(sys._getframe(1)):
            for name, one in variables(frame):
                if not issubclass(type(one), nn.Module) or id(one) in seen:
                    continue
                seen.add(id(one))
                if any(id(tensor) not in held for tensor in _tensors(one).values()):
                    yield name, weakref.ref(one)

    def _look(self) -> Iterator[tuple[str, dict[str, list[Any]]]]:
        self._looks_left -= 1
        for place, reference in list((self._found or {}).items()) if self._looks_left >= 0 else ():
            module = reference()
            if module is not None:
                tensors = _tensors(module).items()
                yield place, {name: one.detach().reshape(-1)[:_SAMPLED].tolist() for name, one in tensors}

    def _is_saved(self, tensor: torch.Tensor) -> bool:
        """Whether an object of the state has the tensor, or a copy."""
        holders = [one for one in self._holders.values() if callable(getattr(type(one), "state_dict", None))]
        return any(is_equal(part, tensor) for one in holders for _, part in tensors_in(one.state_dict()))


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The plain tensors that the state of a module has."""
    apart = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: one for name, one in found.items() if name not in apart and _is_plain(one)}


def _is_plain(one: torch.Tensor) -> bool:
    is_strided = one.layout is torch.strided and not one.is_quantized
    return is_strided and not (is_dtensor(one) or one.is_meta or nn.parameter.is_lazy(one))
