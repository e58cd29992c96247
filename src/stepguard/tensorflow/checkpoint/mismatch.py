"""Checks whether a checkpoint fits a graph, before anything is overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf

from stepguard.errors import CheckpointMismatchError
from stepguard.saving.mismatch import Mismatch
from stepguard.tensorflow.checkpoint.snapshot import save_operations
from stepguard.tensorflow.checkpoint.tensors import without_pattern

_v1 = tf.compat.v1

# This key marks a checkpoint of tf.train.Checkpoint, which names tensors by object. The Saver restores it in another
# way.
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


class MissingVariablesError(CheckpointMismatchError, tf.errors.NotFoundError):
    """The checkpoint lacks variables of the graph. Also a NotFoundError, as TensorFlow's own Saver raises."""

    def __init__(self, message: str, **fields: Any) -> None:
        tf.errors.NotFoundError.__init__(self, None, None, message)
        CheckpointMismatchError.__init__(self, message, **fields)

    __str__ = Exception.__str__


class ReshapedVariablesError(CheckpointMismatchError, tf.errors.InvalidArgumentError):
    """Variables have another shape or type in the checkpoint. Also an InvalidArgumentError, as the Saver raises."""

    def __init__(self, message: str, **fields: Any) -> None:
        tf.errors.InvalidArgumentError.__init__(self, None, None, message)
        CheckpointMismatchError.__init__(self, message, **fields)

    __str__ = Exception.__str__


def check_fits(saver: Any, graph: Any, path: str) -> None:
    """Compare the variables that ``saver`` would restore with the contents of the checkpoint at ``path``.

    A saver with a ``restore`` of its own is not checked. Errors in reading the checkpoint are TensorFlow's own.

    Raises:
        CheckpointMismatchError: variables are missing, or have another shape or type. The error lists all of them.
    """
    wanted = _wanted(saver, graph)
    if not wanted:
        return
    with without_pattern(path) as place:
        reader = _v1.train.NewCheckpointReader(place)
        shapes, types = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    if _OBJECT_GRAPH in shapes:
        return
    # With reshape=True the saver accepts any shape of the same size.
    found = _compared(wanted, shapes, types, compares_shapes=not getattr(saver, "_reshape", False))
    if not found.missing and not found.reshaped:
        return  # Variables that only the checkpoint has do not matter.
    message = (
        f"{path} does not fit the graph, and nothing was overwritten: {found}. "
        "If the model was changed on purpose, restore the variables that both have with a Saver of your own in "
        "init_fn, and use another logdir"
    )
    kind = MissingVariablesError if found.missing else ReshapedVariablesError
    raise kind(message, path=Path(path), missing=found.missing, unexpected=found.unexpected, reshaped=found.reshaped)


def _compared(wanted: dict[str, tuple[Any, Any]], shapes: Any, types: Any, *, compares_shapes: bool) -> Mismatch:
    found = Mismatch(
        missing=sorted(name for name in wanted if name not in shapes),
        unexpected=sorted(name for name in shapes if name not in wanted),
    )
    for name, (dtype, shape) in sorted(wanted.items()):
        if name not in shapes:
            continue
        held_shape = tf.TensorShape(shapes[name])
        if dtype != types[name] or (compares_shapes and not held_shape.is_compatible_with(shape)):
            found.reshaped[name] = (f"{dtype.name}{shape}", f"{types[name].name}{held_shape}")
    return found


def _wanted(saver: Any, graph: Any) -> dict[str, tuple[Any, Any]]:
    """The saver's variables: name -> (type, shape). Empty if only the saver itself knows them."""
    if not isinstance(saver, _v1.train.Saver) or type(saver).restore is not _v1.train.Saver.restore:
        return {}
    definition = saver.saver_def
    if definition is None or not definition.save_tensor_name:
        return {}
    wanted = {}
    for operation in save_operations(graph.get_tensor_by_name(definition.save_tensor_name)):
        _, names, slices, *tensors = operation.inputs
        names, slices = tf.get_static_value(names), tf.get_static_value(slices)
        if names is None or slices is None:
            return {}
        for name, spec, tensor in zip(names, slices, tensors, strict=True):
            shape = _whole_shape(spec.decode()) if spec else tensor.shape
            wanted[name.decode()] = (tensor.dtype.base_dtype, shape)
    return wanted


def _whole_shape(spec: str) -> Any:
    """The shape of the whole variable of a slice: ``"4 10 0,2:-"`` is a slice of a variable of shape (4, 10)."""
    *dimensions, _ = spec.split(" ")
    return tf.TensorShape([int(size) for size in dimensions])
