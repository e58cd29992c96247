"""Copies long lists of small tensors, such as a replay buffer, in one piece.

A copy of each tensor alone costs some 10 us, so a buffer of 100,000 transitions would stop the training for seconds.
One copy of all their bytes takes milliseconds. The thread that writes the checkpoint makes the list again: its tensors
are parts of one memory, which is also written as one.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

# Shorter lists are copied tensor by tensor, each into its own memory.
LONG = 256
_form = operator.attrgetter("dtype", "layout", "is_cpu")
_PLAIN = {bool, int, float, complex, str, bytes, type(None)}


class Packed:
    """The copy of one list. Made on the training thread; :meth:`unpacked` is for the thread that writes."""

    def __init__(self, columns: list[Any], keys: Any) -> None:
        # The columns of the rows, which are tuples, lists or dictionaries; or one column, whose values are the items.
        self._columns = columns
        self._keys = keys

    @property
    def nbytes(self) -> int:
        """The size of the tensors in bytes."""
        return sum(column.nbytes for column in self._columns if isinstance(column, (Packed, _Tensors)))

    def unpacked(self) -> list[Any]:
        """The list itself."""
        columns = [column if isinstance(column, list) else column.unpacked() for column in self._columns]
        if self._keys is None:
            return columns[0]
        rows = zip(*columns, strict=True)
        if isinstance(self._keys, type):
            return [self._keys(row) for row in rows]
        return [dict(zip(self._keys, row, strict=True)) for row in rows]


class _Tensors:
    def __init__(self, flat: torch.Tensor, shapes: list[torch.Size] | None) -> None:
        self._flat = flat
        # `None` if the tensors have one shape, and the first dimension of `flat` is their number.
        self._shapes = shapes
        self.nbytes = flat.nbytes

    def unpacked(self) -> list[torch.Tensor]:
        if self._shapes is None:
            return list(self._flat.unbind())
        parts = self._flat.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def packed(path: str, values: list[Any], buffers: dict[str, torch.Tensor]) -> Packed | None:
    """A copy of the long list ``values``, in memory from ``buffers`` that is reused; ``None`` if it has another form.

    The items are tensors of one type on the CPU, or plain values, or rows of these: tuples, lists, or dictionaries with
    the same keys.
    """
    kinds = set(map(type, values))
    if len(kinds) != 1:
        return None
    (kind,) = kinds
    if kind in (tuple, list):
        widths = set(map(len, values))
        columns = [list(column) for column in zip(*values, strict=True)] if len(widths) == 1 else []
        keys: Any = kind
    elif kind is dict:
        keys = list(values[0])
        is_even = all(len(one) == len(keys) and all(key in one for key in keys) for one in values)
        columns = [[one[key] for one in values] for key in keys] if is_even else []
    else:
        columns, keys = [values], None
    copied = [_packed_column(f"{path}[*][{number}]", column, buffers) for number, column in enumerate(columns)]
    if not copied or None in copied:
        return None
    return Packed(copied, keys)


def _packed_column(path: str, column: list[Any], buffers: dict[str, torch.Tensor]) -> Any:
    kinds = set(map(type, column))
    if kinds <= _PLAIN:
        return list(column)
    if kinds != {torch.Tensor} or column[0].is_quantized:
        return None
    forms = set(map(_form, column))
    dtype, layout, is_cpu = next(iter(forms))
    # A tensor that is there twice stays one tensor, so such a list is copied item by item.
    if len(forms) != 1 or layout is not torch.strided or not is_cpu or len(set(map(id, column))) != len(column):
        return None
    try:
        shape = (len(column), *column[0].shape)
        return _Tensors(torch.stack(column, out=_buffer(path, shape, dtype, buffers)), None)
    except RuntimeError:
        # They have several shapes.
        shapes = [one.shape for one in column]
        flat = _buffer(path, (sum(map(torch.Size.numel, shapes)),), dtype, buffers)
        return _Tensors(torch.cat([one.reshape(-1) for one in column], out=flat), shapes)


def _buffer(path: str, shape: tuple[int, ...], dtype: torch.dtype, buffers: dict[str, torch.Tensor]) -> torch.Tensor:
    buffer = buffers.get(path)
    if buffer is None or buffer.shape != shape or buffer.dtype != dtype:
        buffer = buffers[path] = torch.empty(shape, dtype=dtype)
    return buffer


def unpacked(state: Any) -> Any:
    """A nested state with its lists made again. The containers of ``state`` are changed in place where they can be."""
    if isinstance(state, Packed):
        return state.unpacked()
    if isinstance(state, (dict, OrderedDict)):
        for key, part in state.items():
            state[key] = unpacked(part)
    elif isinstance(state, list) and any(isinstance(part, (Packed, dict, list, tuple)) for part in state):
        state[:] = [unpacked(part) for part in state]
    elif isinstance(state, tuple) and any(isinstance(part, (Packed, dict, list, tuple)) for part in state):
        return type(state)(unpacked(part) for part in state)
    return state


def packed_bytes(state: Any) -> int:
    """The size of the tensors in the packed lists of a nested state, in bytes."""
    if isinstance(state, Packed):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(packed_bytes(part) for part in state.values())
    if isinstance(state, (list, tuple)) and len(state) < LONG:
        return sum(packed_bytes(part) for part in state)
    return 0
