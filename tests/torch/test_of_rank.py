"""What the ranks of one training do not have in common: it goes on as it was in each, or a restart names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from launch import train

from stepguard.torch.checkpoint import of_rank
from stepguard.torch.checkpoint.of_rank import BEGUN, SAMPLED, Samples, left_out, own_of, put_own, unlike
from stepguard.torch.checkpoint.state import components
from stepguard.torch.checkpoint.tensors import read_tensors

PROGRAM = Path(__file__).with_name("ranks_training.py")


def noted(logdir, rank):
    return logdir.with_suffix(f".noted-{rank}").read_text().splitlines()


def last_of(logdir):
    """All that the last checkpoint holds, by its names, without the random states: not all are seeded."""
    tensors = read_tensors(logdir / "model.ckpt-8")
    found = [one for one in tensors if ".place." not in one.name and ".random." not in one.name]
    return {one.name: None if one.read is None else repr(one.read()) for one in found}


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
    # As `stepguard prove` compares them: what is noted for a warning depends on where a process has begun.
    if "--own-loop" not in arguments:  # It is not saved at its end.
        assert last_of(tmp_path / "stopped") == last_of(tmp_path / "whole")


def test_statistics_are_those_of_the_rank_at_the_moment_of_the_checkpoint(tmp_path):
    logdir = tmp_path / "run"
    train(logdir, 2, "--steps=4", "--has=evaluation", program=PROGRAM)
    train(logdir, 2, "--steps=4", "--has=evaluation", program=PROGRAM)

    for rank in range(2):
        before, after = [line for line in noted(logdir, rank) if line.startswith("after 4")]
        assert before == after
    assert noted(logdir, 0)[-1] != noted(logdir, 1)[-1]


@pytest.mark.parametrize(
    ("has", "names"),
    [
        ("values", ["carried.mean", "carried.last"]),
        ("experts", ["model.3.weight", "model.3.bias", "optimizer.state"]),
        ("probe", ["probe.weight", "probe.bias", "probe.optimizer.state"]),
    ],
)
def test_the_rest_is_named_where_it_was_not_that_of_rank_0(has, names, tmp_path):
    same, said = stopped_and_whole(tmp_path, f"--has={has}")

    assert same[1] is False
    assert [told(one) for one in said] == [[], [names]]


def test_another_number_of_processes_has_the_state_of_rank_0(tmp_path):
    logdir = tmp_path / "run"
    train(logdir, 2, "--steps=4", "--has=values", "--has=evaluation", program=PROGRAM)
    said = train(logdir, 3, "--steps=4", "--has=values", "--has=evaluation", "--unchecked", program=PROGRAM)

    assert [told(one) for one in said] == [[], [], []]
    before, after = ([noted(logdir, rank)[which] for rank in range(2)] for which in (-2, -1))
    assert before[0] != before[1]
    assert after == [before[0], before[0]]
    assert noted(logdir, 2) == [before[0]]


def samples(**states):
    return Samples(states, {}).digests()


def test_any_one_of_few_values_and_any_number_is_seen():
    few = torch.arange(60.0).reshape(3, 20).t()
    for place in range(20):
        changed = few.clone()
        changed[place, 1] += 1e-6 + 1e-6 * place
        assert samples(one={"a": few}) != samples(one={"a": changed})
    assert samples(one={"a": [1, {"b": 2.0}]}) != samples(one={"a": [1, {"b": 2.5}]})
    assert samples(one={"a": torch.zeros(2)}) != samples(one={"a": torch.zeros(2, dtype=torch.int32)})
    assert samples(one={"a": list(range(1000))}) != samples(one={"a": list(range(1001))})


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.complex128]
)
def test_samples_do_not_depend_on_how_a_tensor_lies_in_memory(dtype):
    torch.manual_seed(0)
    one = torch.randn(8, 16, 5, 5).to(dtype)
    other = one.clone().to(memory_format=torch.channels_last)
    view = torch.stack([one, one], dim=-1)[..., 1]

    assert samples(one={"a": one}) == samples(one={"a": other}) == samples(one={"a": view})
    assert samples(one={"a": one}) != samples(one={"a": torch.zeros_like(one)})


def test_the_order_in_which_an_optimizer_has_met_its_parameters_is_no_difference():
    assert samples(one={"state": {0: 1.0, 1: 2.0}}) == samples(one={"state": {1: 2.0, 0: 1.0}})


def test_what_a_rank_has_left_as_rank_0_began_with_it_is_not_named():
    begun, mine, saved = {"a": 1, "b": [], "c": 0}, {"a": 1, "b": [], "c": 7}, {"a": 5, "b": [3], "c": 8, "d": 9}
    process = {SAMPLED: samples(one=mine), BEGUN: samples(one=begun)}

    assert unlike({"one": saved}, process) == [("one", "c")]
    assert unlike({"one": saved}, {}) == []


def test_a_buffer_of_another_shape_is_named_and_not_put_in_place():
    states = {"model": {"a": torch.zeros(2), "b": torch.zeros(2)}}
    own = {"buffers": {"model": {"a": torch.ones(3), "b": torch.ones(2)}}, "streams": {"gone": {}}}

    assert put_own(states, own) == [("model", "a")]
    assert (states["model"]["a"].tolist(), states["model"]["b"].tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert [*states] == ["model"]


def test_of_large_buffers_only_those_are_compared_that_rank_0_does_not_send_to_all(monkeypatch):
    monkeypatch.setattr(of_rank, "_MOST_BYTES", 8)
    parts = components({"sent": torch.nn.BatchNorm1d(2), "kept": torch.nn.BatchNorm1d(2)})
    parts[0].sends_buffers = True
    found = Samples({one.name: one.state() for one in parts}, left_out(parts, own_of(parts))).digests()

    assert [*found["sent"]] == ["weight", "bias"]
    assert len(found["kept"]) == 5
    assert own_of(parts)["buffers"].keys() == {"sent"}
