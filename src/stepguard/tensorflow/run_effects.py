"""Which runs of a graph can change what its saver saves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from stepguard.words import listed

# Operations that take the handle of a variable, table or iterator and do not change its state. An operation that is not
# listed counts as a change: if that is wrong, a snapshot is delayed by one run; the opposite error would tear one.
_READS = frozenset(
    {
        "Enter",
        "Exit",
        "Identity",
        "IdentityN",
        "IsVariableInitialized",
        "IteratorGetDevice",
        "IteratorToStringHandle",
        "LookupTableExport",
        "LookupTableExportV2",
        "LookupTableFind",
        "LookupTableFindV2",
        "LookupTableSize",
        "LookupTableSizeV2",
        "NextIteration",
        "NoOp",
        "ReadVariableOp",
        "RefEnter",
        "RefExit",
        "RefIdentity",
        "RefMerge",
        "RefNextIteration",
        "RefSelect",
        "RefSwitch",
        "ResourceGather",
        "ResourceGatherNd",
        "SerializeIterator",
        "Switch",
        "Merge",
        "VarIsInitializedOp",
        "VariableShape",
    }
)
# Operations whose handle is known only when they run: it may be the handle of any resource.
_FED_HANDLES = frozenset({"Placeholder", "PlaceholderV2", "PlaceholderWithDefault"})
_FED_ITERATORS = frozenset({"IteratorFromStringHandle", "IteratorFromStringHandleV2"})
_MAX_REMEMBERED = 4096


class RunKinds:
    """Tells whether a run can change the state that is saved. Any thread.

    A run changes the state if it needs an operation that takes the handle of a saved variable, table or iterator and
    that is not known to only read it. An operation never changes once it is in the graph, so each answer stays true
    and is remembered.
    """

    def __init__(self, graph: Any, saved: Iterable[Any]) -> None:
        self._graph = graph
        handles = _handles(saved)
        self._saved = {_resource(operation) for operation in handles}
        self._saves_iterators = any("Iterator" in operation.type for operation in handles)
        # The key holds ids. The value keeps the objects alive, so that no id is reused for another object.
        self._known: dict[Any, tuple[Any, bool]] = {}

    def changes_state(self, fetches: Any) -> bool:
        """Whether ``session.run(fetches)`` can change the saved state."""
        # Called before every run, so it must be fast: a plain list or dictionary is looked up by the ids of its items,
        # without being flattened.
        kind = type(fetches)
        if kind is list or kind is tuple:
            known = self._known.get(tuple(map(id, fetches)))
        elif kind is dict:
            known = self._known.get(tuple(map(id, fetches.values())))
        else:
            known = self._known.get(id(fetches))
        return self._look_up(fetches) if known is None else known[1]

    def _look_up(self, fetches: Any) -> bool:
        single = isinstance(fetches, (tf.Operation, tf.Tensor))
        flat = [fetches] if single else tf.nest.flatten(fetches, expand_composites=True)
        if not all(isinstance(item, (tf.Operation, tf.Tensor, tf.Variable, str)) for item in flat):
            # The program may change such an object, or make a new one for each run: its answer is not remembered.
            return self._examine(flat)
        # A single fetch is remembered by its own id. A list may be changed by the program, so it is remembered by the
        # ids of its items; they are flattened, so none of them is a list, which could be changed too.
        key = id(fetches) if single else tuple([item if isinstance(item, str) else id(item) for item in flat])
        known = self._known.get(key)
        if known is not None:
            return known[1]
        answer = self._examine(flat)
        if len(self._known) >= _MAX_REMEMBERED:
            self._known.clear()
        self._known[key] = (fetches if single else flat, answer)
        return answer

    def _examine(self, flat: list[Any]) -> bool:
        try:
            elements = [self._graph.as_graph_element(item) for item in flat]
        except (TypeError, ValueError, KeyError):
            # Only the session can read this kind of fetch; or the fetch is wrong, and the run reports it better.
            return True
        needed = ancestors(element if isinstance(element, tf.Operation) else element.op for element in elements)
        return any(self._changes(operation) for operation in needed)

    def _changes(self, operation: Any) -> bool:
        if operation.type in _READS:
            return False
        by_reference = {
            index for index, tensor in enumerate(operation.inputs) if _takes_handle(operation, index, tensor)
        }
        if not by_reference:
            return False
        written = by_reference - _read_only_inputs(operation)
        return any(self._may_be_saved(source) for index in written for source in _sources(operation.inputs[index]))

    def _may_be_saved(self, source: Any) -> bool:
        if source.type in _FED_HANDLES:
            return True
        if source.type in _FED_ITERATORS:
            return self._saves_iterators
        return _resource(source) in self._saved


def describe(fetches: Any) -> str:
    """A short name for what a run fetches, for messages."""
    flat = tf.nest.flatten(fetches)
    names = [str(getattr(item, "name", item)) for item in flat]
    return f"[{listed(names, most=3)}]"


def _resource(operation: Any) -> tuple[bytes, bytes]:
    """The resource that the handle of ``operation`` refers to: operations with one shared name share one variable."""
    try:
        container, shared_name = operation.get_attr("container"), operation.get_attr("shared_name")
    except ValueError:
        container, shared_name = b"", b""
    return container, shared_name or operation.name.encode()


def _read_only_inputs(operation: Any) -> set[int]:
    """The inputs that a function call (tf.cond, tf.while_loop, tf.function) is known to only read."""
    try:
        return set(operation.get_attr("_read_only_resource_inputs"))
    except ValueError:
        return set()


def _takes_handle(operation: Any, index: int, tensor: Any) -> bool:
    if tensor.dtype == tf.resource:
        return True
    # An operation that takes a reference by value only reads it.
    return bool(tensor.dtype._is_ref_dtype) and _input_is_ref(operation, index)


def _input_is_ref(operation: Any, index: int) -> bool:
    position = 0
    for argument in operation.op_def.input_arg:
        if argument.number_attr:
            width = operation.get_attr(argument.number_attr)
        elif argument.type_list_attr:
            width = len(operation.get_attr(argument.type_list_attr))
        else:
            width = 1
        position += width
        if index < position:
            return bool(argument.is_ref)
    return True


def ancestors(operations: Iterable[Any]) -> set[Any]:
    """The operations that have to run before ``operations`` can, and ``operations`` themselves."""
    seen: set[Any] = set()
    waiting = list(operations)
    while waiting:
        operation = waiting.pop()
        if operation in seen:
            continue
        seen.add(operation)
        waiting.extend(tensor.op for tensor in operation.inputs)
        waiting.extend(operation.control_inputs)
    return seen


def _sources(tensor: Any) -> set[Any]:
    """The operations that may have made the handle in ``tensor``: its sources, followed through handles only."""
    found: set[Any] = set()
    seen: set[Any] = set()
    waiting = [tensor.op]
    while waiting:
        operation = waiting.pop()
        if operation in seen:
            continue
        seen.add(operation)
        carried = [item.op for item in operation.inputs if _is_handle(item)]
        if carried:
            waiting.extend(carried)
        else:
            found.add(operation)
    return found


def _handles(saved: Iterable[Any]) -> set[Any]:
    """The operations that make the handles from which the tensors ``saved`` are computed."""
    return {
        operation
        for operation in ancestors(tensor.op for tensor in saved)
        if any(_is_handle(output) for output in operation.outputs) and not any(map(_is_handle, operation.inputs))
    }


def _is_handle(tensor: Any) -> bool:
    return tensor.dtype == tf.resource or bool(tensor.dtype._is_ref_dtype)
