"""One tensor of a checkpoint, described in the same way for every framework: to be shown, or to be exported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor in a checkpoint, or, with ``is_plain``, a number, a string or a list of numbers beside the tensors.

    ``nbytes`` is None for strings. ``read`` gives a NumPy
    array of booleans, integers, floats, complex numbers or objects (strings); types that NumPy has not are widened to
    float32. It is None for what no array can hold. It raises CheckpointCorruptError if the bytes are damaged.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int | None
    read: Callable[[], Any] | None
    is_plain: bool = False


@dataclass(frozen=True, slots=True)
class SavedWeight:
    """One tensor of a part of a checkpoint, as it was saved.

    ``name`` is its name in that part, ``dtype`` the type by the name that PyTorch and JAX have for it, such as
    "bfloat16". ``read`` gives its values in C order as a flat NumPy array of bytes, the least byte of a number first;
    it raises CheckpointCorruptError if they are damaged. Weights with an equal ``memory`` are one tensor under several
    names.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Any]
    memory: object
