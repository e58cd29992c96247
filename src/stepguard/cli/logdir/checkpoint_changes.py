"""What differs between two checkpoints, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stepguard.cli.logdir import tensor_readers
from stepguard.cli.logdir.contents import ListedCheckpoint
from stepguard.cli.logdir.tensor_statistics import Difference, compare
from stepguard.cli.text import output
from stepguard.store.saved_tensor import SavedTensor


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. ``kind`` is "only in A", "only in B", "shape", "dtype", "values" or "not comparable"."""

    name: str
    kind: str
    a: str | None = None
    b: str | None = None
    difference: Difference | None = None


def compared(
    one: ListedCheckpoint, other: ListedCheckpoint, on_tensor: Callable[[int], object] = lambda _: None
) -> tuple[list[Change], int]:
    """The differences, and how many are equal. ``on_tensor`` is called with the bytes of each tensor of ``one``.

    Raises:
        CommandError: a checkpoint is damaged, or its framework is unknown or missing.
    """
    left = {tensor.name: tensor for tensor in tensor_readers.read_tensors(one)}
    right = {tensor.name: tensor for tensor in tensor_readers.read_tensors(other)}
    changes = []
    equal = 0
    for name, tensor in left.items():
        change = Change(name, "only in A", _form(tensor)) if name not in right else _change(tensor, right[name])
        if change is None:
            equal += 1
        else:
            changes.append(change)
        on_tensor(tensor.nbytes or 0)
    changes += [Change(name, "only in B", None, _form(tensor)) for name, tensor in right.items() if name not in left]
    return changes, equal


def _change(one: SavedTensor, other: SavedTensor) -> Change | None:
    name = one.name
    if one.shape != other.shape:
        return Change(name, "shape", output.shape(one.shape), output.shape(other.shape))
    if one.dtype != other.dtype:
        return Change(name, "dtype", one.dtype, other.dtype)
    if one.read is None or other.read is None:
        return Change(name, "not comparable", one.dtype, other.dtype)
    left, right = one.read(), other.read()
    difference = compare(left, right)
    if not difference.changed:
        return None
    if one.shape:
        return Change(name, "values", difference=difference)
    return Change(name, "values", _value(left), _value(right), difference)


def _value(array: Any) -> str:
    value = array.item()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _form(tensor: SavedTensor) -> str:
    return f"{tensor.dtype} {output.shape(tensor.shape)}" if tensor.shape else tensor.dtype
