"""What modules and optimizers keep in plain attributes, beside their ``state_dict``, and change while they train.

A temperature that is annealed, the rate of a dropout, a BatchNorm that was set to ``eval()`` on the way: they decide
the next step, and no ``state_dict`` has them. Numbers, strings and modes that have changed are saved and put back.
Tensors, such as a hidden state or a buffer that is not persistent, are not; a restart names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stepguard.torch.checkpoint.names import Names
from stepguard.torch.checkpoint.state import Component
from stepguard.words import listed, logger

_log = logger(__name__)

_PLAIN = (bool, int, float, str, type(None))
_MODE = "training"


class Attributes:
    """The attributes of the program's modules and optimizers. For a thread that holds the boundary."""

    def __init__(self, components: Sequence[Component]) -> None:
        self._components = [one for one in components if isinstance(one.holder, (nn.Module, torch.optim.Optimizer))]
        self._as_built = dict(self._plain())
        self._tensors_as_built = dict(self._tensors())

    def notes(self) -> dict[str, Any]:
        """Those that have changed since the program was built, with what they were then; and the names of tensors."""
        now = dict(self._plain())
        found = {key: [self._as_built.get(key), value] for key, value in now.items() if self._has_changed(key, value)}
        tensors = [key for key, value in self._tensors() if self._tensors_as_built.get(key) != value]
        return {"changed": found, "tensors": tensors}

    def restore(self, notes: Mapping[str, Any]) -> None:
        """Put back what the run had changed. What the program builds otherwise than before stays, and is named."""
        others = []
        for key, (before, value) in notes.get("changed", {}).items():
            place = self._places.get(key.rpartition(".")[0])
            if place is None:
                continue
            if self._as_built.get(key) != before:
                others.append(f"{key} ({self._as_built.get(key)} in the program, {value} in the checkpoint)")
                continue
            root, one = place
            name = key.rpartition(".")[2]
            setattr(one, name, (root.training if value else not root.training) if name == _MODE else value)
        if others:
            _log.warning(
                "the program builds attributes otherwise than the run that is resumed, and they stay as they are: %s",
                listed(others),
            )
        if notes.get("tensors"):
            _log.warning(
                "the run had changed tensors that are in no state_dict, and they begin as the program makes them: %s. "
                "If a step depends on the step before through them, register them as buffers, or keep them in "
                "stepguard.torch.Values",
                listed(notes["tensors"]),
            )

    @property
    def _places(self) -> dict[str, tuple[Any, Any]]:
        return {name: (root, one) for name, root, one in self._objects()}

    def _has_changed(self, key: str, value: Any) -> bool:
        return key not in self._as_built or self._as_built[key] != value

    def _objects(self) -> Iterator[tuple[str, Any, Any]]:
        for part in self._components:
            if isinstance(part.holder, nn.Module):
                names = Names(part.holder)
                for path, one in part.holder.named_modules():
                    saved = names.saved(path)
                    yield f"{part.name}.{saved}" if saved else part.name, part.holder, one
            else:
                yield part.name, part.holder, part.holder

    def _plain(self) -> Iterator[tuple[str, Any]]:
        for path, root, one in self._objects():
            for name, value in vars(one).items():
                if type(value) in _PLAIN and not name.startswith("_"):
                    # A program switches whole models to and fro; what stays is a module in another mode than those.
                    yield f"{path}.{name}", value == root.training if name == _MODE else value

    def _tensors(self) -> Iterator[tuple[str, Any]]:
        for path, _, one in self._objects():
            held = {name: value for name, value in vars(one).items() if not name.startswith("_") and name != "state"}
            held.update({name: one._buffers[name] for name in getattr(one, "_non_persistent_buffers_set", ())})
            for name, value in held.items():
                tensors = [part for part in _members(value) if isinstance(part, torch.Tensor)]
                # One that is still part of a graph is a result of the step, such as its loss.
                if tensors and not any(
                    part.grad_fn is not None or (part.is_leaf and part.requires_grad) for part in tensors
                ):
                    yield f"{path}.{name}", [(id(part), part._version) for part in tensors]


def _members(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) and len(value) <= 1000 else [value]
