"""Tensors that are spread over several processes: the part in this process, and the names of parts in a state.

A state is taken apart as ``torch.distributed.checkpoint`` does it: it descends into dictionaries, and into lists that
contain tensors or dictionaries. Each tensor, and each other value, gets its path as its name, joined by dots.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Path = tuple[Any, ...]


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor, which is spread over several processes."""
    # A program that has not imported the module has no DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def name_of(path: Path) -> str:
    """The name of a part, as in ``torch.distributed.checkpoint``."""
    return ".".join(map(str, path))


def mapped(path: Path, value: Any, change: Callable[[Path, Any], Any]) -> Any:
    """A copy of a nested state with ``change(path, part)`` in the place of each part."""
    if isinstance(value, Mapping):
        pairs = ((key, mapped((*path, str(key)), part, change)) for key, part in value.items())
        if type(value) is not OrderedDict:
            # A Counter made directly from the pairs would count the pairs.
            return Counter(dict(pairs)) if type(value) is Counter else dict(pairs)
        copied = OrderedDict(pairs)
        # nn.Module.state_dict keeps the versions of the modules in an attribute of the dictionary.
        copied.__dict__.update(value.__dict__)
        return copied
    if _is_gone_through(value):
        return [mapped((*path, index), part, change) for index, part in enumerate(value)]
    return change(path, value)


def parts(name: str, state: Any) -> dict[Path, Any]:
    """The parts of the state of one object, each with its path, which begins with the name of the object."""
    found: dict[Path, Any] = {}

    def note(path: Path, part: Any) -> None:
        found[path] = part

    mapped((name,), state, note)
    return found


def is_sharded(state: Any) -> bool:
    """Whether ``state`` contains a tensor of several processes, or a part of one."""
    return any(isinstance(part, Shard) or is_dtensor(part) for part in parts("", state).values())


def check_shardable(name: str, state: Any) -> None:
    """Check the tensors of several processes in a state.

    Raises:
        TypeError: a tensor has no values of its own to save, or is in a place where it could not be put together again.
    """
    names: dict[str, Path] = {}
    for path, part in parts(name, state).items():
        place = name_of(path)
        if names.setdefault(place, path) != path:
            raise TypeError(f"{place}: two places of a state with sharded tensors have this name; rename one of them")
        if type(part) in (tuple, list) and any(is_dtensor(one) for one in part):
            raise TypeError(f"{place}: expected sharded tensors in dictionaries and lists, found a tuple of them")
        if isinstance(part, torch.Tensor) and part.layout is not torch.strided:
            raise TypeError(
                f"{place}: expected dense tensors beside sharded ones, found one of the layout {part.layout}, which "
                f"the format of sharded checkpoints has no room for; keep it in an object of its own"
            )
        if is_dtensor(part) and any(placement.is_partial() for placement in part.placements):
            raise TypeError(
                f"{place}: this tensor is a sum that was not made yet (placement Partial); call "
                f"redistribute() on it before it is saved"
            )


def skeleton(name: str, state: Any) -> Any:
    """The state with each tensor replaced by one on the meta device, which has no values."""

    def bare(_: Path, part: Any) -> Any:
        if isinstance(part, Shard):
            return torch.empty(part.size, dtype=part.local.dtype, device="meta")
        return torch.empty_like(part, device="meta") if isinstance(part, torch.Tensor) else part

    return mapped((name,), state, bare)


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a tensor that this process has: ``local`` is ``chunks`` (one, or none) of a tensor of ``size``.

    ``torch.distributed.checkpoint`` saves a tensor of any kind by the methods with two underscores.
    """

    local: torch.Tensor
    size: torch.Size
    chunks: Sequence[Any]

    @property
    def nbytes(self) -> int:
        """The size in bytes of the whole tensor."""
        return self.size.numel() * self.local.element_size()

    def __create_write_items__(self, fqn: str, _: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.local.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size),
            )
            for chunk in self.chunks
        ]

    def __create_chunk_list__(self) -> list[Any]:
        return list(self.chunks)

    def __get_tensor_shard__(self, _: Any) -> torch.Tensor:
        return self.local


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a program spreads one tensor over its processes, and which part this process has."""

    mesh: Any
    placements: Sequence[Any]
    size: torch.Size
    stride: Sequence[int]
    local_size: torch.Size
    chunks: Sequence[Any]

    @classmethod
    def like(cls, tensor: Any) -> Sharding:
        """The sharding of a DTensor."""
        is_here = tensor.device_mesh.get_coordinate() is not None and tensor.to_local().numel()
        chunks = tensor.__create_chunk_list__() if is_here else []
        local_size = tensor.to_local().shape
        return cls(tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride(), local_size, chunks)

    @classmethod
    def replicated(cls, mesh: Any, size: torch.Size) -> Sharding:
        """The sharding of a tensor that every process of ``mesh`` has whole."""
        from torch.distributed.tensor import Replicate

        stride = torch.empty(size, device="meta").stride()
        return cls(mesh, [Replicate()] * mesh.ndim, size, stride, size, [whole(size)])

    def spread(self, local: torch.Tensor) -> Any:
        """The DTensor of which this process has the part ``local``."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.size, stride=tuple(self.stride)
        )

    def cut(self, full: torch.Tensor) -> torch.Tensor:
        """This process's part of ``full``, a tensor that was read whole."""
        for chunk in self.chunks:
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                full = full.narrow(dim, offset, size)
            return full.clone()
        return full.new_empty(self.local_size)


def shard_of(tensor: Any, local: torch.Tensor) -> Shard:
    """The shard of a DTensor that this process saves; its values were copied to ``local``."""
    return Shard(local, tensor.shape, Sharding.like(tensor).chunks)


def whole(size: torch.Size) -> Any:
    """The chunk that covers a whole tensor."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)


class Shardings:
    """How a program spreads the tensors of one object, as seen in its live state.

    An optimizer that has made no step has no state yet. The state of a parameter is then spread like the parameter, if
    it has the same shape; otherwise every process has it whole.
    """

    def __init__(self, name: str, live: Any, parameters: Sequence[torch.Tensor] = ()) -> None:
        self._live = {path: part for path, part in parts(name, live).items() if is_dtensor(part)}
        self._parameters = parameters

    @property
    def are_any(self) -> bool:
        """Whether any tensor is spread."""
        return bool(self._live) or any(is_dtensor(one) for one in self._parameters)

    def of(self, path: Path, size: torch.Size) -> Sharding | None:
        """The sharding of a tensor; ``None`` for one that is not spread."""
        if path in self._live:
            return Sharding.like(self._live[path])
        if len(path) < 4 or path[1] != "state" or not str(path[2]).isdigit():
            return None
        number = int(path[2])
        if number >= len(self._parameters) or not is_dtensor(self._parameters[number]):
            return None
        parameter: Any = self._parameters[number]
        if parameter.shape == size:
            return Sharding.like(parameter)
        return Sharding.replicated(parameter.device_mesh, size) if len(size) else None


def _is_gone_through(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return any(isinstance(one, (Mapping, torch.Tensor, Shard)) or _is_gone_through(one) for one in value)
