"""What a process of a training has that rank 0, whose state is saved, may not have.

What is small is saved for each rank: buffers, such as the statistics of BatchNorm, which are those of each rank until
DistributedDataParallel sends those of rank 0 at the next forward pass, or for ever; and generators in the state. Of
the rest each rank notes samples. A restart compares them with what it gives to the rank, which is that of rank 0.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import nn

from stepguard.torch.checkpoint.sharded_tensors import is_dtensor, is_sharded
from stepguard.torch.checkpoint.snapshot import CopyStreams, HostMemory
from stepguard.torch.checkpoint.state import Component, is_numpy_scalar

OWN = "of rank"
"""The key of what is saved for one rank in the file of its process."""
SAMPLED = "sampled"
"""The key of its samples of the rest."""
BEGUN = "begun"
"""The key of the samples of what rank 0 has begun with, in its own file."""
NOTES = (SAMPLED, BEGUN)
"""The keys of what serves a warning alone and is no state: it depends on where a process has begun."""

# Buffers that are larger than this, together, are only sampled.
_MOST_BYTES = 1 << 24
# How many values of a tensor or of a list are compared; of smaller ones all.
_VALUES = 16
_WHOLE = 64
_Place = tuple[str, str]
_KINDS = (torch.Tensor, nn.Parameter, nn.Buffer)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def put_own(states: dict[str, Any], own: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Put what was saved for this rank into ``states``; returns the objects and names of what does not fit there."""
    unfit = []
    states.update({name: state for name, state in own.get("streams", {}).items() if name in states})
    for name, buffers in own.get("buffers", {}).items():
        if isinstance(states.get(name), Mapping):
            state = states[name] = copy.copy(states[name])
            for key, buffer in buffers.items():
                if _has_form(state.get(key), buffer):
                    state[key] = buffer
                else:
                    unfit.append((name, key))
    return unfit


def left_out(components: Sequence[Component], own: Mapping[str, Any]) -> dict[str, Collection[str]]:
    """The names of the buffers that need no comparison: they are in ``own``, or rank 0 sends its own to all anyway."""
    kept = own["buffers"]
    return {
        one.name: [key for key, _ in one.buffers()] if one.sends_buffers else kept.get(one.name, ())
        for one in components
    }


class Samples:
    """Samples of states: some values of each tensor and of each long list. Taken on the training thread.

    ``states`` are by the names of the objects; ``left_out`` has the names in them of what is not looked at.
    """

    def __init__(
        self,
        states: Mapping[str, Any],
        left_out: Mapping[str, Collection[str]],
        memory: HostMemory | None = None,
        streams: CopyStreams | None = None,
    ) -> None:
        # What is no tensor; and the values of tensors, together for each device and size of a value.
        self._forms: dict[_Place, list[Any]] = {}
        self._counts: list[tuple[_Place, Any, int]] = []
        values: dict[Any, list[torch.Tensor]] = {}
        for name, state in states.items():
            if is_sharded(state):
                continue
            for key, part in state.items() if isinstance(state, Mapping) else [("", state)]:
                if key not in left_out.get(name, ()):
                    self._take((name, key if isinstance(key, str) else repr(key)), part, values)
        self._joined = {kind: _joined(kind[0], found, streams) for kind, found in values.items()}
        if memory is not None and streams is not None:
            self._joined = {kind: memory.copy(f"{SAMPLED} {kind}", one, streams) for kind, one in self._joined.items()}

    def _take(self, place: _Place, part: Any, values: dict[Any, list[torch.Tensor]]) -> None:
        form: list[Any] = []
        self._forms[place] = form
        for one in _leaves(part):
            if isinstance(one, torch.Tensor) and _is_plain(one):
                form += [one.dtype, one.shape]
                found = _some(one.detach())
                kind = found.device, found.itemsize
                values.setdefault(kind, []).append(found)
                self._counts.append((place, kind, found.numel()))
            else:
                form.append(None if isinstance(one, torch.Tensor) else one)

    def digests(self) -> dict[str, dict[str, str]]:
        """A digest for each part of each object, by the names of both. After the copies are complete."""
        hashes = {place: xxhash.xxh3_64(repr(form).encode()) for place, form in self._forms.items()}
        host = {kind: one.cpu().numpy() for kind, one in self._joined.items()}
        begin = dict.fromkeys(host, 0)
        for place, kind, count in self._counts:
            hashes[place].update(host[kind][begin[kind] : begin[kind] + count].tobytes())
            begin[kind] += count
        found: dict[str, dict[str, str]] = {}
        for (name, key), one in hashes.items():
            found.setdefault(name, {})[key] = one.hexdigest()
        return found


def unlike(states: Mapping[str, Any], process: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The objects, and the parts of them in ``states``, which rank 0 has saved, that were something else in this rank.

    ``process`` is the content of this rank's file, with `BEGUN` of rank 0. What the rank still had as rank 0 had begun
    with it is left out: rank 0 alone keeps it, such as an average of the weights or a history.
    """
    noted, begun = process.get(SAMPLED, {}), process.get(BEGUN, {})
    saved = Samples({name: states[name] for name in noted if name in states}, {}).digests()
    return [
        (name, key)
        for name in saved
        for key, mine in noted[name].items()
        if mine not in (saved[name].get(key), begun.get(name, {}).get(key))
    ]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield len(value)
        # Parameters may have come to their first update in another order.
        for key in sorted(value, key=repr):
            yield key
            yield from _leaves(value[key])
    elif isinstance(value, (list, tuple)):
        yield len(value)
        for index in range(0, len(value), 1 if len(value) <= _WHOLE else len(value) // _VALUES):
            yield from _leaves(value[index])
    else:
        # Files have the numbers of NumPy as Python's.
        yield value.item() if is_numpy_scalar(value) else value


def _is_plain(value: torch.Tensor) -> bool:
    return (
        type(value) in _KINDS
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_nested or value.is_meta or value.is_conj() or value.is_neg())
        and (value.itemsize in _BITS or value.is_complex())
    )


def _has_form(value: Any, other: Any) -> bool:
    if not (isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor)):
        return False
    return not is_dtensor(value) and (value.shape, value.dtype) == (other.shape, other.dtype)


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of some values, for a large tensor those of its diagonal; nothing is copied then."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.view(_BITS[tensor.itemsize])
    if bits.numel() <= _WHOLE:
        return bits
    count = min(_VALUES, max(bits.shape))
    step = sum(((size - 1) // (count - 1)) * stride for size, stride in zip(bits.shape, bits.stride(), strict=True))
    return bits.as_strided((count,), (step,))


def _joined(device: torch.device, values: list[torch.Tensor], streams: CopyStreams | None) -> torch.Tensor:
    side = streams.side(device) if streams is not None and device.type == "cuda" else None
    with contextlib.nullcontext() if side is None else torch.cuda.stream(side):
        return torch.cat([one.reshape(-1) for one in values])
