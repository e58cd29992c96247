"""Takes the state of one step out of a PyTorch program."""

from __future__ import annotations

import math
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from stepguard.steps.gate import Moment
from stepguard.torch.checkpoint.arena import Arena
from stepguard.torch.checkpoint.packed import LONG, packed, packed_bytes, unpacked
from stepguard.torch.checkpoint.sharded_tensors import Shard, is_dtensor, shard_of
from stepguard.torch.checkpoint.state import (
    DEQUE,
    NUMPY_TYPES,
    check_saveable,
    check_tensor,
    is_numpy_scalar,
    is_sparse,
    leaves,
    parts_of_sparse,
)


@dataclass(frozen=True, slots=True)
class TorchSnapshot:
    """The state of one step in host memory: the program's objects by name, and the state of this process.

    Of sharded objects it has only the part of this process; the other processes hold and write their own parts.
    """

    step: int
    states: Mapping[str, Any]
    process: Mapping[str, Any]
    nbytes: int
    copies: CopyStreams
    # For the parts of the other processes; `None` without others.
    moment: Moment | None = None
    written: str | None = None
    # The parameters that get a file of their own, by the names of the objects and in these.
    frozen: Mapping[str, Collection[str]] = field(default_factory=dict)

    @property
    def unchanging_nbytes(self) -> int:
        """The size of the parameters that get a file of their own, in bytes."""
        return nbytes([self.states[part].get(name) for part, names in self.frozen.items() for name in names])

    def finish(self) -> None:
        """Wait until the copies are complete, and make lists again that were copied in one piece. Off the training."""
        self.copies.finish()
        unpacked(self.states)
        unpacked(self.process)


class HostMemory:
    """Copies of states in host memory. The next copy of a state with the same form reuses the memory."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._arena = Arena(0)
        self.numpys: dict[str, str] = {}
        """The kinds of what a file has as something else, numbers of NumPy's and deques, by their places."""

    def make_room(self, nbytes: int) -> None:
        """Make memory for tensors that the program does not have yet."""
        self._arena = Arena(nbytes)

    def copy(self, name: str, state: Any, streams: CopyStreams) -> Any:
        """A copy of ``state`` that nothing will change until the next call for ``name``.

        Raises:
            TypeError: a part cannot be saved.
        """
        # Tied weights are one tensor under several names, and stay one tensor in the copy; so are lists of values.
        seen: dict[Any, Any] = {}
        return self._copied(name, state, seen, streams)

    def _copied(self, path: str, value: Any, seen: dict[Any, Any], streams: CopyStreams) -> Any:
        if type(value) not in (dict, list) or len(value) >= LONG:
            return self._copied_part(path, value, seen, streams)
        if id(value) not in seen:
            seen[id(value)] = self._copied_part(path, value, seen, streams)
        return seen[id(value)]

    def _copied_part(self, path: str, value: Any, seen: dict[Any, Any], streams: CopyStreams) -> Any:
        if is_dtensor(value):
            local = value.detach().to_local()
            return shard_of(value, self._copied_tensor(path, local, seen, streams))
        if isinstance(value, torch.Tensor):
            check_tensor(path, value)
            return self._copied_tensor(path, value.detach(), seen, streams)
        if type(value) in (dict, Counter):
            return type(value)({key: self._copied(f"{path}.{key}", part, seen, streams) for key, part in value.items()})
        if type(value) is OrderedDict:
            copied = OrderedDict(
                (key, self._copied(f"{path}.{key}", part, seen, streams)) for key, part in value.items()
            )
            # nn.Module.state_dict keeps the versions of the modules in an attribute of the dictionary.
            copied.__dict__.update(value.__dict__)
            return copied
        if type(value) is deque:
            self.numpys[path] = DEQUE if value.maxlen is None else f"{DEQUE} {value.maxlen}"
            value = list(value)
        if type(value) is list and len(value) >= LONG:
            copy = packed(path, value, self._buffers)
            if copy is not None:
                return copy
            if is_numpy_scalar(value[0]) and len(set(map(type, value))) == 1:
                self._note_numpy(f"{path}[*]", value[0])
                return [one.item() for one in value]
        if type(value) in (list, tuple):
            return type(value)(self._copied(f"{path}[{n}]", part, seen, streams) for n, part in enumerate(value))
        if is_numpy_scalar(value):
            self._note_numpy(path, value)
            return value.item()
        check_saveable(path, value)
        return value

    def _note_numpy(self, path: str, value: Any) -> None:
        if str(value.dtype) in NUMPY_TYPES:
            self.numpys[path] = str(value.dtype)

    def _copied_tensor(
        self, path: str, tensor: torch.Tensor, seen: dict[Any, Any], streams: CopyStreams
    ) -> torch.Tensor:
        if is_sparse(tensor) or tensor.is_quantized:
            streams.finish()
            return tensor.cpu().clone()
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        known: torch.Tensor | None = seen.get(identity)
        if tensor.numel() and known is not None:
            return known
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            if tensor.is_cuda:
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=True)
            else:
                buffer = self._arena.empty_like(tensor)
            self._buffers[path] = buffer
        if tensor.is_cuda:
            with torch.cuda.stream(streams.side(tensor.device)):
                buffer.copy_(tensor, non_blocking=True)
        else:
            buffer.copy_(tensor)
        seen[identity] = buffer
        return buffer


class HostMemories:
    """The host memories of one process. A memory is reused when nobody holds the snapshot in it any more."""

    def __init__(self) -> None:
        # Each with a reference to what its snapshot holds.
        self._used: list[tuple[HostMemory, Callable[[], CopyStreams | None]]] = []

    def __len__(self) -> int:
        return len(self._used)

    def free(self) -> HostMemory:
        """A memory without a snapshot. A second one is made only if a loop ends while a snapshot is written."""
        free = [memory for memory, copies in self._used if copies() is None]
        self._used = [(memory, copies) for memory, copies in self._used if copies() is not None]
        memory = free[0] if free else HostMemory()
        memory.numpys = {}
        return memory

    def keep(self, memory: HostMemory, copies: CopyStreams | None = None) -> None:
        """Keep ``memory``, which is free when ``copies``, those of its snapshot, are gone."""
        self._used.append((memory, (lambda: None) if copies is None else weakref.ref(copies)))


class CopyStreams:
    """The CUDA streams on which one snapshot is copied while the host goes on.

    ``training`` are the streams on which steps run, one for each device. The copies begin after the last step, and the
    next step begins after the copies. The devices see to this order; the host waits for neither.
    """

    def __init__(self, training: Mapping[torch.device, torch.cuda.Stream]) -> None:
        self._training = training
        self._sides: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: list[torch.cuda.Event] = []

    def side(self, device: torch.device) -> torch.cuda.Stream:
        """The stream for the copies from ``device``."""
        if device not in self._sides:
            side = torch.cuda.Stream(device)
            side.wait_stream(self._trained_on(device))
            self._sides[device] = side
        return self._sides[device]

    def close(self) -> None:
        """End the list of copies: on the device, the next step waits for all copies so far."""
        for device, side in self._sides.items():
            self._copied.append(side.record_event())
            self._trained_on(device).wait_stream(side)

    def finish(self) -> None:
        """Wait until the copies are complete."""
        for device in self._sides:
            self._trained_on(device).synchronize()
        for event in self._copied:
            event.synchronize()

    def _trained_on(self, device: torch.device) -> torch.cuda.Stream:
        stream = self._training.get(device)
        return torch.cuda.default_stream(device) if stream is None else stream


def nbytes(value: Any) -> int:
    """The size of the tensors in a nested state, in bytes. Each counts once, and a sharded one with its full size."""
    tensors = {id(part): part for _, part in leaves("", value) if isinstance(part, (torch.Tensor, Shard))}
    return sum(_nbytes_of(tensor) for tensor in tensors.values()) + packed_bytes(value)


def _nbytes_of(tensor: torch.Tensor | Shard) -> int:
    if isinstance(tensor, torch.Tensor) and is_sparse(tensor):
        return sum(part.nbytes for part in parts_of_sparse(tensor))
    return tensor.nbytes


def non_finite(path: str, state: Any) -> list[str]:
    """The places of tensors with NaN or infinity, and of plain numbers that are NaN, in a nested state in host memory.

    A plain number may be infinite: schedulers and programs use infinity for "none so far".
    """
    found = []
    for place, part in leaves(path, state):
        if isinstance(part, Shard):
            part = part.local
        if isinstance(part, torch.Tensor):
            if not _is_finite(part):
                found.append(place)
        elif isinstance(part, float) and math.isnan(part):
            found.append(place)
    return found


def _is_finite(tensor: torch.Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if is_sparse(tensor):
        # A COO tensor may hold several values for one place; its value there is their sum.
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # PyTorch has no arithmetic for types of eight bits.
    # One pass and no copy of the tensor. If any number is NaN, then minimum and maximum are NaN.
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))
