"""Taking one step's state out of a TensorFlow session, and writing it as an ordinary TensorFlow checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

_log = logging.getLogger(__name__)
_v1 = tf.compat.v1

# A master that is another process answers in one message, and protocol buffers end at 2 GiB.
_LARGEST_MESSAGE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class TensorSnapshot:
    """The tensors of one step, as NumPy arrays that belong to the snapshot alone."""

    step: int | None
    tensors: tuple[Any, ...]
    written: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in memory; strings count by their pointers."""
        return sum(int(array.nbytes) for array in self.tensors)


@dataclass(frozen=True, slots=True)
class WrittenSnapshot:
    """A step that could not be held in memory: its saver has written it already, to the prefix ``written``."""

    step: int | None
    written: str
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class SavePlan:
    """What a graph's own save operation would write: names, slices and the tensors to fetch.

    ``encoded`` holds the positions of tensors that no array can hold (the state of iterators): they are fetched
    serialised, and parsed again by the graph that writes.
    """

    names: tuple[str, ...]
    slices: tuple[str, ...]
    fetches: tuple[Any, ...]
    encoded: frozenset[int]
    is_central: bool = True
    """Whether the save operation brings all tensors to one place, and one message may carry them."""

    def take(self, run: Any, global_step: Any) -> TensorSnapshot:
        """Fetch everything in one run. ``run`` is a ``Session.run`` that is not held up by the boundary."""
        fetched, step = run([list(self.fetches), [] if global_step is None else global_step])
        return TensorSnapshot(
            step=None if global_step is None else as_step(step),
            tensors=tuple(_owned(array) for array in fetched),
        )


def plan(saver: Any, graph: Any) -> SavePlan | None:
    """How to fetch what ``saver`` saves, or ``None`` where only the saver itself knows.

    Called before the graph is finalised: state that no array can hold needs an operation that serialises it.
    """
    # A subclass that saves in its own way has to be asked to.
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
    operations = save_operations(saved)
    for operation in operations:
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
            fetches.append(tensor)
    if not fetches:
        return None
    is_central = all(tf.DeviceSpec.from_string(operation.device or "").job is None for operation in operations)
    is_central = is_central and sum(map(_static_bytes, fetches)) <= _LARGEST_MESSAGE_BYTES
    return SavePlan(tuple(names), tuple(slices), tuple(fetches), frozenset(encoded), is_central)


def _static_bytes(tensor: Any) -> int:
    return (tensor.shape.num_elements() or 0) * int(tensor.dtype.base_dtype.size)


def save_operations(saved: Any) -> list[Any]:
    """The operations that write the tensors of a checkpoint, among all those that ``saved`` needs."""
    found = []
    seen = set()
    waiting = [saved.op]
    while waiting:
        operation = waiting.pop()
        if operation in seen:
            continue
        seen.add(operation)
        if operation.type == "SaveV2":
            found.append(operation)
            continue
        waiting.extend(tensor.op for tensor in operation.inputs)
        waiting.extend(operation.control_inputs)
    return sorted(found, key=lambda operation: operation.name)


def as_step(value: Any) -> int:
    """The global step as a number: its tensor may be of rank 0, or of rank 1 and size 1."""
    return int(np.asarray(value).reshape(-1)[0])


def _owned(fetched: Any) -> Any:
    # What a run returns may share memory with a variable that is updated in place.
    array = np.asarray(fetched)
    return array if array.flags.owndata else array.copy()


class BundleWriter:
    """Writes snapshots of one plan as TensorFlow checkpoints, in a small graph of its own. One thread at a time."""

    def __init__(self, save_plan: SavePlan) -> None:
        self._graph = tf.Graph()
        with self._graph.as_default(), tf.device("/cpu:0"):
            self._prefix = _v1.placeholder(tf.string, [])
            self._inputs = [
                _v1.placeholder(tf.string if index in save_plan.encoded else tensor.dtype.base_dtype)
                for index, tensor in enumerate(save_plan.fetches)
            ]
            tensors = [
                tf.raw_ops.ParseTensor(serialized=fed, out_type=tf.variant) if index in save_plan.encoded else fed
                for index, fed in enumerate(self._inputs)
            ]
            self._save = tf.raw_ops.SaveV2(
                prefix=self._prefix,
                tensor_names=list(save_plan.names),
                shape_and_slices=list(save_plan.slices),
                tensors=tensors,
            )
        self._graph.finalize()
        self._session: Any = None

    def write(self, snapshot: TensorSnapshot, prefix: Path) -> None:
        """Write ``prefix.index`` and ``prefix.data-00000-of-00001``; not yet durable."""
        if self._session is None:
            self._session = _v1.Session(graph=self._graph, config=_v1.ConfigProto(device_count={"GPU": 0}))
        feeds = dict(zip((tensor.name for tensor in self._inputs), snapshot.tensors, strict=True))
        self._session.run(self._save, {self._prefix.name: str(prefix), **feeds})

    def close(self) -> None:
        """Give back the session. The next write makes a new one."""
        if self._session is not None:
            self._session.close()
            self._session = None
