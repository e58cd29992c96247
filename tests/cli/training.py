"""Programs that tests have the launcher start: a small run on the fake engine that ends as it is told.

Usage: training.py LOGDIR WHAT [STEPS]
"""

from __future__ import annotations

import os
import signal
import sys
import time

from stepguard import heartbeat, launched, ledger
from stepguard.testing import FakeSupervisor


def train(logdir: str, what: str, steps: int) -> None:
    """Train on from where the run was, a step in 5 ms, and end as ``what`` says."""
    if what == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sv = FakeSupervisor(logdir, save_model_secs=None, save_model_steps=5, save_summaries_secs=None, save_at_end=True)
    told = Told(logdir, sv)
    with sv.managed_session() as session:
        first = session.step
        told.ready(session.step)
        try:
            while session.step < steps and not sv.should_stop():
                time.sleep(0.005)
                session.run_step()
                told.step(session.step)
                if what == "die" and session.step == first + 8:
                    # Once the checkpoint of five steps is there.
                    while not os.path.exists(f"{logdir}/model.ckpt-{first + 5}.manifest.json"):
                        time.sleep(0.005)
                    os.kill(os.getpid(), signal.SIGKILL)
                if what == "fail" and session.step == 7:
                    raise ValueError(f"step {session.step} cannot be done, {id(sv):#x}")
        except BaseException as error:
            told.stop(error)
            raise
        told.stop(None, "sigterm" if sv.should_stop() else "finished")


class Told:
    def __init__(self, logdir, sv):
        self.logdir = logdir
        self.book = ledger.Ledger(logdir, role="chief")
        self.previous = heartbeat.read_one(logdir, "chief")
        launched.announce(logdir)
        self.book.append("start", engine="fake", attempt=launched.attempt())
        self.beat = heartbeat.Heartbeat("chief", engine="fake")
        heartbeat.write(logdir, self.beat)

    def ready(self, step):
        self.beat.phase, self.beat.step = "training", step
        if self.previous is None:
            self.book.append("fresh", step=step)
        else:
            self.book.append(
                "restore",
                step=step,
                checkpoint=f"model.ckpt-{step}",
                previous_step=self.previous.step,
                previous_time=self.previous.time,
                lost_steps=max(0, (self.previous.step or 0) - step),
            )
        heartbeat.write(self.logdir, self.beat)

    def step(self, step):
        self.beat.step = step
        heartbeat.write(self.logdir, self.beat)

    def stop(self, error, reason="error"):
        if isinstance(error, KeyboardInterrupt):
            reason = "interrupt"
        elif isinstance(error, SystemExit):
            reason = "sigterm"
        self.beat.phase, self.beat.reason = "stopped", reason
        self.beat.error = f"{type(error).__name__}: {error}" if reason == "error" else None
        self.book.append("stop", reason=reason, step=self.beat.step, error=self.beat.error)
        heartbeat.write(self.logdir, self.beat)


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 10**9)
