"""Files of processes with wrong values in them, and manifests that say that they are good: damage, and no traceback."""

from __future__ import annotations

import logging
import random
import shutil

import pytest
import torch
from click.testing import CliRunner
from crafted import nested, sign, variants
from torch.utils.data import DataLoader, TensorDataset

from stepguard.cli.main import cli
from stepguard.errors import CheckpointCorruptError, StepguardError
from stepguard.options import Saving
from stepguard.steps.process_file import checked_state
from stepguard.torch import Supervisor, Values, load, newest
from stepguard.torch.checkpoint.process_state import ADDED
from stepguard.torch.random_states import STREAMS

BEFORE, NEWEST = 3, 7
NAME = f"model.ckpt-{NEWEST}"
FILE = f"{NAME}/process-0.pt"


class Sampled(TensorDataset):
    """A data set that keeps a list and counts, as some do."""

    def __init__(self):
        super().__init__(torch.arange(10.0))
        self.weights = [1.0] * 10
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.weights[0] = float(epoch)


def train(logdir, steps):
    """Train up to ``steps`` steps, in the middle of an epoch of five; returns where the run began."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loaders = {"a": DataLoader(Sampled(), 2, shuffle=True, generator=torch.Generator()), "b": [1.0, 2.0, 3.0, 4.0, 5.0]}
    state = {"model": model, "optimizer": optimizer, "mine": Values(per_process=True, seen=0)}
    sv = Supervisor(
        state, logdir, save_model_secs=0, saving=Saving(save_at_end=True), save_summaries_secs=0, summary_writer=None
    )
    with sv.managed_session() as session:
        began = session.global_step
        for batch in session.steps(loaders, max_steps=max(steps, began)):
            model(batch["a"][0][:, None]).sum().backward()
            if session.global_step % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
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
    if isinstance(content, bytes):
        (logdir / FILE).write_bytes(content)
    else:
        torch.save(content, logdir / FILE)
    sign(logdir, NAME)


def saved(logdir):
    return torch.load(logdir / FILE, weights_only=True)


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


def numpys(state, *, position=0, count=5):
    name, keys, _, *others = state["random"]["numpy"]
    return {**state, "random": {**state["random"], "numpy": (name, keys, position, *others)[:count]}}


CRAFTED = {
    "no step": lambda state: without(state, "global_step"),
    "another step": lambda state: {**state, "global_step": 2**62},
    "a step that is none": lambda state: {**state, "global_step": float("nan")},
    "facts that are none": lambda state: {**state, "program": 5},
    "no random states": lambda state: without(state, "random"),
    "half a random state": lambda state: {**state, "random": {**state["random"], "torch": torch.zeros(5)}},
    "a position of NumPy's that is far beside its keys": lambda state: numpys(state, position=2**31 - 1),
    "a position of NumPy's that is below its keys": lambda state: numpys(state, position=-5),
    "half a state of NumPy's": lambda state: numpys(state, count=4),
    "a place a billion times": lambda state: {**state, "loaders": [{**state["loaders"][0], "times": 10**9}]},
    "a list": lambda _: [1, 2],
    "a deep one": lambda state: {**state, "loaders": nested()},
    "no file of PyTorch": lambda _: b"PK\x03\x04 and no more",
    "an empty file": lambda _: b"",
}


@pytest.mark.parametrize("what", CRAFTED)
def test_it_is_damage_of_its_checkpoint_and_costs_a_step_back(what, logdir, caplog):
    craft(logdir, CRAFTED[what](saved(logdir)))
    with caplog.at_level(logging.WARNING, "stepguard"):
        assert train(logdir, 0) == BEFORE
    (message,) = [one.getMessage() for one in caplog.records if f"{NAME} is damaged" in one.getMessage()]
    assert "process-0.pt: expected " in message
    assert f"resuming from {logdir}/model.ckpt-{BEFORE}" in message


@pytest.mark.parametrize("what", CRAFTED)
def test_who_only_reads_is_told_or_takes_the_one_before(what, logdir, tmp_path):
    craft(logdir, CRAFTED[what](saved(logdir)))
    assert load(logdir).step == newest(logdir).step == BEFORE
    with pytest.raises(CheckpointCorruptError, match=r"process-0\.pt: expected"):
        load(logdir, NEWEST)
    done = CliRunner().invoke(cli, ["export", str(logdir), str(tmp_path / "out.pt"), "--weights"])
    assert done.exit_code == 1
    assert "process-0.pt: expected " in done.output
    assert CliRunner().invoke(cli, ["show", "--all", str(logdir)]).exit_code in (0, 1)


def test_any_value_in_any_place_is_damage_or_is_gone_on_with_or_is_told(logdir):
    """What passes the check is what only the program's own objects can judge: those starts are made."""
    state, passed = saved(logdir), []
    refused = 0
    for what, found in variants(state):
        try:
            checked_state(found, logdir / FILE, STREAMS, ADDED)
        except CheckpointCorruptError as error:
            refused += str(error).isprintable()
        else:
            passed.append((what, found))
    assert refused > len(passed) > 0
    wrong = {}
    for what, found in random.Random(len(passed)).sample(passed, 60):
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
