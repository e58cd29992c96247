"""The facts about a program that a checkpoint records besides its state.

They are the names of the parameters of each optimizer, the hyperparameters that the program had set when it was built,
and which parameters train. With them a later start gives each parameter its own moments, notices changes in the
program, and unfreezes the parameters that the run had unfrozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stepguard.steps.values import Values
from stepguard.torch.checkpoint.attributes import Attributes
from stepguard.torch.checkpoint.hyperparameters import Settings, settings
from stepguard.torch.checkpoint.in_place import tensors_in
from stepguard.torch.checkpoint.names import parameter_names
from stepguard.torch.checkpoint.optimizers import GroupNames, group_names
from stepguard.torch.checkpoint.state import Component, leaves
from stepguard.words import listed, logger

_log = logger(__name__)


class Program:
    """The objects that a program saves, and the facts recorded about them. For a thread that holds the boundary."""

    def __init__(self, components: Sequence[Component]) -> None:
        self.components = [one for one in components if not one.is_per_process]
        self.own = [one for one in components if one.is_per_process]
        """The objects of which each process saves its own state, with its random states."""
        components = self.components
        self.settings: dict[str, Settings] = {one.name: settings(one) for one in components}
        """The settings of the newly built program, by the names of the objects."""
        self.in_force: dict[str, Settings] = dict(self.settings)
        """The settings that the run uses: the checkpoint's values in the places where they replace the program's."""
        self.attributes = Attributes(components)
        """What the objects keep beside their states."""
        # Finding the names takes a walk through all modules. It is repeated only if an optimizer has other parameters.
        self._walked_for: list[list[int]] = []
        self._parameters: dict[str, nn.Parameter] = {}
        self._groups: dict[str, GroupNames] = {}
        self.frozen_as_built = self.frozen()
        self._warn_of_strangers()
        self._has_warned_of_shared = False

    def optimizers(self) -> Iterator[tuple[Component, torch.optim.Optimizer]]:
        """The optimizers among the objects."""
        for one in self.components:
            if isinstance(one.holder, torch.optim.Optimizer):
                yield one, one.holder

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters of all modules, each under one name."""
        self._walk()
        return self._parameters

    def group_names(self, name: str) -> GroupNames:
        """The names of the parameters in each group of the optimizer ``name``."""
        self._walk()
        return self._groups[name]

    def frozen(self) -> list[str]:
        """The names of the parameters that do not train."""
        return [name for name, parameter in self.parameters().items() if not parameter.requires_grad]

    def notes(self) -> dict[str, Any]:
        """The facts for a checkpoint of this moment, as plain values."""
        for one in self.components:
            one.end_start()
        return {
            "parameters": {one.name: self.group_names(one.name) for one, _ in self.optimizers()},
            "settings": self.in_force,
            "frozen": self.frozen(),
            "frozen as built": self.frozen_as_built,
            "built": {one.name: one.built() for one in self.components},
            "added": {one.name: added for one in self.components if (added := one.added())},
            "attributes": self.attributes.notes(),
        }

    def _walk(self) -> None:
        sizes = [[len(group["params"]) for group in optimizer.param_groups] for _, optimizer in self.optimizers()]
        if self._parameters and sizes == self._walked_for:
            return
        modules = [(one.name, one.holder) for one in self.components if isinstance(one.holder, nn.Module)]
        names = parameter_names(modules)
        self._parameters = {names[id(one)]: one for _, module in modules for one in module.parameters()}
        self._groups = {one.name: group_names(optimizer, names) for one, optimizer in self.optimizers()}
        self._walked_for = sizes

    def _warn_of_strangers(self) -> None:
        """Warn of parameters that an optimizer trains and no object of the state holds: a restart would lose them."""
        held = {id(parameter) for parameter in self.parameters().values()}
        addresses = set(self._addresses())
        for one, optimizer in self.optimizers():
            strangers = [
                f"{place} {list(parameter.shape)}"
                for place, parameter in _placed_parameters(optimizer)
                if id(parameter) not in held and _address(parameter) not in addresses
            ]
            if strangers:
                _log.warning(
                    "%s trains parameters that nothing in the state holds, so that a restart loses what they have "
                    "learned: %s; add the module that has them to the state",
                    one.name,
                    listed(strangers),
                )

    def warn_of_shared(self) -> None:
        """Warn, once, of values that share their memory: a restart makes them tensors of their own."""
        values = [one for one in (*self.components, *self.own) if isinstance(one.holder, Values)]
        found = {} if self._has_warned_of_shared else {one.name: dict(one.put_since()) for one in values}
        if not any(found.values()):
            return
        self._warn_of_shared_by_values(values, found)
        memory = {
            _address(tensor): one.name
            for one in self.components
            if isinstance(one.holder, (nn.Module, torch.optim.Optimizer))
            for _, tensor in tensors_in(one.state())
            if tensor.numel()
        }
        shared = [
            f"{name}.{'.'.join(map(str, place))} (with {memory[_address(tensor)]})"
            for name, tensors in found.items()
            for place, tensor in tensors.items()
            if _address(tensor) in memory
        ]
        if shared:
            self._has_warned_of_shared = True
            _log.warning(
                "values share their memory with an object that trains, so they change with it, and after a restart "
                "they do not: %s. Put a copy into them, as by copy.deepcopy(model.state_dict())",
                listed(shared),
            )

    def _warn_of_shared_by_values(self, values: Sequence[Component], put: Mapping[str, Mapping[Any, Any]]) -> None:
        changing = {_memory(one) for tensors in put.values() for one in tensors.values() if _was_changed(one)}
        held = [
            (_memory(tensor), tensor.data_ptr(), f"{one.name}.{'.'.join(map(str, place))}", one.name, tensor)
            for one in values
            for place, tensor in tensors_in(one.state())
            if tensor.layout is torch.strided and tensor.numel() and _memory(tensor) in changing
        ]
        shared, before = [], None
        for found in sorted(held, key=lambda one: (str(one[0]), one[1])):
            _, begin, label, name, tensor = found
            # One tensor under two names stays one.
            is_other = before is None or name != before[3] or _view(tensor) != _view(before[4])
            if before is not None and found[0] == before[0] and begin < _end(before[4]) and is_other:
                shared.append(f"{label} (with {before[2]})")
            if before is None or found[0] != before[0] or _end(tensor) > _end(before[4]):
                before = found
        if shared:
            self._has_warned_of_shared = True
            _log.warning(
                "values share their memory with other values, and after a restart they do not: %s. Keep one of them, "
                "and take the others from it where they are needed",
                listed(shared),
            )

    def _addresses(self) -> Iterator[tuple[torch.device, int]]:
        """The addresses of the tensors in all objects but the optimizers."""
        for one in self.components:
            if not isinstance(one.holder, torch.optim.Optimizer):
                for _, part in leaves("", one.state()):
                    if isinstance(part, torch.Tensor):
                        yield _address(part)


def _placed_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names", range(len(group["params"])))
        for name, parameter in zip(names, group["params"], strict=True):
            yield f"param_groups[{index}].{name}", parameter


def _memory(tensor: torch.Tensor) -> Any:
    try:
        return tensor.device, tensor.untyped_storage().data_ptr()
    except RuntimeError:  # The tensor has no memory of its own.
        return tensor.device, id(tensor)


def _view(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _end(tensor: torch.Tensor) -> int:
    """The address behind the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _was_changed(tensor: torch.Tensor) -> bool:
    """Whether the tensor was changed in place; all that share its memory count that."""
    return tensor.is_inference() or tensor._version > 0


def _address(tensor: torch.Tensor) -> tuple[torch.device, int]:
    try:
        return tensor.device, tensor.data_ptr()
    except RuntimeError:  # The tensor has no memory of its own.
        return tensor.device, id(tensor)
