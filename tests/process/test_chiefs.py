"""Two chiefs at once, and a logdir with a thousand checkpoints."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from zygote import Zygote, wait_until

from stepguard.store import CheckpointStore
from stepguard.testing import FakeEngine, FakeSupervisor


class TestASecondChief:
    def test_is_refused_with_the_name_of_the_first_which_goes_on(
        self, tensorflow_children: Zygote, tmp_path: Path
    ) -> None:
        began = time.time()
        first = tensorflow_children.start("chief", logdir=str(tmp_path))
        first.wait_for("saved")

        second = tensorflow_children.start("chief", logdir=str(tmp_path))

        refusal = second.wait_for("refused")
        assert second.wait() == 1
        assert refusal["pid"] == first.pid
        assert refusal["host"] == os.uname().nodename
        assert began - 1 <= refusal["since"] <= time.time()
        for named in (str(first.pid), os.uname().nodename, str(tmp_path)):
            assert named in refusal["text"]
        saved = len(first.reports("saved"))
        first.wait_for("saved", count=saved + 2)
        assert first.reports("warning") == [one for one in first.reports("warning") if "skipped" in one["text"]]
        first.kill()

    def test_starts_when_the_first_was_killed(self, tensorflow_children: Zygote, tmp_path: Path) -> None:
        first = tensorflow_children.start("chief", logdir=str(tmp_path))
        first.wait_for("saved", count=2)
        first.kill()

        second = tensorflow_children.start("chief", logdir=str(tmp_path))

        started = second.wait_for("start")
        assert started["good"]
        assert started["step"] >= first.reports("saved")[-1]["step"]
        second.kill()

    def test_of_ten_that_start_at_once_one_goes_on(self, fake_children: Zygote, tmp_path: Path) -> None:
        logdir = str(tmp_path / "run")
        all_of_them = [fake_children.start("train", logdir=logdir) for _ in range(10)]

        def others_gave_up() -> bool:
            return sum(one.poll() is None for one in all_of_them) <= 1

        wait_until(others_gave_up, "the end of all but one")
        (chief,) = [one for one in all_of_them if one.poll() is None]
        chief.wait_for("saved")
        for one in all_of_them:
            if one is not chief:
                assert one.wait() == 1
                assert "LogdirInUseError" in one.output
                assert one.reports("start") == []
        chief.kill()


COUNT = 1000


@pytest.fixture(scope="module")
def crowded(memory_path: Path) -> Path:
    """A logdir with a thousand committed checkpoints."""
    logdir = memory_path / "run"
    store = CheckpointStore(logdir, engine="fake")
    engine = FakeEngine(size=4)
    session = engine.prepare().session
    for _ in range(COUNT):
        session.run_step()
        snapshot = engine.snapshot(session)
        name = engine.checkpoint_name(snapshot.step)
        engine.write(snapshot, store.stage(name), name)
        store.commit(name, snapshot.step)
    return logdir


class TestAThousandCheckpoints:
    # Of this process's own time: that of a busy machine says nothing.

    def test_are_listed_newest_first_and_the_newest_is_found_soon(self, crowded: Path) -> None:
        store = CheckpointStore(crowded)
        began = time.process_time()
        steps = [one.step for one in store.candidates()]
        recovery = store.newest_good()
        took_secs = time.process_time() - began

        assert steps == list(range(COUNT, 0, -1))
        assert recovery.checkpoint is not None
        assert recovery.checkpoint.step == COUNT
        assert took_secs < 10

    def test_cost_a_start_and_a_save_no_time_to_speak_of(self, crowded: Path, tmp_path: Path) -> None:
        logdir = tmp_path / "run"
        shutil.copytree(crowded, logdir)
        sv = FakeSupervisor(str(logdir), size=4, save_summaries_secs=0)
        began = time.process_time()

        with sv.managed_session() as session:
            assert session.step == COUNT
            session.run_step()

        assert time.process_time() - began < 20
        assert CheckpointStore(logdir).candidates()[0].step == COUNT + 1

    def test_are_pruned_to_the_newest_by_the_run_that_owns_them(self, crowded: Path) -> None:
        logdir = crowded.with_name("pruned")
        shutil.copytree(crowded, logdir)
        store = CheckpointStore(logdir, engine="fake", max_to_keep=5)
        store.adopt(reversed(store.candidates()))
        engine = FakeEngine(size=4)
        session = engine.prepare().session
        session.step = COUNT + 1
        name = engine.checkpoint_name(session.step)
        began = time.process_time()

        engine.write(engine.snapshot(session), store.stage(name), name)
        store.commit(name, session.step)
        pruned = store.prune()

        assert time.process_time() - began < 20
        assert len(pruned) == COUNT - 4
        assert [one.step for one in store.candidates()] == [1001, 1000, 999, 998, 997]
        left = {one.name for one in logdir.iterdir() if one.name.startswith("model.ckpt")}
        assert left == {f"model.ckpt-{step}{end}" for step in range(997, 1002) for end in ("", ".manifest.json")}
