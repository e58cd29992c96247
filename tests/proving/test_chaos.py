"""`stepguard chaos` as a user calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stepguard.cli.proving.chaos import KINDS, Chaos
from stepguard.store import CheckpointStore
from stepguard.watching import ledger

PROGRAM = Path(__file__).with_name("training.py")


def test_a_run_comes_to_its_end_through_random_faults_in_its_own_logdir(tmp_path):
    command = [sys.executable, "-m", "stepguard", "chaos", "--for-secs=5", "--every-secs=0.4", "--seed=1", "--"]
    ended = subprocess.run(
        [*command, sys.executable, str(PROGRAM), "long"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "done at 2500" in ended.stdout
    assert "bit for bit the same" in ended.stderr
    # One process trains: the kind of fault that needs several is told to be left out.
    assert ", 0 process, " in ended.stderr
    assert CheckpointStore(tmp_path / "run").newest_good(quarantine=False).checkpoint.step == 2500
    assert sum(one["event"] == "restart" for one in ledger.read(tmp_path / "run")) >= 1


def test_the_faults_of_many_hours_leave_the_program_its_own_restarts(tmp_path):
    chaos = Chaos(["x"], kinds=KINDS, lasts_secs=8 * 3600, every_secs=30, seed=0, announcements=tmp_path, say=print)
    (most,) = [one.partition("=")[2] for one in chaos.command() if one.startswith("--max-restarts=")]
    assert int(most) >= 8 * 3600 / 30 * 2 + 100


def test_a_fault_that_would_end_the_run_for_good_is_refused(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "stepguard", "chaos", "--faults=sigterm", "--", "true"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "expected some of kill, save, damage, disk, process, found 'sigterm'" in ended.stderr


def test_a_replay_that_differs_is_found_also_in_a_ledger_that_was_put_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_MOST_BYTES", 2000)
    written = ledger.Ledger(tmp_path, role="chief")
    written.append("replay", outcome="differs", compared=7, message="step 3 is not what it was")
    for step in range(100):
        written.append("checkpoint", name=f"model.ckpt-{step}", step=step)
    assert not any(one["event"] == "replay" for one in ledger.read(tmp_path))
    chaos = Chaos(["true"], kinds=KINDS, lasts_secs=1, every_secs=1, seed=0, announcements=tmp_path / "none", say=print)
    chaos._began = 0.0
    monkeypatch.setattr(chaos, "_logdir", lambda: tmp_path)

    chaos._read_replays()

    assert chaos._outcome.differs == "step 3 is not what it was"
    assert (chaos._outcome.steps_again, dict(chaos._outcome.replays)) == (7, {"differs": 1})
