"""``stepguard run --requeue slurm``, with a ``scontrol`` that answers as Slurm's does."""

from __future__ import annotations

import os
import stat

import pytest
from launches import TRAINING, ended, events, newest, run

from stepguard.cli.launcher.requeue import RequeueRefusedError, SlurmJob

JOB = "JobId=42 JobName=train JobState={state} Reason=None Requeue={requeue} Restarts=0 BatchFlag={batch} Reboot=0"

# Writes down how it was called, and answers from files.
SCONTROL = """#!/bin/sh
cd "$(dirname "$0")"
echo "$*" >> calls
case "$*" in
--oneliner*) cat job ;;
requeue*) if [ -s refusal ]; then cat refusal >&2; exit 1; fi ;;
esac
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A directory with a scontrol in the path, and this process in the job 42."""
    place = tmp_path / "slurm"
    place.mkdir()
    (place / "scontrol").write_text(SCONTROL)
    (place / "scontrol").chmod(stat.S_IRWXU)
    (place / "calls").touch()
    _tell(place)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    for name in [one for one in os.environ if one.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    return place


def _tell(place, state="RUNNING", requeue=1, batch=1):
    (place / "job").write_text(JOB.format(state=state, requeue=requeue, batch=batch) + "\n")


def calls(place):
    return (place / "calls").read_text().splitlines()


def refusal(function, *arguments):
    with pytest.raises(RequeueRefusedError) as refused:
        function(*arguments)
    return str(refused.value)


def test_a_run_at_the_end_of_its_time_puts_its_job_into_the_queue_again(slurm, tmp_path):
    logdir = tmp_path / "run"
    code, _, errors = ended(run(*TRAINING, logdir, "limit", options=["--requeue=slurm"]))
    # The program itself ends with 0.
    assert code == 75, errors
    assert "stopped (time_limit), exit code 75, after" in errors
    assert calls(slurm)[-1] == "requeue 42"
    assert "job 42 is in the queue again" in errors
    (stop,) = events(logdir, "stop")
    assert (stop["reason"], newest(logdir).step) == ("time_limit", stop["step"])
    assert f"stopped at step {stop['step']}: step {stop['step']} is saved in {logdir}/" in errors


def test_a_run_that_has_finished_is_not_requeued(slurm, tmp_path):
    code, _, errors = ended(run(*TRAINING, tmp_path / "run", "train", 3, options=["--requeue=slurm"]))
    assert code == 0, errors
    assert calls(slurm) == ["--oneliner show job 42"]


def test_a_job_that_cannot_be_requeued_is_refused_before_the_program_starts(slurm, tmp_path):
    _tell(slurm, requeue=0)
    code, _, errors = ended(run(*TRAINING, tmp_path / "run", "train", 3, options=["--requeue=slurm"]))
    assert code == 3
    assert "job 42 cannot be requeued (Requeue=0" in errors
    assert "submit it with `sbatch --requeue`" in errors
    assert not (tmp_path / "run").exists()


def test_outside_a_job_and_without_scontrol_it_is_refused(slurm, monkeypatch):
    assert "found no SLURM_JOB_ID" in refusal(SlurmJob.of, {})
    monkeypatch.setenv("PATH", os.fspath(slurm.parent))
    assert "scontrol could not be started" in refusal(SlurmJob.of(os.environ).check, print)


def test_a_job_of_salloc_is_refused_and_a_controller_without_an_answer_is_not(slurm):
    said = []
    _tell(slurm, batch=0)
    assert "submit it by sbatch" in refusal(SlurmJob.of(os.environ).check, said.append)
    (slurm / "job").unlink()
    SlurmJob.of(os.environ).check(said.append)
    assert "scontrol does not tell whether job 42 can be requeued: cat: job" in said[0]


def test_a_job_that_was_cancelled_or_requeued_too_often_stays_out_of_the_queue(slurm, monkeypatch):
    _tell(slurm, state="CANCELLED")
    assert refusal(SlurmJob.of(os.environ).requeue, 5) == "job 42 was cancelled: it is not requeued"
    _tell(slurm)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    assert "requeued 5 times, and --max-requeues allows 5" in refusal(SlurmJob.of(os.environ).requeue, 5)
    assert [one for one in calls(slurm) if one.startswith("requeue")] == []


def test_what_scontrol_says_is_shown_after_three_tries(slurm):
    (slurm / "refusal").write_text("Requested operation is presently disabled for job 42\n")
    waited = []
    told = refusal(SlurmJob.of(os.environ).requeue, 5, waited.append)
    assert told == (
        "job 42 could not be requeued: Requested operation is presently disabled for job 42; submit it again"
    )
    assert [one for one in calls(slurm) if one.startswith("requeue")] == ["requeue 42"] * 3
    assert len(waited) == 2


@pytest.mark.parametrize(
    ("variables", "name", "is_first"),
    [
        ({"SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "7"}, "42_7", True),
        ({"SLURM_PROCID": "0"}, "42", True),
        ({"SLURM_PROCID": "3"}, "42", False),
    ],
)
def test_a_task_of_an_array_is_named_as_such_and_one_process_of_many_speaks_for_the_job(variables, name, is_first):
    job = SlurmJob.of({"SLURM_JOB_ID": "42", **variables})
    assert (job.name, job.is_first) == (name, is_first)
