"""What a Supervisor works with when the program names nothing: found in the graph's collections, or built and added.

Every function here resolves one argument of the constructor. ``USE_DEFAULT`` ends here: what comes out is a value or
``None``. All of them are called with the graph as the default graph, before it is finalised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
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


def resolve(
    graph: Any,
    *,
    ready_op: Any,
    ready_for_local_init_op: Any,
    init_op: Any,
    init_feed_dict: Any,
    local_init_op: Any,
    saver: Any,
    summary_op: Any,
    global_step: Any,
) -> Model:
    """Replace each argument that is ``USE_DEFAULT`` by what ``graph`` has, or by what is built for it.

    The order matters to nobody but to the names of the operations that are added, and to tools that compare graphs.
    """
    keys = _v1.GraphKeys
    with graph.as_default():
        return Model(
            graph=graph,
            ready_op=_or_default(ready_op, keys.READY_OP, _v1.report_uninitialized_variables),
            ready_for_local_init_op=_or_default(ready_for_local_init_op, keys.READY_FOR_LOCAL_INIT_OP, _nothing),
            init_op=_or_default(init_op, keys.INIT_OP, _v1.global_variables_initializer),
            init_feed_dict=init_feed_dict,
            local_init_op=_or_default(local_init_op, keys.LOCAL_INIT_OP, _local_init),
            saver=_or_default(saver, keys.SAVERS, _saver_of_all_variables),
            summary_op=_or_default(summary_op, keys.SUMMARY_OP, _v1.summary.merge_all),
            global_step=_or_default(global_step, keys.GLOBAL_STEP, _named_global_step),
        )


def summary_tensor(summary_op: Any, graph: Any) -> Any:
    """What to fetch for a summary: of an operation, its one output of strings; anything else as it is."""
    element = graph.as_graph_element(summary_op)
    if isinstance(element, tf.Operation) and [output.dtype for output in element.outputs] == [tf.string]:
        return element.outputs[0]
    return element


def is_default(given: Any) -> bool:
    """Whether an argument asks for the default: only the number itself does, since tensors overload ``==``."""
    return type(given) is int and given == USE_DEFAULT


def _or_default(given: Any, collection: str, build: Callable[[], Any]) -> Any:
    if not is_default(given):
        return given
    found = _v1.get_collection(collection)
    if found:
        if len(found) > 1:
            _log.info("the collection %s holds %d items; the first is used", collection, len(found))
        return found[0]
    built = build()
    if built is not None:
        _v1.add_to_collection(collection, built)
    return built


def _nothing() -> None:
    return None


def _local_init() -> Any:
    return tf.group(_v1.local_variables_initializer(), _v1.tables_initializer())


def _saver_of_all_variables() -> Any:
    # A Saver without variables would refuse to be built.
    return _v1.train.Saver() if _v1.global_variables() else None


def _named_global_step() -> Any:
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
