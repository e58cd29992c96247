"""Microseconds that a supervisor adds to every step, over a bare session.

All four run in one process, each with a graph of its own, in turns of some dozen steps: what else the machine does
meets all of them alike. In every turn the median of the bare steps is taken off that of the others; the medians of
these differences over all turns are printed. Each loop asks ``should_stop()`` before each step, as training loops do.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable
from typing import Any

from common import NAMES, disable_eager_execution, median, print_machine, print_table, run_child, write_result

STYLES = ("op", "list", "dict")


def build(model: str) -> tuple[Any, Any]:
    """A training operation and a loss in the current graph."""
    import tensorflow as tf

    v1 = tf.compat.v1
    global_step = v1.train.get_or_create_global_step()
    if model == "tiny":
        train = v1.assign_add(global_step, 1)
        return train.op, tf.constant(0.0)
    x = v1.random_normal([32, 64], seed=1)
    labels = tf.zeros([32], tf.int32)
    for layer, units in enumerate((64, 10)):
        kernel = v1.get_variable(f"kernel_{layer}", [x.shape[1], units], use_resource=True)
        x = tf.tanh(tf.matmul(x, kernel))
    loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=x))
    return v1.train.GradientDescentOptimizer(0.01).minimize(loss, global_step=global_step), loss


@contextlib.contextmanager
def opened(kind: str, model: str) -> Any:
    """A session of one kind, what says that it should stop, and what to fetch."""
    import tensorflow as tf

    import stepguard.tensorflow

    v1 = tf.compat.v1
    with contextlib.ExitStack() as stack:
        logdir = stack.enter_context(tempfile.TemporaryDirectory())
        graph = tf.Graph()
        with graph.as_default():
            train, loss = build(model)
            if kind == "bare":
                session = stack.enter_context(v1.Session())
                session.run(v1.global_variables_initializer())
                stop: Callable[[], bool] = bool
            elif kind == "mts":
                session = stack.enter_context(v1.train.MonitoredTrainingSession(checkpoint_dir=logdir))
                stop = session.should_stop
            else:
                supervisor = (v1.train if kind == "tf" else stepguard.tensorflow).Supervisor(logdir=logdir)
                session = stack.enter_context(supervisor.managed_session())
                stop = supervisor.should_stop
        yield session, stop, {"op": train, "list": [train, loss], "dict": {"train": train, "loss": loss}}


def timed_turn(session: Any, stop: Callable[[], bool], fetches: Any, steps: int) -> float:
    """Seconds for one step: the median of ``steps``, which no other process can spoil."""
    run, clock = session.run, time.perf_counter
    marks = [clock()]
    for _ in range(steps):
        if stop():
            break
        run(fetches)
        marks.append(clock())
    return median([end - start for start, end in itertools.pairwise(marks)])


def measure(model: str, turns: int, steps: int) -> dict[str, Any]:
    """For every kind and style: the microseconds of a step, and those added to a bare one, of each turn."""
    kinds = list(NAMES)
    disable_eager_execution()
    result: dict[str, Any] = {style: {kind: {"step": [], "added": []} for kind in kinds} for style in STYLES}
    with contextlib.ExitStack() as stack:
        sessions = {kind: stack.enter_context(opened(kind, model)) for kind in kinds}
        for style in STYLES:
            for turn in range(-2, turns):  # Two to warm up.
                order = kinds if turn % 2 else kinds[::-1]
                took = {}
                for kind in order:
                    session, stop, fetches = sessions[kind]
                    took[kind] = 1e6 * timed_turn(session, stop, fetches[style], steps)
                if turn >= 0:
                    for kind in kinds:
                        result[style][kind]["step"].append(took[kind])
                        result[style][kind]["added"].append(took[kind] - took["bare"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each model")
    parser.add_argument("--turns", type=int, default=100, help="turns of each kind in a process")
    parser.add_argument("--steps", type=int, default=60, help="steps of a turn")
    parser.add_argument("--model", choices=("tiny", "mlp"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        write_result(options.out, measure(options.model, options.turns, options.steps))
        return
    print_machine()
    rows = []
    for model in ("tiny", "mlp"):
        arguments = ["--model", model, "--turns", options.turns, "--steps", options.steps]
        rounds = [run_child(__file__, arguments) for _ in range(options.rounds)]
        for style in STYLES:

            def over_all(kind: str, what: str, style: str = style, rounds: Any = rounds) -> float:
                return median([value for one in rounds for value in one[style][kind][what]])

            added = {kind: over_all(kind, "added") for kind in NAMES if kind != "bare"}
            over = median(
                [
                    ours - theirs
                    for one in rounds
                    for ours, theirs in zip(one[style]["ours"]["added"], one[style]["tf"]["added"], strict=True)
                ]
            )
            rows.append([model, style, over_all("bare", "step"), added["tf"], added["mts"], added["ours"], over])
    print("Microseconds: a bare step, and what each adds to it. Reach: ours over TensorFlow's Supervisor <= 3\n")
    print_table(
        ["step", "fetches", "bare step", "+ TF's Supervisor", "+ MonitoredTrainingSession", "+ stepguard", "over TF's"],
        rows,
    )


if __name__ == "__main__":
    main()
