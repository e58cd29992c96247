"""Several processes that train one model, as torchrun starts them: they save, stop and go on together."""

from __future__ import annotations

import re
import signal
import sys
import time

import pytest
from launch import outcomes, run, seen, start, steps_saved, terminate_one, torchrun_command, train

from stepguard.store import CheckpointStore
from stepguard.watching import ledger

pytestmark = pytest.mark.timeout(400)


def test_one_killed_and_all_killed_change_nothing(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, 2, "--steps=60")
    train(killed, 2, "--steps=60", "--kill=1:20", killed=[1])
    train(killed, 2, "--steps=60", "--kill=0:33", killed=[0])
    # Started anew by the launcher, and not with --max-restarts: with gloo PyTorch's own restart fails now and then,
    # also in a program that only calls all_reduce.
    kills = ["--kill=0:47", "--kill=1:47"]
    launcher = [sys.executable, "-m", "stepguard", "run", "--first-delay-secs=0.01", "--"]
    said = run(*launcher, *torchrun_command(killed, 2, "--steps=60", *kills))

    # One that was ended before it came to its kill has that in the next start.
    assert re.search(r"stepguard: ended well after .*, [12] restarts?\b", said)
    assert outcomes(killed, 2) == outcomes(whole, 2)
    for rank in range(2):
        assert seen(killed, rank) == seen(whole, rank)
    assert steps_saved(killed)[0] == 60
    # Each process has compared the steps that it did again, with its own share of the data.
    replays = [one for one in ledger.read(killed) if one["event"] == "replay"]
    assert {one["role"] for one in replays} == {"chief", "worker-1"}
    assert {one["outcome"] for one in replays} == {"same"}


def test_one_killed_in_an_epoch_and_in_the_end_of_one_does_nothing_twice(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # 50 items in batches of 4 are 7 steps of two processes.
    training = ["--epoch-ends", "--epochs=4", "--steps=28", "--save-steps=3", "--awaits-saves"]
    train(whole, 2, *training)
    for ranks in ([0], [1], []):
        train(killed, 2, *training, "--kill-in-end=0:1", "--kill=1:17", killed=ranks)

    assert outcomes(killed, 2) == outcomes(whole, 2)
    for rank in range(2):
        assert seen(killed, rank) == seen(whole, rank)
        assert whole.with_suffix(f".ends-{rank}").read_text().split() == ["0", "1", "2", "3"]
        # The other may have come to the next epoch, and waited there in vain.
        assert killed.with_suffix(f".ends-{rank}").read_text().split() == ["0", "1", "1", "2", "3"]


def test_the_best_epochs_are_saved_with_the_parts_of_all(tmp_path):
    logdir = tmp_path / "run"
    train(logdir, 2, "--epoch-ends", "--epochs=3", "--steps=21", "--measures", "--save-steps=1000")

    store = CheckpointStore(logdir)
    assert steps_saved(logdir) == [21, 14, 7]
    assert store.pins.standing.best == ("model.ckpt-21", "model.ckpt-14")
    for one in store.candidates():
        assert store.verify(one).manifest.marks.metrics == {"val_loss": 11.0 - one.step / 7}
        assert {"process-0.pt", "process-1.pt"} <= {path.name for path in one.path.iterdir()}


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.soak)])
def test_a_run_goes_on_with_another_number_of_processes(before, after, tmp_path):
    logdir = tmp_path / "run"
    # 50 items in batches of 4: an epoch is 13 steps of one process, and 7 of two.
    steps = 4 if before == 2 else 8
    train(logdir, before, f"--steps={steps}")
    more = 4 if before == 2 else 2
    train(logdir, after, f"--steps={steps + more}")

    assert steps_saved(logdir)[0] == steps + more
    items = [item for rank in range(max(before, after)) for batch in seen(logdir, rank).values() for item in batch]
    assert len(items) == len(set(items)), "an item of the epoch was seen twice"


def test_a_loss_that_is_not_finite_in_one_ends_all(tmp_path):
    logdir = tmp_path / "run"
    # The step after which the chief would save.
    training = ["--steps=100000", "--save-steps=5", "--awaits-saves", "--nan=1:14"]
    said = "".join(train(logdir, 2, *training, well=False))

    assert "NonFiniteError: loss is nan at step 14" in said
    assert steps_saved(logdir) == [10, 5]
    ends = {line["role"]: line for line in ledger.read(logdir) if line["event"] == "stop"}
    for role in ("chief", "worker-1"):
        assert ends[role]["reason"] == "error"
        assert "loss is nan at step 14" in ends[role]["error"]
    assert "rank 1" in ends["chief"]["error"]
    assert ends["chief"]["step"] == ends["worker-1"]["step"]
    assert "no checkpoint" not in said
    assert "nan_guard='return'" not in said
    # After the same step: nobody was left waiting for the others.
    assert "stopping without the others" not in said
    assert "a round of the chief was left" not in said


def test_checkpoints_by_steps_are_of_exactly_these_steps(tmp_path):
    train(tmp_path / "run", 2, "--steps=12", "--save-steps=5", "--awaits-saves")

    assert steps_saved(tmp_path / "run") == [12, 10, 5]


@pytest.mark.parametrize(
    ("rank", "by"),
    [
        (0, signal.SIGTERM),
        (1, signal.SIGINT),
        pytest.param(0, signal.SIGINT, marks=pytest.mark.soak),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.soak),
    ],
)
def test_a_signal_to_one_stops_all_after_the_same_step(rank, by, tmp_path):
    logdir = tmp_path / "run"
    errors = terminate_one(logdir, rank, by=by)

    assert ("Ctrl-C: stopping after the step at which all processes can" in errors[rank]) == (by == signal.SIGINT)
    assert "Traceback" not in errors[rank]
    assert "stopping without the others" not in errors[0]
    last = [max(seen(logdir, each)) for each in range(2)]
    assert last[0] == last[1]
    assert steps_saved(logdir)[0] == last[0] + 1
    reason = "sigterm" if by == signal.SIGTERM else "interrupt"
    stops = [event for event in ledger.read(logdir) if event["event"] == "stop"]
    assert {event["role"]: event["reason"] for event in stops} == {"chief": reason, "worker-1": reason}


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_ctrl_c_while_the_chief_evaluates_and_the_other_waits_in_the_next_step(rank, tmp_path):
    logdir = tmp_path / "run"
    errors = terminate_one(logdir, rank, "--loop-steps=5", by=signal.SIGINT)

    assert "Ctrl-C: stopping after the step at which all processes can" in errors[rank]
    assert "stopped at step" in errors[rank]
    assert "stopping without the others" not in errors[0]
    last = [max(seen(logdir, each)) for each in range(2)]
    assert last[0] == last[1]
    assert steps_saved(logdir)[0] == last[0] + 1


def test_a_loop_that_ends_with_its_epochs_ends_without_a_word(tmp_path):
    # The step that had no batch any more is none that the others have to come to.
    errors = train(tmp_path / "run", 2, "--steps=100000", "--epochs=1")

    assert not [line for text in errors for line in text.splitlines() if "stopping" in line or "round of" in line]
    assert len({len(seen(tmp_path / "run", rank)) for rank in range(2)}) == 1


@pytest.mark.parametrize(
    "leave",
    [
        "0:14:exit",
        "1:14:break",
        pytest.param("0:14:break-first", marks=pytest.mark.soak),
        pytest.param("1:14:break-first", marks=pytest.mark.soak),
    ],
)
def test_one_that_leaves_ends_the_other_in_seconds(leave, tmp_path):
    logdir = tmp_path / "run"
    leaver, step, _ = leave.split(":")
    members = start(logdir, 2, "--steps=100000", "--save-steps=5", f"--leave={leave}")
    left, stays = members if leaver == "0" else reversed(members)
    left.end()
    began = time.monotonic()
    said = stays.end()

    # The grace period, in which it would wait for the other, is two minutes.
    assert time.monotonic() - began < 60
    # The last step of a chief that has left in it cannot be saved, because the other has not done it: a warning.
    assert left.returncode == {"0:14:exit": 7}.get(leave, 0)
    assert stays.returncode == 1
    assert f"PeerLeftError: rank {leaver} has left the training after {int(step) + 1} steps of this session" in said


@pytest.mark.parametrize("batches", ["12,20", pytest.param("20,12", marks=pytest.mark.soak)])
def test_uneven_inputs_under_join_come_to_their_ends(batches, tmp_path):
    logdir = tmp_path / "run"
    train(logdir, 2, "--steps=100000", "--save-steps=5", f"--join={batches}")

    counts = [int(count) for count in batches.split(",")]
    assert [len(seen(logdir, rank)) for rank in range(2)] == counts
    assert steps_saved(logdir)[0] == counts[0]


def test_uneven_inputs_in_each_epoch_are_gone_on_with_where_each_process_was(tmp_path):
    even, killed = tmp_path / "even", tmp_path / "killed"
    options = ["--steps=100000", "--epochs=3", "--join=7,4"]
    train(even, 2, *options)
    # In the second epoch, when the data of the other has ended.
    kills = ["--kill=0:13", "--kill=1:8", "--kill-once-saved=7"]
    train(killed, 2, *options, "--step-secs=0.1", *kills, killed=[0])
    assert 7 < steps_saved(killed)[0] <= 13
    errors = train(killed, 2, *options)

    assert outcomes(killed, 2) == outcomes(even, 2)
    assert [seen(killed, rank) for rank in range(2)] == [seen(even, rank) for rank in range(2)]
    assert "their inputs are uneven, or" in errors[1]
    # Ranks that are at other steps are not compared.
    assert "Put what differs between ranks" not in "".join(errors)
