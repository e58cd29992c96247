"""CPU used by a managed session that waits: the services' threads, while the main thread does nothing."""

from __future__ import annotations

import argparse
import contextlib
import resource
import tempfile
import threading
import time
from typing import Any

from common import NAMES, disable_eager_execution, median, print_machine, print_table, run_child, write_result

KINDS = ("bare", "tf", "ours")


def measure(kind: str, secs: float, service_secs: float | None, settle_secs: float) -> dict[str, Any]:
    """CPU seconds and context switches in ``secs`` of waiting."""
    import tensorflow as tf

    import stepguard.tensorflow

    disable_eager_execution()
    v1 = tf.compat.v1
    timers = {} if service_secs is None else {"save_model_secs": service_secs, "save_summaries_secs": service_secs}
    with contextlib.ExitStack() as stack:
        logdir = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(tf.Graph().as_default())
        step = v1.assign_add(v1.train.get_or_create_global_step(), 1)
        v1.summary.scalar("loss", tf.constant(1.0))
        if kind == "bare":
            session = stack.enter_context(v1.Session())
            session.run(v1.global_variables_initializer())
        else:
            module = v1.train if kind == "tf" else stepguard.tensorflow
            session = stack.enter_context(module.Supervisor(logdir=logdir, **timers).managed_session())
        session.run(step)
        time.sleep(settle_secs)  # The first tick of every service.
        before, switches = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        time.sleep(secs)
        after = time.process_time()
        return {
            "cpu_secs": after - before,
            "switches": resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - switches,
            "threads": threading.active_count(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--secs", type=float, default=20.0, help="how long each waits")
    parser.add_argument("--service-secs", type=float, help="interval of all services; by default the usual ones")
    parser.add_argument("--settle-secs", type=float, default=3.0, help="before that, for the services to start")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        write_result(options.out, measure(options.kind, options.secs, options.service_secs, options.settle_secs))
        return
    print_machine()
    arguments = ["--secs", options.secs, "--settle-secs", options.settle_secs]
    if options.service_secs is not None:
        arguments += ["--service-secs", options.service_secs]
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
        for kind in KINDS:
            found[kind].append(run_child(__file__, ["--kind", kind, *arguments]))
    per_minute = 60.0 / options.secs
    interval = "the default timers" if options.service_secs is None else f"a tick every {options.service_secs:g} s"
    print(f"Waiting for {options.secs:g} s with {interval}; medians of {options.rounds} rounds\n")
    print_table(
        ["", "CPU ms a minute", "lowest", "highest", "times a thread went to sleep, a minute", "Python threads"],
        [
            [
                NAMES[kind],
                per_minute * 1e3 * median([one["cpu_secs"] for one in ones]),
                per_minute * 1e3 * min(one["cpu_secs"] for one in ones),
                per_minute * 1e3 * max(one["cpu_secs"] for one in ones),
                round(per_minute * median([one["switches"] for one in ones])),
                ones[0]["threads"],
            ]
            for kind, ones in found.items()
        ],
    )


if __name__ == "__main__":
    main()
