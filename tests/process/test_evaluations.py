"""A PyTorch program that is told to end, or killed, in an evaluation that takes longer than its time to stop."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from zygote import Zygote, wait_until

from stepguard.store import CheckpointStore

GRACE_SECS = 2.0


def committed(logdir: Path) -> list[int | None]:
    return [one.step for one in CheckpointStore(logdir).candidates()]


@pytest.mark.parametrize("is_told", [True, False], ids=["evaluating", "plain"])
def test_a_boundary_that_is_reached_after_the_grace_period_is_saved(
    torch_children: Zygote, tmp_path: Path, is_told: bool
) -> None:
    child = torch_children.start("evaluates", logdir=str(tmp_path), place="step", secs=3 * GRACE_SECS, is_told=is_told)
    child.wait_for("evaluating")
    child.send(signal.SIGTERM)
    (tmp_path / "told").touch()

    assert child.wait() == -signal.SIGTERM, child.output
    assert max(committed(tmp_path)) == 10
    again = torch_children.start("evaluates", logdir=str(tmp_path), place="step", secs=0, is_told=is_told)
    assert again.wait() == 0, again.output
    assert again.wait_for("begins")["weight"] == 10
    assert [one["epoch"] for one in again.reports("end")] == [1, 2]


def test_between_two_loops_the_last_step_is_saved_as_soon_as_sigterm_comes(
    torch_children: Zygote, tmp_path: Path
) -> None:
    child = torch_children.start("evaluates", logdir=str(tmp_path), place="between", secs=3600, is_told=True)
    child.wait_for("evaluating")
    child.send(signal.SIGTERM)
    (tmp_path / "told").touch()
    wait_until(lambda: 10 in committed(tmp_path), "the checkpoint of the last step")
    child.kill()

    again = torch_children.start("evaluates", logdir=str(tmp_path), place="between", secs=0, is_told=True)
    assert again.wait() == 0, again.output
    assert again.wait_for("begins")["weight"] == 10
    assert [one["epoch"] for one in again.reports("end")] == [1, 2]


def test_an_epoch_whose_end_outlives_the_grace_period_is_not_done_again(torch_children: Zygote, tmp_path: Path) -> None:
    child = torch_children.start("evaluates", logdir=str(tmp_path), place="between", secs=3 * GRACE_SECS, is_told=False)
    child.wait_for("evaluating")
    child.send(signal.SIGTERM)
    (tmp_path / "told").touch()

    assert child.wait() == -signal.SIGTERM, child.output
    again = torch_children.start("evaluates", logdir=str(tmp_path), place="between", secs=0, is_told=False)
    assert again.wait() == 0, again.output
    assert again.wait_for("begins")["weight"] == 10
    assert [one["epoch"] for one in again.reports("end")] == [2]
