"""Programs on the fake engine, each run in a process of its own: see ``zygote.py``."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import child
import xxhash  # noqa: F401 - here, where it can be read: a child may be another user
from zygote import report

from stepguard.engine import Prepared
from stepguard.store import CheckpointStore
from stepguard.testing import FakeEngine, FakeSession, FakeSupervisor


class AdoptingEngine(FakeEngine):
    """Goes on pruning where the run before it ended, as the TensorFlow engine does."""

    def prepare(self) -> Prepared[FakeSession]:
        prepared = super().prepare()
        if self.store is not None:
            self.store.adopt(self.store.listed_by_state())
        if prepared.recovered is not None and prepared.recovered.damaged:
            report("damage", text=prepared.recovered.message())
        return prepared


def supervisor(logdir: str, **options: Any) -> FakeSupervisor:
    return FakeSupervisor(logdir, engine=AdoptingEngine(), **{"save_summaries_secs": 0, **options})


def held(logdir: str) -> dict[int, list[int]]:
    """What the committed checkpoints hold, by step; each is verified."""
    store = CheckpointStore(logdir)
    found = {}
    for one in store.candidates():
        verified = store.verify(one)
        assert verified.step is not None
        found[verified.step] = json.loads((verified.path / "state.json").read_text())["values"]
    return found


def train(
    logdir: str,
    *,
    threads: int = 1,
    how: str | None = None,
    at: int | None = None,
    after_saves: int = 2,
    options: dict[str, Any] | None = None,
) -> None:
    """Train for ever, saving again and again."""
    # A step in pure Python keeps the other threads waiting for 5 ms each time; a real one computes outside the GIL.
    sys.setswitchinterval(1e-4)
    before = held(logdir) if Path(logdir).exists() else {}
    child.report_log(child.Break(how, at, after_saves).saved)
    sv = supervisor(logdir, **{"save_model_secs": 0.002, **(options or {})})
    with sv.managed_session() as session:
        torn = [step for step, values in before.items() if set(values) != {step}]
        report("start", step=session.step, good=set(session.values) == {session.step}, torn=torn, held=len(before))

        def loop() -> None:
            while not sv.should_stop():
                session.run_step()

        others = [threading.Thread(target=loop, daemon=True) for _ in range(threads - 1)]
        for one in others:
            one.start()
        loop()
