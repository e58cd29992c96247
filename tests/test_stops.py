"""What the end of a job is, and what is said where it is not known."""

from __future__ import annotations

import logging
from datetime import datetime, timezone

import pytest

from stepguard.stops import end_time

IN_A_JOB = {"SLURM_JOB_ID": "42"}


@pytest.mark.parametrize(
    ("at", "environment", "end"),
    [
        (None, {}, None),
        (12.5, {}, 12.5),
        (datetime(1970, 1, 1, 0, 1, tzinfo=timezone.utc), {}, 60.0),
        ("slurm", {}, None),
        ("slurm", {**IN_A_JOB, "SLURM_JOB_END_TIME": "1795358535"}, 1795358535.0),
    ],
)
def test_the_end_of_a_runs_time_is_what_was_given_or_that_of_its_job(caplog, at, environment, end):
    assert end_time(at, environment) == end
    assert caplog.records == []


@pytest.mark.parametrize(("found", "shown"), [({}, "nothing"), ({"SLURM_JOB_END_TIME": "soon"}, "'soon'")])
def test_a_job_that_does_not_say_its_end_is_told_how_to(caplog, found, shown):
    with caplog.at_level(logging.WARNING):
        assert end_time("slurm", {**IN_A_JOB, **found}) is None
    assert f"found {shown}: the run has no time limit; set it in the job script: export SLURM_JOB_END_TIME=" in (
        caplog.text
    )
