"""Runs with a mirror, and looks into it: shared by the tests of this folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepguard.options import Mirror, Saving, Stopping
from stepguard.remote.copies import Copies
from stepguard.remote.opening import open_remote
from stepguard.store import CheckpointStore
from stepguard.testing import FakeEngine, FakeSupervisor

SOON_SECS = 60.0


def wait_until(condition: Callable[[], object], secs: float = SOON_SECS) -> None:
    deadline = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def copies(url: str) -> Copies:
    return Copies(open_remote(url))


def names(url: str) -> list[str]:
    return [one.name for one in copies(url).listed()]


def supervisor(
    logdir: Path,
    url: str,
    *,
    every: int | None = None,
    grace: float = 20,
    engine: FakeEngine | None = None,
    **mirror: Any,
) -> FakeSupervisor:
    return FakeSupervisor(
        str(logdir),
        engine=engine,
        save_model_secs=0,
        save_summaries_secs=0,
        save_model_steps=every,
        saving=Saving(save_at_end=True, max_to_keep=3),
        stopping=Stopping(stop_grace_secs=grace),
        mirror=Mirror(url, **mirror),
    )


def train(logdir: Path, url: str, steps: int, **options: Any) -> int:
    """Train, and return the step at which the run began."""
    sv = supervisor(logdir, url, **options)
    with sv.managed_session() as session:
        began = session.step
        for _ in range(steps):
            session.run_step()
    return began


def save_step(sv: FakeSupervisor, session: Any) -> None:
    """Do a step, and wait until its checkpoint is committed here."""
    session.run_step()
    wait_until((Path(sv._store.root) / f"model.ckpt-{session.step}.manifest.json").exists)
    wait_until(lambda: not sv._saving.writer.busy)


def checkpoint_in(root: Path, step: int, content: dict[str, bytes], **options: Any) -> CheckpointStore:
    store = CheckpointStore(root, engine="fake", **options)
    name = store.name(step)
    stage = store.stage(name)
    for key, value in content.items():
        path = stage / name / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value)
    store.commit(name, step)
    return store


def ledger(logdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (logdir / "run.jsonl").read_text().splitlines()]


def warnings(logdir: Path) -> str:
    return "\n".join(line["message"] for line in ledger(logdir) if line["event"] == "warning")


def files_gone(logdir: Path) -> None:
    """Remove every checkpoint, as pruning or somebody might."""
    remove(logdir, "model.ckpt-")


def remove(logdir: Path, beginning: str) -> None:
    """Remove every file of a logdir whose name begins so."""
    for one in logdir.glob(f"{beginning}*"):
        shutil.rmtree(one) if one.is_dir() else one.unlink()


def pass_a_tick(copies: Copies) -> None:
    """Wait until the clock of the place has moved on: S3 has seconds."""
    began = max(one.modified for one in copies.remote.objects())

    def has_moved() -> bool:
        copies.remote.put("clock", b"x")
        found = copies.remote.head("clock")
        return found is not None and found.modified > began

    wait_until(has_moved)
    copies.remote.delete(["clock"])
