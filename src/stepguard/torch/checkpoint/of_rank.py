"""What a process of a training has that rank 0, whose state is saved, may not have.

What is small is saved for each rank: buffers, such as the statistics of BatchNorm, which are those of each rank until
DistributedDataParallel sends those of rank 0 at the next forward pass, or for ever; and generators in the state.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stepguard.torch.checkpoint.sharded_tensors import is_dtensor
from stepguard.torch.checkpoint.state import Component

OWN = "of rank"
"""The key of what is saved for one rank in the file of its process."""

# The smallest ones, as far as they are no larger than this together.
_MOST_BYTES = 1 << 24
_KINDS = (torch.Tensor, nn.Parameter, nn.Buffer)


def own_of(components: Sequence[Component]) -> dict[str, Any]:
    """The live buffers of modules, and the states of generators, by the names of the objects."""
    found = [(one.name, key, buffer) for one in components for key, buffer in one.buffers() if _is_plain(buffer)]
    buffers: dict[str, dict[str, torch.Tensor]] = {}
    room = _MOST_BYTES
    for name, key, buffer in sorted(found, key=lambda one: one[2].nbytes):
        room -= buffer.nbytes
        if room < 0:
            break
        buffers.setdefault(name, {})[key] = buffer
    return {"buffers": buffers, "streams": {one.name: one.state() for one in components if one.is_stream}}


def put_own(states: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Put what was saved for this rank into ``states``, as far as it fits there."""
    states.update({name: state for name, state in own.get("streams", {}).items() if name in states})
    for name, buffers in own.get("buffers", {}).items():
        if isinstance(states.get(name), Mapping):
            state = states[name] = copy.copy(states[name])
            for key, buffer in buffers.items():
                if _has_form(state.get(key), buffer):
                    state[key] = buffer


def _is_plain(value: torch.Tensor) -> bool:
    return (
        type(value) in _KINDS
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_nested or value.is_meta or value.is_conj() or value.is_neg())
    )


def _has_form(value: Any, other: Any) -> bool:
    if not (isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor)):
        return False
    return not is_dtensor(value) and (value.shape, value.dtype) == (other.shape, other.dtype)
