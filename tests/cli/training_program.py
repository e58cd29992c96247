"""A program that tests have the launcher start: a small run on the fake engine that ends as it is told.

Usage: training_program.py LOGDIR WHAT [STEPS]
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time

from stepguard.coordination import signals
from stepguard.options import Stopping, Watching
from stepguard.testing import FakeSupervisor
from stepguard.watching import ledger

STOPPINGS = {
    "choose": Stopping(exit_codes={"stopped": 75, "finished": 10, "error": 11}),
    "usr2": Stopping(signals=[signal.SIGUSR2, signal.SIGINT]),
    "limit": Stopping(after_secs=2.0),
}


def train(logdir: str, what: str, steps: int) -> None:
    """Train on from where the run was, a step in 5 ms, and end as ``what`` says."""
    if "ECHO_SECS" in os.environ:
        signals._ECHO_SECS = float(os.environ["ECHO_SECS"])
    if what == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sv = FakeSupervisor(
        logdir,
        is_chief=what != "fail as worker",
        save_model_secs=None,
        save_model_steps=5,
        save_summaries_secs=None,
        watching=Watching(total_steps=10**9),
        stopping=STOPPINGS.get(what.split(maxsplit=1)[0], Stopping()),
    )
    with sv.managed_session() as session:
        first = session.step
        while session.step < steps and not sv.should_stop():
            time.sleep(0.005)
            session.run_step()
            if what == "die" and session.step == first + 8:
                # Once the checkpoint of five steps is there.
                while not os.path.exists(f"{logdir}/model.ckpt-{first + 5}.manifest.json"):
                    time.sleep(0.005)
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "choose to stop" and session.step == first + 8:
                sv.request_stop()
            if what == "usr2 and sleep":
                time.sleep(30)
            if what == "choose to fail":
                raise ValueError("bad batch")
            if what == "fail as worker":
                raise ValueError("bad batch")
            if what == "lose the worker" and _has_lost_its_worker(logdir):
                raise RuntimeError("connection closed by peer")
            if what == "fail" and session.step == 7:
                raise ValueError(f"step {session.step} cannot be done, {id(sv):#x}")


def _has_lost_its_worker(logdir: str) -> bool:
    events = ledger.read(logdir)
    # By their times: the launcher's line may come late, once it has found the logdir.
    launched = max((one["time"] for one in events if one["event"] == "launch"), default=math.inf)
    return any(one["event"] == "stop" and one["role"] == "worker" and one["time"] >= launched for one in events)


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 10**9)
