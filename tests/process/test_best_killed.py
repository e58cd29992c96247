"""A run is killed between an evaluation and the commit of the step: the best of those before stay, and are good."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from stepguard.options import Saving
from stepguard.store import CheckpointStore
from stepguard.testing import FakeSupervisor

SAVING = Saving(save_model_secs=0, save_at_end=False, max_to_keep=1, keep_best=("val_loss", "min", 2))

PROGRAM = """
import os, signal, sys
from stepguard.options import Saving
from stepguard.store import checkpoint_store
from stepguard.testing import FakeEngine, FakeSupervisor

logdir, place = sys.argv[1:]
sv = FakeSupervisor(logdir, size=4, saving=Saving(
    save_model_secs=0, save_at_end=False, max_to_keep=1, keep_best=("val_loss", "min", 2)))
moves = checkpoint_store.files.move

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def move_and_die(source, target):
    if target.name == "model.ckpt-4.manifest.json" and place == "before the manifest":
        die()
    moves(source, target)
    if target.name == "model.ckpt-4.manifest.json":
        die()

with sv.managed_session() as session:
    for value in (3.0, 2.0, 4.0, 1.0):
        session.run_step()
        if value == 1.0 and place == "before the write":
            sv.engine.write = die
        elif value == 1.0 and place == "before the removal":
            sv._store.prune = die
        elif value == 1.0:
            checkpoint_store.files.move = move_and_die
        sv.metrics(session, {"val_loss": value})
    sv._saving.writer.drain(30)
"""


@pytest.mark.parametrize(
    ("place", "best"),
    [
        ("before the write", [1, 2]),
        # Every byte is on the disk: the next start finishes the commit.
        ("before the manifest", [2, 4]),
        ("after the manifest", [2, 4]),
        ("before the removal", [2, 4]),
    ],
)
def test_the_best_are_kept_through_a_kill(place, best, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), place]
    killed = subprocess.run(command, capture_output=True, timeout=60, env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()

    sv = FakeSupervisor(str(tmp_path), size=4, saving=SAVING)
    with sv.managed_session() as session:
        assert session.step == max(best)
        assert session.values == [max(best)] * 4

    store = CheckpointStore(tmp_path)
    assert sorted(int(name.rpartition("-")[2]) for name in store.pins.standing.best) == best
    for one in store.candidates():
        store.verify(one)
    assert {one.step for one in store.candidates()} >= set(best)
