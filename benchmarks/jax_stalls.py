"""What the steps of a JAX program feel of its checkpoints: beside a bare loop, Orbax and a loop written by hand.

Each saves its state once a second, in turns, with steps that donate the state and with steps that do not. The loop
written by hand copies the state to the host and writes it with NumPy, as the simplest programs do::

    python benchmarks/jax_stalls.py --megabytes=200 --seconds=10

Aims of Stepguard: a step costs 5 us more than in a bare loop; the longest step takes 1 ms more than a normal one where
nothing is donated, and 1.5 copies of the state more where all is. They mean something on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from common import print_table

from stepguard.jax import Supervisor

EVERY_SECS = 1.0
# The first steps compile, and show what is donated.
FIRST = 3

Steps = Iterator[tuple[Any, Callable[[Any], None]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="the size of the state")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each trains")
    parser.add_argument("--overhead-steps", type=int, default=20_000, help="the steps that measure what a step costs")
    arguments = parser.parse_args()
    print(f"A step under the Supervisor costs {overhead(arguments.overhead_steps):.1f} us more than in a bare loop.\n")
    rows = []
    for donates in (False, True):
        for name, train in (("bare", bare), ("Stepguard", ours), ("Orbax, async", orbax), ("by hand", by_hand)):
            with tempfile.TemporaryDirectory() as folder:
                steps = measured(train, Path(folder), arguments.megabytes, arguments.seconds, donates)
            normal, longest = statistics.median(steps), max(steps)
            figures = [f"{secs * 1e3:.1f} ms" for secs in (normal, longest, longest - normal)]
            rows.append([name, "yes" if donates else "no", len(steps), *figures])
    print_table(["saves", "donates", "steps", "normal step", "longest step", "difference"], rows)
    print(f"\nA copy of the state into warm memory takes {copy_secs(arguments.megabytes) * 1e3:.1f} ms.")


def state_of(megabytes: int) -> Any:
    size = megabytes * 1_000_000 // 4 // 8
    return {f"w{n}": jnp.ones(size) for n in range(8)}


def step_of(donates: bool) -> Any:
    def step(state: Any) -> Any:
        return jax.tree.map(lambda array: array * 0.999 + 0.001, state)

    return jax.jit(step, donate_argnums=0 if donates else ())


def measured(train: Any, folder: Path, megabytes: int, seconds: float, donates: bool) -> list[float]:
    """The length of each step in seconds, with what the program does between it and the next."""
    step, lengths = step_of(donates), []
    end = None
    with contextlib.closing(train(folder, state_of(megabytes))) as loop:
        clock = time.perf_counter()
        for state, put in loop:
            put(jax.block_until_ready(step(state)))
            del state
            now = time.perf_counter()
            lengths.append(now - clock)
            clock = now
            if end is None and len(lengths) == FIRST:
                end = now + seconds
            if end is not None and now > end:
                break
    return lengths[FIRST:]


class Kept:
    """The state of a loop without a session."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def put(self, state: Any) -> None:
        self.state = state


def bare(folder: Path, state: Any) -> Steps:  # noqa: ARG001 - as the others
    kept = Kept(state)
    del state
    while True:
        yield kept.state, kept.put


def ours(folder: Path, state: Any) -> Steps:
    sv = Supervisor(folder, save_model_secs=EVERY_SECS, save_summaries_secs=0)
    with sv.managed_session(state) as session:
        del state
        for _ in session.steps():
            yield session.state, lambda new: setattr(session, "state", new)


def orbax(folder: Path, state: Any) -> Steps:
    options = ocp.CheckpointManagerOptions(max_to_keep=5, enable_async_checkpointing=True)
    with ocp.CheckpointManager(folder / "run", options=options) as manager:
        for due, kept, step in _timed(state):
            yield kept.state, kept.put
            if due():
                manager.save(step, args=ocp.args.StandardSave(kept.state))


def by_hand(folder: Path, state: Any) -> Steps:
    for due, kept, step in _timed(state):
        yield kept.state, kept.put
        if due():
            np.savez(folder / f"{step}.npz", **{name: np.asarray(array) for name, array in kept.state.items()})


def _timed(state: Any) -> Iterator[tuple[Callable[[], bool], Kept, int]]:
    kept, saved, step = Kept(state), [time.monotonic()], 0

    def due() -> bool:
        if time.monotonic() - saved[0] < EVERY_SECS:
            return False
        saved[0] = time.monotonic()
        return True

    while True:
        step += 1
        yield due, kept, step


def overhead(steps: int) -> float:
    """Microseconds of the training thread that a step costs beside its own work."""
    states = [{"weight": jnp.ones(3) * number} for number in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        sv = Supervisor(folder, save_model_secs=3600, save_summaries_secs=0)
        with sv.managed_session(states[0]) as session:
            began = time.thread_time()
            for step in session.steps(max_steps=steps):
                session.state = states[step & 1]
            return (time.thread_time() - began) / steps * 1e6


def copy_secs(megabytes: int) -> float:
    source = np.ones(megabytes * 1_000_000 // 4, np.float32)
    target = np.zeros_like(source)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
