"""What a Supervisor works with when the program names nothing: found in the graph's collections, or built and added.

All that builds is called with the graph as the default graph, before it is finalised. ``USE_DEFAULT`` ends in the
methods of :mod:`stepguard.tensorflow.subclassing`: what comes out of them is a value or ``None``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

_log = logging.getLogger(__name__)
_v1 = tf.compat.v1

USE_DEFAULT = 0


@dataclass(frozen=True, slots=True)
class Model:
    """The parts of a graph that a supervisor drives. ``None`` means that the program wants to do without."""

    graph: Any
    ready_op: Any
    ready_for_local_init_op: Any
    init_op: Any
    init_feed_dict: Any
    local_init_op: Any
    saver: Any
    summary_op: Any
    global_step: Any


def summary_tensor(summary_op: Any, graph: Any) -> Any:
    """What to fetch for a summary: of an operation, its one output of strings; anything else as it is."""
    element = graph.as_graph_element(summary_op)
    if isinstance(element, tf.Operation) and [output.dtype for output in element.outputs] == [tf.string]:
        return element.outputs[0]
    return element


def is_default(given: Any) -> bool:
    """Whether an argument asks for the default: only the number itself does, since tensors overload ``==``."""
    return type(given) is int and given == USE_DEFAULT


def local_init() -> Any:
    """The initialisation of local variables and tables."""
    return tf.group(_v1.local_variables_initializer(), _v1.tables_initializer())


def saver_of_all_variables() -> Any:
    """A Saver, or ``None`` where there is nothing to save."""
    # A Saver without variables would refuse to be built.
    return _v1.train.Saver() if _v1.global_variables() else None


def named_global_step() -> Any:
    """The integer of size 1 named ``global_step``: a tensor, or the resource variable of that name."""
    try:
        found = _v1.get_default_graph().get_tensor_by_name("global_step:0")
    except KeyError:
        return None
    if found.dtype == tf.resource:
        # The tensor is only the handle of a resource variable; the variable is what can be read.
        found = next((variable for variable in _v1.global_variables() if variable.name == "global_step:0"), None)
        if found is None:
            return None
    if found.dtype.base_dtype not in (tf.int32, tf.int64):
        _log.warning(
            "global_step:0 is of type %s, expected int32 or int64: steps are not counted", found.dtype.base_dtype.name
        )
        return None
    return found
