"""What the trace of a PyTorch program digests: the bytes of tensors, and the hyperparameters of optimizers."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash

from stepguard.steps.digests import SAMPLED, array_bytes
from stepguard.torch.checkpoint.state import is_sparse, parts_of_sparse

_SEQUENCES = (list, tuple, deque)


def tensor_bytes(leaf: Any) -> Any:
    """The bytes of a tensor, or of an array; of a tensor on a device, those of evenly spaced values.

    Of a tensor of several processes, the part of this process. ``None`` for a tensor without plain storage.
    """
    if not isinstance(leaf, torch.Tensor):
        return array_bytes(leaf)
    local = getattr(leaf, "to_local", None)
    tensor = leaf.detach() if local is None else local().detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        return None
    flat = tensor.reshape(-1).resolve_conj().resolve_neg()
    if flat.device.type != "cpu":
        flat = flat[:: max(1, flat.numel() // SAMPLED)].cpu()
    # After `numpy()` no tensor in that memory can be resized, as observers of a quantized training resize theirs.
    return np.from_dlpack(flat.contiguous().view(torch.uint8)) if flat.numel() else b""


def fingerprint(value: Any) -> Any:
    """What is another, almost certainly, when a state was changed. Reads all of it."""
    if isinstance(value, torch.Tensor):
        return _of_tensor(value)
    if isinstance(value, Mapping):
        return {repr(key): fingerprint(part) for key, part in value.items()}
    if isinstance(value, _SEQUENCES) and any(isinstance(one, (torch.Tensor, Mapping, *_SEQUENCES)) for one in value):
        return [fingerprint(part) for part in value]
    return zlib.crc32(repr(value).encode())


def _of_tensor(tensor: torch.Tensor) -> Any:
    # Changes through `.data` are not counted.
    version = None if tensor.is_inference() else tensor._version
    local = getattr(tensor, "to_local", None)
    found: torch.Tensor = (tensor if local is None else local()).detach()
    if is_sparse(found):
        return version, tuple(tensor.shape), [_of_tensor(part) for part in parts_of_sparse(found)]
    if found.device.type in ("cpu", "meta"):
        content = tensor_bytes(found)
        return version, tuple(tensor.shape), None if content is None else xxhash.xxh3_64_intdigest(content)
    # Not copied from its device.
    whole = found.resolve_conj().contiguous().view(torch.uint8)
    return version, tuple(tensor.shape), int(whole.sum(dtype=torch.int64)) if whole.dim() else int(whole)


def hyperparameters(optimizers: Iterable[tuple[str, torch.optim.Optimizer]]) -> dict[str, float]:
    """The numbers that the steps of optimizers use, such as ``optimizer.lr``; with several groups ``optimizer[1].lr``.

    Tensors on a device are left out, because reading them would wait for it.
    """
    found: dict[str, float] = {}
    for name, optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            place = name if len(optimizer.param_groups) == 1 else f"{name}[{index}]"
            for key, value in group.items():
                if key != "params":
                    found.update(_numbers(f"{place}.{key}", value))
    return found


def _numbers(place: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, (bool, int, float)):
        yield place, float(value)
    elif isinstance(value, torch.Tensor):
        if value.device.type == "cpu" and value.numel() == 1:
            yield place, float(value)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _numbers(f"{place}[{index}]", part)
