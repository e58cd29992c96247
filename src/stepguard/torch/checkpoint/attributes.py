"""What modules and optimizers keep in plain attributes, beside their ``state_dict``, and change while they train.

An annealed temperature, a BatchNorm that was set to ``eval()`` on the way, a hidden state: they may decide the next
step, and no ``state_dict`` has them. They are not put back, because one attribute alone may mean nothing without others
that no file can hold. A restart names those that had changed.
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
# Names of PyTorch's own, such as the step count of an optimizer.
_INTERNAL = "_"
_MOST_MEMBERS = 1000


class Attributes:
    """The attributes of the program's modules and optimizers. For a thread that holds the boundary."""

    def __init__(self, components: Sequence[Component]) -> None:
        self._components = [one for one in components if isinstance(one.holder, (nn.Module, torch.optim.Optimizer))]
        self._plain_as_built, self._tensors_as_built = self._look()

    def notes(self) -> dict[str, Any]:
        """The plain ones that have changed since the program was built, with both values; and the names of tensors."""
        plain, tensors = self._look()
        return {
            "changed": {
                key: [self._plain_as_built.get(key), value]
                for key, value in plain.items()
                # NaN is not equal to itself.
                if repr(value) != repr(self._plain_as_built.get(key))
            },
            "tensors": [key for key, versions in tensors.items() if self._tensors_as_built.get(key) != versions],
        }

    def warn_of(self, notes: Mapping[str, Any]) -> None:
        """Warn of what the run that is resumed had changed, where this program has not the same now."""
        plain, _ = self._look()
        changed = [
            f"{key} ({value!r:.40} there, {plain.get(key)!r:.40} here)"
            for key, (_, value) in notes.get("changed", {}).items()
            if repr(plain.get(key)) != repr(value)
        ]
        tensors = notes.get("tensors", [])
        if changed or tensors:
            _log.warning(
                "the run had changed what no state_dict has, and it begins as the program makes it: %s. If a step "
                "depends on the step before through it, register tensors as buffers, and keep the rest in "
                "stepguard.torch.Values; what is computed anew when it is needed does no harm",
                listed([*changed, *tensors]),
            )

    def _look(self) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        """The plain attributes, and the identities and versions of tensors."""
        plain: dict[str, Any] = {}
        tensors: dict[str, list[Any]] = {}
        for path, root, one in self._objects():
            apart = getattr(one, "_non_persistent_buffers_set", ())
            buffers = {name: one._buffers.get(name) for name in apart}
            for name, value in [*vars(one).items(), *buffers.items()]:
                if type(value) in _PLAIN:
                    if name == _MODE:
                        # A program switches whole models to and fro; what stays is a module in another mode than those.
                        plain[f"{path}.{name}"] = value == root.training
                    elif not name.startswith(_INTERNAL):
                        plain[f"{path}.{name}"] = value
                elif not name.startswith(_INTERNAL) and name != "state":
                    found = _kept_tensors(value)
                    if found:
                        tensors[f"{path}.{name}"] = [(id(part), _version(part)) for part in found]
        return plain, tensors

    def _objects(self) -> Iterator[tuple[str, Any, Any]]:
        for part in self._components:
            if isinstance(part.holder, nn.Module):
                names = Names(part.holder)
                for path, one in part.holder.named_modules():
                    saved = names.saved(path)
                    yield f"{part.name}.{saved}" if saved else part.name, part.holder, one
            else:
                yield part.name, part.holder, part.holder


def _kept_tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in an attribute; none if one is a parameter, or part of a graph, as the result of a step is."""
    members = value if isinstance(value, (list, tuple)) and len(value) <= _MOST_MEMBERS else [value]
    found = [one for one in members if isinstance(one, torch.Tensor)]
    if any(one.grad_fn is not None or (one.is_leaf and one.requires_grad) for one in found):
        return []
    return found


def _version(tensor: torch.Tensor) -> int | None:
    """How often the tensor was changed in place; tensors of ``inference_mode`` do not count that."""
    return None if tensor.is_inference() else tensor._version
