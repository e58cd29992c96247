"""What one replica has to know of the steps of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from stepguard.tensorflow.run_effects import ancestors

# The step of a replica that is still under way takes about as long as one of ours; this is for those that are quick.
_SHORTEST_STILL_SECS = 0.5
# Replicas that do not end with this one are not waited for longer.
_LONGEST_SETTLE_SECS = 5.0
_LOOK_SECS = 0.05


def gradients_to_come(graph: Any) -> list[Any]:
    """Where synchronous training collects the gradients: a step of a replica changes these, and not the variables."""
    return [op.outputs[0] for op in graph.get_operations() if op.type.endswith("ConditionalAccumulator")]


def gradients_taken(graph: Any, fetches: Any) -> list[Any]:
    """What a run of ``fetches`` takes out of the places where gradients are collected: it waits for them.

    Nothing where the run also waits for the taking itself, as a control input: that cannot be fed.
    """
    try:
        elements = [graph.as_graph_element(item) for item in tf.nest.flatten(fetches)]
    except (TypeError, ValueError, KeyError):
        return []  # What the session itself can read, or an error that it reports better.
    needed = ancestors(element if isinstance(element, tf.Operation) else element.op for element in elements)
    taking = {operation for operation in needed if operation.type.endswith("AccumulatorTakeGradient")}
    if any(taking.intersection(operation.control_inputs) for operation in needed):
        return []
    return [output for operation in sorted(taking, key=lambda one: str(one.name)) for output in operation.outputs]


class AggregatingRun:
    """The run of synchronous training's queue runner, in two: wait for the gradients of all replicas, and apply them.

    As one run it would be a step that ends only when the next steps of all replicas have begun: no step boundary would
    ever come. The wait changes nothing that is saved, and so is no step; a snapshot that falls between the two holds
    the state before these gradients. ``apply`` is a step, and short.

    The wait is in native code, and ends with the session: it is made inside ``waiting()``, so that nobody waits for
    its thread before.
    """

    def __init__(
        self,
        take: Callable[[], Sequence[Any]],
        apply: Callable[..., Any],
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._take = take
        self._apply = apply
        self._waiting = waiting

    def __call__(self) -> Any:
        """Make the run.

        Raises:
            tf.errors.OutOfRangeError: the session was closed. A queue runner ends at that without a word.
        """
        try:
            with self._waiting():
                gradients = self._take()
        except tf.errors.CancelledError as error:
            raise tf.errors.OutOfRangeError(None, None, "closed while it waited for gradients") from error
        return self._apply(*gradients)


def wait_for_standstill(
    step: Callable[[], int | None],
    step_secs: float,
    timeout_secs: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Wait until ``step()`` has stood still for twice ``step_secs``, the longest of the last steps of this replica.

    Not for longer than 5 seconds, nor than ``timeout_secs``.
    """
    now = clock()
    deadline = now + min(timeout_secs, _LONGEST_SETTLE_SECS)
    still_secs = max(2 * step_secs, _SHORTEST_STILL_SECS)
    last, still_since = step(), now
    while (now := clock()) < min(deadline, still_since + still_secs):
        wait(_LOOK_SECS)
        current = step()
        if current != last:
            last, still_since = current, clock()
