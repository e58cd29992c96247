"""The weights in a PyTorch checkpoint, for an export; and the file with a plain ``state_dict``."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepguard.disk.new_file import NewFile
from stepguard.steps.process_file import CHIEF
from stepguard.store.saved_tensor import SavedWeight
from stepguard.torch.checkpoint.files import APART, append, frozen_files, is_process, named_files
from stepguard.torch.checkpoint.frozen import joined
from stepguard.torch.checkpoint.process_state import read_process
from stepguard.torch.checkpoint.tensors import load_part

# PyTorch has names for more types, such as int4 and qint8, and cannot save tensors of those.
_SAVED_TYPES = {
    *("bool", "bfloat16", "float16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
}


def read_weights(path: Path) -> dict[str, list[SavedWeight]]:
    """The weights of each part of the checkpoint at ``path`` that is a ``state_dict`` of tensors, read on demand.

    Extra state of modules, which is no tensor, is left out. The files are mapped, so they must have been verified.

    Raises CheckpointError if a file holds something else, or what could run code.
    """
    named = {file.stem: file for file in named_files(path)}
    process: Mapping[str, Any] = read_process(named[CHIEF]) if CHIEF in named else {}
    contents = {name: load_part(file) for name, file in named.items() if not is_process(name)}
    for name, file in frozen_files(path).items():
        contents[name] = joined(name, contents.get(name), load_part(file), process.get(APART, {}))
    found = {name: _weights(state) for name, state in contents.items()}
    for name, skeleton in process.get("sharded", {}).items():
        found[name] = _sharded_weights(path, name, skeleton)
    return {name: weights for name, weights in found.items() if weights}


def _tensors(state: Any) -> dict[str, torch.Tensor]:
    """The tensors of a ``state_dict`` of a module; nothing of another state."""
    if not isinstance(state, Mapping):
        return {}
    tensors = {name: part for name, part in state.items() if isinstance(part, torch.Tensor)}
    others = [name for name in state if name not in tensors and not str(name).endswith("_extra_state")]
    return {} if others or not all(isinstance(name, str) for name in tensors) else tensors


def _weights(state: Any) -> list[SavedWeight]:
    return [
        SavedWeight(name, _type_of(one), _shape_of(one), _nbytes(one), functools.partial(_bytes, one), _memory(one))
        for name, one in _tensors(state).items()
    ]


def _sharded_weights(path: Path, part: str, skeleton: Any) -> list[SavedWeight]:
    from stepguard.torch.checkpoint.sharded_files import ShardedFiles

    sharded = ShardedFiles(path)

    def read(name: str, bare: torch.Tensor) -> Any:
        return _bytes(sharded.read_whole(f"{part}.{name}", bare.shape, bare.dtype))

    return [
        SavedWeight(name, _dtype_of(one), tuple(one.shape), _nbytes(one), functools.partial(read, name, one), name)
        for name, one in _tensors(skeleton).items()
    ]


def _dtype_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _type_of(tensor: torch.Tensor) -> str:
    """The type, with what is more to a tensor than its values in a row: no file has room for that."""
    kinds = {"meta": tensor.is_meta, "nested": tensor.is_nested, "sparse": tensor.layout is not torch.strided}
    return " ".join([*(kind for kind, is_so in kinds.items() if is_so), _dtype_of(tensor)])


def _shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    return () if tensor.is_nested else tuple(tensor.shape)


def _nbytes(tensor: torch.Tensor) -> int:
    """The bytes of all its values. A sparse tensor does not tell them itself."""
    return tensor.numel() * tensor.element_size()


def _memory(tensor: torch.Tensor) -> object:
    if _type_of(tensor) != _dtype_of(tensor) or not tensor.numel():
        return id(tensor)
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.dtype
    return *place, tuple(tensor.shape), tensor.stride()


def _bytes(tensor: torch.Tensor) -> Any:
    return _flat(tensor.detach().resolve_conj().resolve_neg().contiguous()).numpy()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, in its memory."""
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return flat.reshape(-1).view(torch.uint8)


def write_state_dict(file: NewFile, weights: Iterable[SavedWeight]) -> None:
    """Write a ``state_dict`` that ``torch.load(path, weights_only=True)`` reads. Tied weights stay one tensor.

    Raises OSError: the disk is full, or fails. ValueError: PyTorch has no such type; the message names it.
    """
    made: dict[object, torch.Tensor] = {}
    state = {}
    for one in weights:
        dtype = getattr(torch, one.dtype, None) if one.dtype in _SAVED_TYPES else None
        if not isinstance(dtype, torch.dtype) or dtype.itemsize * int(np.prod(one.shape, dtype=np.int64)) != one.nbytes:
            raise ValueError(f"{one.name} is of the type {one.dtype}")
        if one.memory not in made:
            made[one.memory] = tensor = torch.empty(one.shape, dtype=dtype)
            if one.nbytes:
                _flat(tensor).numpy()[:] = one.read()
        state[one.name] = made[one.memory]
    append(file, state)
