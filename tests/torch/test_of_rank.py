"""What the ranks of one training do not have in common, and goes on as it was in each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from launch import train

from stepguard.torch.checkpoint.of_rank import put_own

PROGRAM = Path(__file__).with_name("ranks_training.py")


def noted(logdir, rank):
    return logdir.with_suffix(f".noted-{rank}").read_text().splitlines()


def told(said):
    return [found.split(", ") for found in re.findall(r"not the same from here on: (.*?)\. Put what", said)]


def stopped_and_whole(tmp_path, *arguments, steps=4):
    """Whether each rank has computed the same in both runs; and what each has said in its second start."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    train(whole, 2, "--steps=8", *arguments, program=PROGRAM)
    train(stopped, 2, f"--steps={steps}", *arguments, program=PROGRAM)
    said = train(stopped, 2, "--steps=8", *arguments, program=PROGRAM)
    found = [{line for line in noted(stopped, rank) if not line.startswith(f"after {steps}")} for rank in range(2)]
    return [found[rank] == set(noted(whole, rank)) for rank in range(2)], said


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        (["--has=statistics", "--has=generators"], 4),
        (["--has=evaluation"], 4),
        (["--has=generators", "--own-loop"], 5),
    ],
)
def test_small_state_of_each_rank_goes_on_in_each_and_nothing_is_said(arguments, steps, tmp_path):
    same, said = stopped_and_whole(tmp_path, *arguments, steps=steps)

    assert same == [True, True]
    assert [told(one) for one in said] == [[], []]


def test_statistics_are_those_of_the_rank_at_the_moment_of_the_checkpoint(tmp_path):
    logdir = tmp_path / "run"
    train(logdir, 2, "--steps=4", "--has=evaluation", program=PROGRAM)
    train(logdir, 2, "--steps=4", "--has=evaluation", program=PROGRAM)

    for rank in range(2):
        before, after = [line for line in noted(logdir, rank) if line.startswith("after 4")]
        assert before == after
    assert noted(logdir, 0)[-1] != noted(logdir, 1)[-1]


def test_another_number_of_processes_has_the_state_of_rank_0(tmp_path):
    logdir = tmp_path / "run"
    train(logdir, 2, "--steps=4", "--has=values", "--has=evaluation", program=PROGRAM)
    said = train(logdir, 3, "--steps=4", "--has=values", "--has=evaluation", "--unchecked", program=PROGRAM)

    assert [told(one) for one in said] == [[], [], []]
    before, after = ([noted(logdir, rank)[which] for rank in range(2)] for which in (-2, -1))
    assert before[0] != before[1]
    assert after == [before[0], before[0]]
    assert noted(logdir, 2) == [before[0]]


def test_a_buffer_of_another_shape_is_not_put_in_place():
    states = {"model": {"a": torch.zeros(2), "b": torch.zeros(2)}}
    own = {"buffers": {"model": {"a": torch.ones(3), "b": torch.ones(2)}}, "streams": {"gone": {}}}

    put_own(states, own)
    assert (states["model"]["a"].tolist(), states["model"]["b"].tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert [*states] == ["model"]
