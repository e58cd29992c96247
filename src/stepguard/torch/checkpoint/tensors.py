"""Reads the tensors of a PyTorch checkpoint without the program that saved it. No code from a file is run."""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepguard.disk.schema import WRONG
from stepguard.errors import CheckpointCorruptError, CheckpointError
from stepguard.store.manifest import SUFFIX as MANIFEST_SUFFIX
from stepguard.store.saved_tensor import SavedTensor
from stepguard.torch.checkpoint import frozen, unpickling
from stepguard.torch.checkpoint.files import SUFFIX, frozen_files, is_process, named_files
from stepguard.torch.checkpoint.of_rank import NOTES
from stepguard.torch.checkpoint.process_state import read_process

METADATA = ".metadata"

_NUMBERS = (bool, int, float, complex)


def read_tensors(path: Path) -> Iterator[SavedTensor]:
    """The tensors and plain values of a checkpoint: a directory of files, or one file that ``torch.save`` wrote.

    The names are the same as in error messages: ``model.layers.0.weight``, ``optimizer.param_groups[0].lr``. Files are
    mapped into memory, so that a tensor is read on demand.

    Raises CheckpointCorruptError if a file is damaged, FileNotFoundError if one that the manifest names is gone,
    CheckpointError if its form is unknown.
    """
    if path.is_file():
        yield from _leaves("", load_part(path))
    elif (path / METADATA).is_file():
        yield from _sharded(path)
    else:
        apart = frozen_files(path)
        for part in _parts(path):
            yield from _part(part)
            if part.stem in apart:
                yield from _part(apart[part.stem])


def _parts(path: Path) -> list[Path]:
    if path.with_name(path.name + MANIFEST_SUFFIX).exists():
        return named_files(path)
    return sorted(one for one in path.iterdir() if one.name != frozen.DIRECTORY)


def _sharded(path: Path) -> Iterator[SavedTensor]:
    """A checkpoint in the format of ``torch.distributed.checkpoint``, with Stepguard's own files, if it has any."""
    from stepguard.torch.checkpoint.sharded_files import ShardedFiles

    sharded = ShardedFiles(path)
    stored = sharded.tensors()
    apart = frozen_files(path)
    for part in named_files(path):
        state = read_process(part) if is_process(part.stem) else load_part(part)
        # The skeletons of the sharded objects: their nesting, plain values, and tensors without content.
        skeletons = state.pop("sharded", {}) if is_process(part.stem) else {}
        yield from _leaves(part.stem, _without_notes(part, state))
        if part.stem in apart:
            yield from _part(apart[part.stem])
        for name, skeleton in skeletons.items():
            yield from (one for one in _leaves(name, skeleton) if one.read is not None)
    for name, (size, dtype) in sorted(stored.items()):
        nbytes = size.numel() * dtype.itemsize
        read = functools.partial(_put_together, sharded, name, size, dtype)
        yield SavedTensor(name, str(dtype).removeprefix("torch."), tuple(size), nbytes, read)


def _put_together(sharded: Any, name: str, size: torch.Size, dtype: torch.dtype) -> Any:
    try:
        return _array(sharded.read_whole(name, size, dtype))
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointCorruptError(f"{name}: cannot be read from its parts: {reason}") from error


def _part(path: Path) -> Iterator[SavedTensor]:
    """The tensors in one entry of a checkpoint's directory, which has a file for each named object."""
    if path.suffix == SUFFIX and path.is_file():
        yield from _leaves(path.stem, _without_notes(path, load_part(path)))
        return
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "the manifest names it, and it is gone", str(path))
    raise CheckpointError(
        f"{path}: expected files *{SUFFIX} that torch.save wrote, found "
        f"{'a directory' if path.is_dir() else 'another file'}",
        path=path,
    )


def _without_notes(path: Path, content: Any) -> Any:
    if not is_process(path.stem) or not isinstance(content, dict):
        return content
    return {key: one for key, one in content.items() if key not in NOTES}


def load_part(path: Path) -> Any:
    """The content of a file, mapped into memory. Raises CheckpointCorruptError if PyTorch cannot read it."""
    try:
        return _loaded(path)
    except (*WRONG, RuntimeError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        # EINVAL: the file is so short that the reader sought to a place before its beginning.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointCorruptError(
            f"{path}: expected a file that torch.save wrote, found one that cannot be read: {reason}", path=path
        ) from error


def _loaded(path: Path) -> Any:
    with path.open("rb") as file:
        # Only zip files, which PyTorch writes since 1.6, can be mapped.
        is_zip = file.read(2) == b"PK"
    return unpickling.load(path, mapped=is_zip)


def _leaves(name: str, value: Any) -> Iterator[SavedTensor]:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        nbytes = value.numel() * value.element_size()
        read = None if value.is_meta else functools.partial(_array, value.detach())
        yield SavedTensor(name, dtype, tuple(value.shape), nbytes, read)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), part)
    elif isinstance(value, (list, tuple)) and not (value and all(isinstance(one, _NUMBERS) for one in value)):
        for index, part in enumerate(value):
            yield from _leaves(f"{name}[{index}]", part)
    else:
        yield _plain(name, value)


def _plain(name: str, value: Any) -> SavedTensor:
    """A number, a string, None, or a list of numbers, such as the random state of Python."""
    if isinstance(value, (*_NUMBERS, list, tuple)):
        array = np.asarray(value)
        if array.dtype.kind not in "biufc":  # The value is an integer of more than 64 bits.
            array = np.asarray(value, dtype=object)
    else:
        array = np.empty((), dtype=object)
        array[()] = value if isinstance(value, (str, bytes)) else str(value)
    return SavedTensor(name, type(value).__name__, tuple(array.shape), None, lambda: array, is_plain=True)


def _array(tensor: torch.Tensor) -> Any:
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.dtype is torch.complex32:
        tensor = tensor.to(torch.complex64)
    tensor = tensor.resolve_conj().resolve_neg()
    try:
        return tensor.numpy()
    except TypeError:  # NumPy has no bfloat16 and no 8-bit floats.
        return tensor.float().numpy()
