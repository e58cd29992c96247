"""Files of processes with wrong values in them, and manifests that say that they are good: damage, and no traceback."""

from __future__ import annotations

import json
import logging
import random
import shutil

import jax.numpy as jnp
import pytest
from crafted import nested, sign, variants

from stepguard import Saving
from stepguard.errors import CheckpointCorruptError, StepguardError
from stepguard.jax import Supervisor, batches
from stepguard.orbax_files.taken import read_process

BEFORE, NEWEST = 3, 7
NAME = f"model.ckpt-{NEWEST}"
FILE = f"{NAME}/process-0.json"


def train(logdir, steps):
    """Train up to ``steps`` steps, in the middle of an epoch of five; returns where the run began."""
    loaders = {"a": batches(jnp.arange(10.0), 2, seed=1), "b": [1, 2, 3, 4, 5]}
    sv = Supervisor(logdir, save_model_secs=0, saving=Saving(save_at_end=True), save_summaries_secs=0)
    with sv.managed_session({"w": jnp.zeros(3)}) as session:
        began = session.global_step
        for _ in session.steps(loaders, max_steps=max(steps, began)):
            session.state = {"w": session.state["w"] + 1}
    return began


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("original") / "run"
    train(logdir, BEFORE)
    train(logdir, NEWEST)
    return logdir


@pytest.fixture
def logdir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def craft(logdir, content):
    (logdir / FILE).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    sign(logdir, NAME)


CRAFTED = {
    "no step": lambda state: {name: value for name, value in state.items() if name != "global_step"},
    "another step": lambda state: {**state, "global_step": 2**62},
    "no number": lambda state: {**state, "global_step": float("nan")},
    "no random states": lambda state: {**state, "random": {}},
    "a place a billion times": lambda state: {**state, "loaders": [{**state["loaders"][0], "times": 10**9}]},
    "a list": lambda _: [1, 2],
    "a deep one": lambda state: {**state, "loaders": nested(500)},
    "a type of arrays that is none": lambda state: {**state, "random": {"%array": ["f8,,(", [1], ""]}},
    "no JSON": lambda _: b"\xff\xfe",
}


@pytest.mark.parametrize("what", CRAFTED)
def test_it_is_damage_of_its_checkpoint_and_costs_a_step_back(what, logdir, caplog):
    craft(logdir, CRAFTED[what](json.loads((logdir / FILE).read_bytes())))
    with caplog.at_level(logging.WARNING, "stepguard"):
        assert train(logdir, 0) == BEFORE
    (message,) = [one.getMessage() for one in caplog.records if f"{NAME} is damaged" in one.getMessage()]
    assert "process-0.json: expected the state of a process" in message
    assert f"resuming from {logdir}/model.ckpt-{BEFORE}" in message


def test_any_value_in_any_place_is_damage_or_is_gone_on_with_or_is_told(logdir):
    """What passes the check is what only the program's own objects can judge: those starts are made."""
    state, passed, refused, wrong = json.loads((logdir / FILE).read_bytes()), [], 0, {}
    for what, found in variants(state):
        craft(logdir, found)
        try:
            read_process(logdir / NAME, 0)
        except CheckpointCorruptError as error:
            refused += str(error).isprintable()
        else:
            passed.append((what, found))
    assert refused > len(passed) > 0
    for what, found in random.Random(len(passed)).sample(passed, min(20, len(passed))):
        place = shutil.copytree(logdir, logdir.with_name("copy"))
        craft(place, found)
        try:
            began = train(place, NEWEST + 5)
            if began not in (BEFORE, NEWEST):
                wrong[what] = began
        except StepguardError:
            pass
        except Exception as error:  # noqa: BLE001 - all of them are shown
            # A position behind the end of the data has no batch, which is said in a sentence.
            if not str(error).startswith("steps("):
                wrong[what] = f"{type(error).__name__}: {error}"
        shutil.rmtree(place)
    assert wrong == {}
