"""Takes the state of one step out of a TensorFlow session."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from stepguard.tensorflow.checkpoint.files import BundleTensor
from stepguard.tensorflow.scalars import is_finite
from stepguard.words import logger

_log = logger(__name__)
_v1 = tf.compat.v1

# A master in another process answers in one message, and a protocol buffer is limited to 2 GiB.
_LARGEST_MESSAGE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class TensorSnapshot:
    """The tensors of one step, as NumPy arrays that only the snapshot uses."""

    step: int | None
    tensors: tuple[Any, ...]
    written: str | None = None

    @property
    def nbytes(self) -> int:
        """The size in memory, in bytes; of strings only the pointers are counted."""
        return sum(int(array.nbytes) for array in self.tensors)


@dataclass(frozen=True, slots=True)
class WrittenSnapshot:
    """A step that is not held in memory: its saver has already written it, to the prefix ``written``."""

    step: int | None
    written: str
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class SavePlan:
    """The contents that the graph's own save operation would write: names, slices and the tensors to fetch.

    ``encoded`` holds the positions of tensors that no array can hold (the state of iterators) and that are fetched
    serialised. ``copied`` holds the positions of tensors that the graph itself copies, so that their arrays need no
    other copy. ``shards`` has the shard number of each tensor, from 0 up.
    """

    names: tuple[str, ...]
    slices: tuple[str, ...]
    fetches: tuple[Any, ...]
    encoded: frozenset[int]
    copied: frozenset[int]
    shards: tuple[int, ...]
    is_central: bool = True
    """Whether the save operation brings all tensors to one place, and one message may carry them."""

    def take(self, run: Any, global_step: Any) -> TensorSnapshot:
        """Fetch everything in one run. ``run`` is a ``Session.run`` that does not wait at the boundary."""
        fetched, step = run([list(self.fetches), [] if global_step is None else global_step])
        return TensorSnapshot(
            step=None if global_step is None else as_step(step),
            tensors=tuple(
                value if index in self.copied else _owned(value, self.fetches[index])
                for index, value in enumerate(fetched)
            ),
        )

    def non_finite(self, snapshot: TensorSnapshot) -> list[str]:
        """The names of the tensors of ``snapshot`` that hold NaN or infinity."""
        return [
            self.names[index]
            for index, array in enumerate(snapshot.tensors)
            if (dtype := self.fetches[index].dtype.base_dtype).is_floating or dtype.is_complex
            if not is_finite(array)
        ]

    def sharded(self, snapshot: TensorSnapshot) -> list[list[BundleTensor]]:
        """The tensors of each shard of the checkpoint of ``snapshot``."""
        shards: list[list[BundleTensor]] = [[] for _ in range(max(self.shards) + 1)]
        for index, array in enumerate(snapshot.tensors):
            # The type to save, which for an encoded tensor is not the type that was fetched.
            dtype = tf.variant if index in self.encoded else self.fetches[index].dtype.base_dtype
            shards[self.shards[index]].append(BundleTensor(self.names[index], self.slices[index], dtype, array))
        return shards


def plan(saver: Any, graph: Any) -> SavePlan | None:
    """The plan by which the variables of ``saver`` are fetched, or ``None`` if only the saver itself can save them.

    Called before the graph is finalised, because state that no array can hold needs an operation that serialises it.
    """
    # A subclass with a save() of its own must write the checkpoint itself.
    if not isinstance(saver, _v1.train.Saver) or type(saver).save is not _v1.train.Saver.save:
        return None
    definition = saver.as_saver_def() if saver.saver_def is not None else None
    if definition is None or definition.version != definition.V2 or not definition.save_tensor_name:
        return None
    try:
        saved = graph.get_tensor_by_name(definition.save_tensor_name)
    except (KeyError, ValueError):
        return None
    names: list[str] = []
    slices: list[str] = []
    fetches: list[Any] = []
    encoded: set[int] = set()
    copied: set[int] = set()
    shards: list[int] = []
    operations = save_operations(saved)
    for shard, operation in enumerate(operations):
        _, names_tensor, slices_tensor, *tensors = operation.inputs
        operation_names = tf.get_static_value(names_tensor)
        operation_slices = tf.get_static_value(slices_tensor)
        if operation_names is None or operation_slices is None:
            return None
        names.extend(name.decode() for name in operation_names)
        slices.extend(spec.decode() for spec in operation_slices)
        for tensor in tensors:
            if tensor.dtype.base_dtype == tf.variant:
                if graph.finalized:
                    return None
                with graph.as_default(), tf.device(operation.device):
                    tensor = tf.raw_ops.SerializeTensor(tensor=tensor)
                encoded.add(len(fetches))
            elif (copy := _copy_in_graph(tensor, graph)) is not None:
                tensor = copy
                copied.add(len(fetches))
            fetches.append(tensor)
            shards.append(shard)
    if not fetches:
        return None
    is_central = all(tf.DeviceSpec.from_string(operation.device or "").job is None for operation in operations)
    is_central = is_central and sum(map(_static_bytes, fetches)) <= _LARGEST_MESSAGE_BYTES
    return SavePlan(
        tuple(names),
        tuple(slices),
        tuple(fetches),
        frozenset(encoded),
        frozenset(copied),
        tuple(shards),
        is_central,
    )


def _static_bytes(tensor: Any) -> int:
    return (tensor.shape.num_elements() or 0) * int(tensor.dtype.base_dtype.size)


def save_operations(saved: Any, types: Collection[str] = ("SaveV2",)) -> list[Any]:
    """The operations that write the tensors of a checkpoint, among all operations that ``saved`` needs."""
    found = []
    seen = set()
    waiting = [saved if isinstance(saved, tf.Operation) else saved.op]
    while waiting:
        operation = waiting.pop()
        if operation in seen:
            continue
        seen.add(operation)
        if operation.type in types:
            found.append(operation)
            continue
        waiting.extend(tensor.op for tensor in operation.inputs)
        waiting.extend(operation.control_inputs)
    return sorted(found, key=lambda operation: operation.name)


def as_step(value: Any) -> int:
    """The global step as an int; its tensor may be of rank 0, or of rank 1 and size 1."""
    return int(np.asarray(value).reshape(-1)[0])


# A session copies its results into fresh memory, on one thread and with the GIL held, unless nothing else refers to the
# buffer. A copy made by the graph is such a buffer, and TensorFlow's threads make it.
_COPIED_TYPES = frozenset(
    {
        tf.bool,
        tf.int8,
        tf.int16,
        tf.int32,
        tf.int64,
        tf.uint8,
        tf.uint16,
        tf.uint32,
        tf.uint64,
        tf.float16,
        tf.bfloat16,
        tf.float32,
        tf.float64,
        tf.complex64,
        tf.complex128,
    }
)
_COPIED_BYTES = 1 << 16


def _copy_in_graph(tensor: Any, graph: Any) -> Any:
    """The output of a graph operation that copies a large tensor; ``None`` if the session can as well copy it."""
    dtype = tensor.dtype.base_dtype
    count = tensor.shape.num_elements()
    if dtype not in _COPIED_TYPES or (count is not None and count * dtype.size < _COPIED_BYTES):
        return None
    # An imported graph may already have the copy.
    for operation in tensor.consumers():
        if operation.type == "DeepCopy":
            return operation.outputs[0]
    if graph.finalized:
        return None
    with graph.as_default(), tf.control_dependencies(None), tf.device("/cpu:0"):
        return tf.raw_ops.DeepCopy(x=tensor, name="stepguard/snapshot")


def _owned(fetched: Any, tensor: Any) -> Any:
    if tensor.dtype.base_dtype == tf.string:
        # NumPy's own string type drops zero bytes at the end.
        return np.array(fetched, dtype=object)
    # The result of a run may share memory with a variable that is updated in place.
    array = np.asarray(fetched)
    return array if array.flags.owndata else array.copy()
