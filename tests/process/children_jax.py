"""JAX programs, each run in a process of its own: see ``zygote.py``."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import states_at_end

from stepguard import Stopping
from stepguard.jax import Supervisor


def ends_in(state: str, logdir: str) -> None:
    """End in one of the states of ``states_at_end.py``."""
    sv = Supervisor(logdir=logdir, stopping=Stopping(stop_grace_secs=5))
    add = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree))
    beginning = {"weight": np.zeros(2, "float32")}

    def step(session: Any) -> None:
        with session.step():
            session.state = add(session.state)

    states_at_end.end(
        state,
        sv,
        functools.partial(sv.prepare_or_wait_for_session, beginning),
        functools.partial(sv.managed_session, beginning),
        step,
    )
