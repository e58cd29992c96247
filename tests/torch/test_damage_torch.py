"""Every file of the newest checkpoint, flipped and cut: a restart takes the one before it, and says so."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import shutil

import pytest
import torch

from stepguard.options import Saving
from stepguard.store import Manifest
from stepguard.torch import Supervisor, Values
from stepguard.torch.checkpoint.tensors import read_tensors

BEFORE, NEWEST = 3, 6
NAME = f"model.ckpt-{NEWEST}"
FILES = (
    f"{NAME}/model.pt",
    f"{NAME}/optimizer.pt",
    f"{NAME}/values.pt",
    f"{NAME}/process-0.pt",
    f"{NAME}.manifest.json",
)


class Program:
    def __init__(self, logdir):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(8, 8)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.values = Values(steps=0)
        self.sv = Supervisor(
            {"model": self.model, "optimizer": self.optimizer, "values": self.values},
            logdir,
            save_model_secs=0,
            saving=Saving(save_at_end=True),
            save_summaries_secs=0,
            summary_writer=Unwritten(),
        )

    def train(self, steps):
        with self.sv.managed_session() as session:
            weights = self.model.weight.detach().clone()
            for _ in session.steps(max_steps=steps):
                self.optimizer.zero_grad()
                self.model(torch.rand(8)).sum().backward()
                self.optimizer.step()
                self.values.steps += 1
        return weights

    def restore(self):
        with self.sv.managed_session() as session:
            return session.global_step, self.model.weight.detach().clone()


class Unwritten:
    """A summary writer, in place of an event file for each of some hundred restarts."""

    def __getattr__(self, name):
        return lambda *_, **__: self


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A logdir with two checkpoints, and the weights of the older one."""
    logdir = tmp_path_factory.mktemp("original") / "run"
    Program(logdir).train(BEFORE)
    weights = Program(logdir).train(NEWEST)
    return logdir, weights


def damages(size):
    """Functions that flip one bit or cut the end off: at both ends of the file, and anywhere between."""
    chance = random.Random(size)
    for place in sorted({0, size - 1, size // 2, *(chance.randrange(size) for _ in range(12))}):
        bit = 1 << chance.randrange(8)
        yield (
            f"bit {bit} of byte {place}",
            lambda content, place=place, bit=bit: (
                content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
            ),
        )
    for length in sorted({0, 1, size - 1, size // 2, *(chance.randrange(size) for _ in range(3))}):
        yield f"cut to {length}", lambda content, length=length: content[:length]


def restart(logdir, caplog):
    caplog.clear()
    program = Program(logdir)
    with caplog.at_level(logging.WARNING, "stepguard"):
        resumed, weights = program.restore()
    return resumed, weights, program.values.steps, [one.getMessage() for one in caplog.records]


@pytest.mark.parametrize("file", FILES)
def test_the_one_before_it_is_taken_and_what_was_lost_is_said(file, original, tmp_path, caplog):
    logdir, weights = original
    content = (logdir / file).read_bytes()
    # Without the line's end a manifest is still whole.
    for what, damage in damages(len(content.rstrip())):
        copy = tmp_path / "run"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(logdir, copy)
        (copy / file).write_bytes(damage(content))

        resumed, restored, counted, messages = restart(copy, caplog)

        assert resumed == counted == BEFORE, what
        assert torch.equal(restored, weights), what
        (message,) = messages
        assert f"{NAME} is damaged" in message, what
        assert file in message, what
        assert f"resuming from {copy}/model.ckpt-{BEFORE}, {NEWEST - BEFORE} steps earlier" in message, what
        assert (copy / "quarantine" / NAME).is_dir(), what


def test_a_whole_copy_is_resumed_from_its_newest_without_a_word(original, tmp_path, caplog):
    shutil.copytree(original[0], tmp_path / "run")

    resumed, _, counted, messages = restart(tmp_path / "run", caplog)

    assert resumed == counted == NEWEST
    assert messages == []


@pytest.mark.parametrize("name", ["other.pt", "process-1.pt", "model.pt.pt"])
@pytest.mark.parametrize("kind", ["state", "garbage", "fifo", "directory"])
def test_what_the_manifest_does_not_name_is_not_read(kind, name, tmp_path, caplog):
    before = Program(tmp_path).train(2)
    trained = Program(tmp_path).restore()[1]
    path = tmp_path / "model.ckpt-2" / name
    if kind == "state":
        torch.save({"weight": torch.zeros(8, 8)}, path)
    elif kind == "garbage":
        path.write_bytes(b"garbage")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with caplog.at_level(logging.WARNING):
        resumed, weights = Program(tmp_path).restore()
    assert resumed == 2
    assert torch.equal(weights, trained)
    assert not torch.equal(weights, before)
    assert not caplog.records
    assert {one.name.partition(".")[0] for one in read_tensors(tmp_path / "model.ckpt-2")} == {
        *("model", "optimizer", "values", "process-0"),
    }


def test_a_manifest_that_names_no_process_is_damage(tmp_path, caplog):
    Program(tmp_path).train(1)
    Program(tmp_path).train(2)
    path = tmp_path / "model.ckpt-2.manifest.json"
    manifest = Manifest.from_json(path.read_bytes(), path)
    files = tuple(one for one in manifest.files if not one.name.endswith("process-0.pt"))
    path.write_bytes(dataclasses.replace(manifest, files=files).to_json())
    with caplog.at_level(logging.WARNING):
        assert Program(tmp_path).restore()[0] == 1
    assert "expected the file process-0.pt in its manifest" in caplog.text
