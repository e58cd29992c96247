"""The default parts of a Supervisor, where the program names none: found in the graph's collections, or built.

Functions that build are called with the graph as the default graph, before it is finalised. ``USE_DEFAULT`` gets no
further than the methods of :mod:`stepguard.tensorflow.subclassing`: they make a value or ``None`` of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from stepguard.words import logger

_log = logger(__name__)
_v1 = tf.compat.v1

USE_DEFAULT = 0


@dataclass(frozen=True, slots=True)
class Model:
    """The parts of a graph that a supervisor drives. ``None`` means that the program does not want the part."""

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
    """The element to fetch for a summary: the one string output of an operation; any other element unchanged."""
    element = graph.as_graph_element(summary_op)
    if isinstance(element, tf.Operation) and [output.dtype for output in element.outputs] == [tf.string]:
        return element.outputs[0]
    return element


def is_default(given: Any) -> bool:
    """Whether an argument is ``USE_DEFAULT``. Only an ``int`` can be: tensors overload ``==``."""
    return type(given) is int and given == USE_DEFAULT


def local_init() -> Any:
    """The initialisation of local variables and tables."""
    return tf.group(_v1.local_variables_initializer(), _v1.tables_initializer())


def saver_of_all_variables() -> Any:
    """A Saver of all variables, or ``None`` if there are none."""
    # A Saver cannot be built without variables.
    return _v1.train.Saver() if _v1.global_variables() else None


def named_global_step() -> Any:
    """The integer named ``global_step`` (a tensor or a resource variable), or ``None`` if there is none."""
    try:
        found = _v1.get_default_graph().get_tensor_by_name("global_step:0")
    except KeyError:
        return None
    if found.dtype == tf.resource:
        # The tensor is only the handle of a resource variable; the step is read from the variable.
        found = next((variable for variable in _v1.global_variables() if variable.name == "global_step:0"), None)
        if found is None:
            return None
    if found.dtype.base_dtype not in (tf.int32, tf.int64):
        _log.warning(
            "global_step:0 is of type %s, expected int32 or int64: steps are not counted", found.dtype.base_dtype.name
        )
        return None
    return found
