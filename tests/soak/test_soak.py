"""The soaks, a little of each: `make soak` runs them for an hour."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent
sys.path.insert(0, str(SOAK))

import fresh_environments  # noqa: E402
import fuzzed  # noqa: E402
import inodes  # noqa: E402
import soak  # noqa: E402
import unreadable  # noqa: E402

from stepguard.store import verification  # noqa: E402


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logdir = tmp_path_factory.mktemp("fuzzed") / "original"
    for _ in fuzzed.STEPS:
        fuzzed.train(logdir, 2)
    return logdir


@pytest.mark.parametrize("number", range(20))
def test_a_fuzzed_logdir_costs_no_checkpoint_that_was_not_touched(number: int, original: Path, tmp_path: Path) -> None:
    wrong, damages = fuzzed.attack(original, tmp_path / "run", random.Random(number))
    assert wrong is None, damages


def test_the_fuzzer_finds_a_start_that_believes_what_it_reads(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_one_value(logdir: Path, _: random.Random) -> list[str]:
        path = logdir / "model.ckpt-6" / "state.json"
        state = json.loads(path.read_text())
        state["values"][0] += 1
        path.write_text(json.dumps(state))
        return ["model.ckpt-6/state.json raised"]

    monkeypatch.setattr(fuzzed, "damage", raise_one_value)
    assert fuzzed.attack(original, tmp_path / "run", random.Random(0))[0] is None
    monkeypatch.setattr(verification, "damages", lambda *_, **__: iter(()))
    wrong, _ = fuzzed.attack(original, tmp_path / "run", random.Random(0))
    assert wrong is not None
    assert "began at 6 with" in wrong


@pytest.mark.parametrize("name", ["model.ckpt-6/state.json", "heartbeats"])
def test_flipped_metadata_of_a_file_system_costs_a_step_back_or_nothing(name: str, tmp_path: Path) -> None:
    if os.geteuid() != 0 or (reason := inodes.can_mount(tmp_path)) is not None:
        pytest.skip(f"no ext4 image can be mounted here: {reason if os.geteuid() == 0 else 'not root'}")
    assert name in unreadable.FILES
    assert inodes.attack(tmp_path, name, random.Random(1)) is None


def test_the_soak_knows_of_a_save_that_the_next_start_finishes(original: Path, tmp_path: Path) -> None:
    logdir = tmp_path / "run"
    shutil.copytree(original, logdir)
    attacked = soak.Attacked("numpy", None, logdir, None, random.Random(0), [], 1.0)
    assert attacked.unfinished() is None
    # What a kill right before the last rename of a save leaves.
    stage = logdir / ".stage-model.ckpt-6"
    stage.mkdir()
    (logdir / "model.ckpt-6.manifest.json").rename(stage / "model.ckpt-6.manifest.json")

    assert attacked.unfinished() == 6
    assert fuzzed.train(logdir, 2) == 6


def test_the_soak_kills_and_damages_runs_and_nothing_is_lost() -> None:
    command = [sys.executable, str(SOAK / "soak.py"), "--seconds", "3", "--engines", "numpy", "--seed", "2"]
    done = subprocess.run(
        [*command, "--only", "killed", "damaged", "killed_in_a_group"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 losses" in done.stdout
    assert "| numpy" in done.stdout


def test_each_extra_for_users_has_a_use_in_a_fresh_environment() -> None:
    extras = set(importlib.metadata.metadata("stepguard").get_all("Provides-Extra"))
    assert extras == {*fresh_environments.USES, *fresh_environments.NOT_FOR_USERS} - {""}


def test_the_lowest_versions_are_those_that_the_project_names() -> None:
    lowest = fresh_environments.lowest(importlib.metadata.metadata("stepguard"), "torch")
    assert {"click==8.1.*", "numpy==1.24.*", "torch==2.8.*"} <= set(lowest)
    assert not any(one.startswith(("jax", "obstore")) for one in lowest)
