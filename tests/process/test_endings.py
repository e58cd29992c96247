"""A process that ends while a checkpoint is being written, in whatever way: soon, and with a good store."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_signals import newest_saved
from zygote import Zygote

# Far less than the hour for which a disk hangs here, and more than the interpreter takes to clear up on a busy machine.
WITHIN_SECS = 60.0

STATUS = {"returns": 0, "sys.exit": 3, "an error": 1}


@pytest.mark.parametrize("way", STATUS)
def test_a_process_that_never_stops_its_supervisor_ends_at_once(
    tensorflow_children: Zygote, tmp_path: Path, way: str
) -> None:
    child = tensorflow_children.start("ends", logdir=str(tmp_path), way=way, managed=False, call_secs=0.02)
    child.wait_for("ending")

    assert child.wait(WITHIN_SECS) == STATUS[way], child.output
    assert newest_saved(tmp_path) >= child.reports("saved")[-1]["step"]


def test_a_process_ends_at_once_although_its_disk_hangs(tensorflow_children: Zygote, tmp_path: Path) -> None:
    """Only that of the first save hangs: nothing is saved, and nothing waited for."""
    child = tensorflow_children.start("hangs", logdir=str(tmp_path), managed=False)
    child.wait_for("ending")

    assert child.wait(WITHIN_SECS) == 0, child.output


def test_a_process_ends_at_once_while_much_is_written(tensorflow_children: Zygote, tmp_path: Path) -> None:
    child = tensorflow_children.start(
        "ends", logdir=str(tmp_path), way="returns", managed=False, call_secs=0, megabytes=100
    )
    child.wait_for("ending")

    assert child.wait(WITHIN_SECS) == 0, child.output
    assert newest_saved(tmp_path) >= child.reports("saved")[-1]["step"]


@pytest.mark.parametrize("way", STATUS)
def test_a_managed_run_waits_for_its_last_checkpoint_and_ends(
    tensorflow_children: Zygote, tmp_path: Path, way: str
) -> None:
    child = tensorflow_children.start("ends", logdir=str(tmp_path), way=way, managed=True, call_secs=0.005)
    child.wait_for("ending")

    assert child.wait(WITHIN_SECS) == STATUS[way], child.output
    saved = [one["step"] for one in child.reports("saved")]
    assert newest_saved(tmp_path) == saved[-1]
    # What was being written when the end came was finished, and after a clean end the last step was saved too.
    assert len(saved) >= len(child.reports("writing"))


def test_a_managed_run_whose_disk_hangs_ends_within_its_grace_period(
    tensorflow_children: Zygote, tmp_path: Path
) -> None:
    child = tensorflow_children.start("hangs", logdir=str(tmp_path), managed=True, stop_grace_secs=1)
    child.wait_for("ending")

    assert child.wait(WITHIN_SECS) == 1, child.output
    assert "SaveFailedError" in child.output
