"""Synchronous training: how the steps of one replica depend on the steps of the others.

The protocol: each step of a replica puts its gradients into accumulators on the parameter servers and waits for a
token. The queue runner of the chief waits until the accumulators have the gradients of all replicas, applies them and
hands out the tokens. Its wait is no step and its ``apply`` is, so a holder of the step boundary does not wait for
the gradients of other replicas; ``Boundary.enter_for_others`` lets ``apply`` pass a holder while a step still waits
for it. The wait for the gradients ends when they come or when the session is closed. :func:`wait_for_standstill` polls
the global step for a few steps only, so no replica waits for long for others that go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from stepguard.tensorflow.run_effects import ancestors

# The steps of other replicas take about as long as ours; for very quick steps, this is the least time to watch.
_SHORTEST_STILL_SECS = 0.5
# Replicas that end together with this one do a step or two more. Others go on: nothing is gained by a longer wait.
_SETTLE_STEPS = 6
_SHORTEST_SETTLE_SECS, _LONGEST_SETTLE_SECS = 1.5, 5.0
# After a signal, which may have come to all replicas or to this one alone.
_SHORTEST_SIGNALLED_SECS = 0.2
_LOOK_SECS = 0.05


def gradients_to_come(graph: Any) -> list[Any]:
    """The accumulators in which synchronous training collects gradients.

    A step of a replica changes these, and not the variables.
    """
    return [op.outputs[0] for op in graph.get_operations() if op.type.endswith("ConditionalAccumulator")]


def gradients_taken(graph: Any, fetches: Any) -> list[Any]:
    """The gradients that a run of ``fetches`` takes out of accumulators; the run waits until they are complete.

    Empty if the run also has the taking operation as a control input, because a control input cannot be fed.
    """
    try:
        elements = [graph.as_graph_element(item) for item in tf.nest.flatten(fetches)]
    except (TypeError, ValueError, KeyError):
        return []  # Only the session can read such a fetch; or the fetch is wrong, and the session reports it better.
    needed = ancestors(element if isinstance(element, tf.Operation) else element.op for element in elements)
    taking = {operation for operation in needed if operation.type.endswith("AccumulatorTakeGradient")}
    if any(taking.intersection(operation.control_inputs) for operation in needed):
        return []
    return [output for operation in sorted(taking, key=lambda one: str(one.name)) for output in operation.outputs]


class AggregatingRun:
    """The queue runner's run in synchronous training, in two parts: wait for all replicas' gradients, and apply them.

    As one run it would be a step that ends only when the next steps of all replicas have begun, so no step boundary
    would ever come. The wait changes nothing that is saved, so it is no step; a snapshot between the two parts holds
    the state before these gradients. ``apply`` is a step, and short.

    The wait is in native code, and only the closing of the session ends it. It happens inside ``waiting()``, so that
    a stop does not wait for its thread before the session is closed.
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
            tf.errors.OutOfRangeError: the session was closed. It makes a queue runner end without an error.
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
    may_go_on: bool = False,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Wait until ``step()`` has not changed for twice ``step_secs``, the length of this replica's longest recent step.

    The wait ends after six such steps, 1.5 to 5 seconds, or after ``timeout_secs``, whichever is shorter. If the others
    ``may_go_on``, it ends after two steps, 0.2 to 5 seconds, whether they do or not.
    """
    now = clock()
    if may_go_on:
        settle_secs = still_secs = max(_SHORTEST_SIGNALLED_SECS, min(2 * step_secs, _LONGEST_SETTLE_SECS))
    else:
        settle_secs = max(_SHORTEST_SETTLE_SECS, min(_SETTLE_STEPS * step_secs, _LONGEST_SETTLE_SECS))
        still_secs = max(2 * step_secs, _SHORTEST_STILL_SECS)
    deadline = now + min(timeout_secs, settle_secs)
    last, still_since = step(), now
    while (now := clock()) < min(deadline, still_since + still_secs):
        wait(_LOOK_SECS)
        current = step()
        if current != last:
            last, still_since = current, clock()
