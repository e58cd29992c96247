"""What one replica has to know of the steps of the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

# The step of a replica that is still under way takes about as long as one of ours; this is for those that are quick.
_SHORTEST_STILL_SECS = 0.5
# Replicas that do not end with this one are not waited for longer.
_LONGEST_SETTLE_SECS = 5.0
_LOOK_SECS = 0.05


def gradients_to_come(graph: Any) -> list[Any]:
    """Where synchronous training collects the gradients: a step of a replica changes these, and not the variables."""
    return [op.outputs[0] for op in graph.get_operations() if op.type.endswith("ConditionalAccumulator")]


def wait_for_standstill(
    step: Callable[[], int | None],
    step_secs: float,
    timeout_secs: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Wait until ``step()`` has stood still for twice ``step_secs``, the longest step of this replica.

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
