"""A small program for the tests of `stepguard prove`: python training.py WAY. It needs no framework.

Each step reports a loss that depends on the state, so that another state shows at once. ``WAY`` says what is wrong
with it; "right" is nothing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from stepguard.options import Saving
from stepguard.testing import FakeSupervisor

WAY = sys.argv[1]
STEP_SECS = 0.003
# The step at which the program itself ends.
LAST = {"ends": 30, "long": 2500, "endless": 10**9}


def train(logdir: str | None, **options: object) -> None:
    sv = FakeSupervisor(logdir, **options)
    if WAY == "reads":
        print("of the real run:", [path.read_text() for path in sorted(Path(str(logdir)).iterdir())])
    if WAY == "writes":
        (Path(str(logdir)) / "best.txt").write_text("the best of all runs")
    with sv.managed_session() as sess:
        since_start = 0
        print("at step", sess.step, flush=True)
        if WAY == "refuses" and sess.step:
            raise ValueError("this run is of another data set")
        while WAY == "deaf" or not sv.should_stop():
            if WAY == "fails" and sess.step == 5:
                raise ValueError("no such digit: 10")
            if sess.step == LAST.get(WAY):
                break
            # The kills of one that is proven are to come before its end on a busy machine, too.
            time.sleep(0.01 if WAY == "right" else STEP_SECS)
            since_start += 1
            sess.loss = float(sess.step + (since_start if WAY == "forgets" else 0))
            if WAY == "random":
                sess.loss = time.perf_counter()
            try:
                sess.run_step()
            except BaseException:
                if WAY != "deaf":
                    raise
    print("done at", sess.step, flush=True)


match WAY:
    case "nothing":
        print("no Supervisor here")
    case "no logdir":
        train(None)
    case "saves nothing":
        train("run", save_model_secs=0, saving=Saving(save_at_end=False))
    case "two":
        train("one")
        train("two")
    case "new logdir":
        train(f"run-{time.time_ns()}")
    case "long":
        train("run", save_model_steps=100)
    case _:
        train("run")
