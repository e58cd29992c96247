"""Spreads a saved state over the current processes, whatever the number of processes that saved it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stepguard.torch.checkpoint import sharded_tensors
from stepguard.torch.checkpoint.sharded_tensors import Shard, Sharding, Shardings, name_of


def read_sharded(directory: Path, skeletons: Mapping[str, Any], shardings: Mapping[str, Shardings]) -> dict[str, Any]:
    """Read the states of objects that were saved in parts, with the tensors spread as the program spreads them now.

    Each process reads only the parts that it needs, into host memory. The program's objects are not changed.

    Raises:
        CheckpointError: the files hold something that could run code, or do not match the skeletons.
    """
    from stepguard.torch.checkpoint.sharded_files import ShardedFiles

    targets: dict[sharded_tensors.Path, tuple[Sharding | None, Shard]] = {}
    for name, bare in skeletons.items():
        for path, part in sharded_tensors.parts(name, bare).items():
            if _is_bare(part):
                sharding = shardings[name].of(path, part.shape)
                targets[path] = sharding, _room(part, sharding)
    ShardedFiles(directory).read({name_of(path): target for path, (_, target) in targets.items()})

    def tensor(path: sharded_tensors.Path, part: Any) -> Any:
        if not _is_bare(part):
            return part
        sharding, target = targets[path]
        return target.local if sharding is None else sharding.spread(target.local)

    return {name: sharded_tensors.mapped((name,), bare, tensor) for name, bare in skeletons.items()}


def cut(name: str, state: Any, shardings: Shardings) -> Any:
    """The state of an object that was saved whole, with the tensors spread as the program spreads them now."""

    def part_of(path: sharded_tensors.Path, part: Any) -> Any:
        sharding = shardings.of(path, part.shape) if isinstance(part, torch.Tensor) else None
        return part if sharding is None else sharding.spread(sharding.cut(part))

    return sharded_tensors.mapped((name,), state, part_of) if shardings.are_any else state


def _is_bare(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.is_meta


def _room(bare: torch.Tensor, sharding: Sharding | None) -> Shard:
    size, chunks = (
        (bare.shape, [sharded_tensors.whole(bare.shape)])
        if sharding is None
        else (sharding.local_size, sharding.chunks)
    )
    return Shard(torch.empty(size, dtype=bare.dtype), bare.shape, chunks)
