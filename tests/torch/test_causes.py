"""`stepguard prove` names step and cause: each cause of an inexact resume is planted in a program."""

from __future__ import annotations

import pytest
from forked import fork
from inexact_programs import main, say_whether_deterministic

from stepguard.cli.proving import causes
from stepguard.cli.proving.comparing import compare_runs
from stepguard.cli.proving.runs import Restart, Run
from stepguard.cli.proving.scratch import Scratch

LAST, BROKEN_AT = 24, 10


@pytest.fixture
def start(tmp_path):
    """Run a program up to a step: ``start(cause, name, stop_at)`` gives its run; a name again resumes it."""
    scratch = Scratch(tmp_path)

    def run(cause, name, stop_at=LAST, code=0):
        place = scratch.place(name, stop_at=stop_at, save_every=100)
        process = fork(main, cause, place.environment, str(tmp_path / "output"))
        process.join(100)
        assert process.exitcode == code, (tmp_path / "output").read_text()
        return Run(place, step=stop_at)

    return run


def broken(start, cause):
    """The comparison of an undisturbed run with one that was stopped and resumed."""
    whole = start(cause, "whole")
    start(cause, "broken", BROKEN_AT)
    resumed = start(cause, "broken")
    resumed.restarts.append(Restart("sigterm", "", BROKEN_AT, BROKEN_AT))
    return compare_runs(whole, resumed)


def test_a_program_that_is_exact_is_the_same_run(start):
    found = broken(start, "none")
    assert found.is_same
    assert (found.steps, found.batches) >= (LAST, LAST)
    assert found.equal > 10


@pytest.mark.parametrize(
    ("cause", "step", "what", "likely", "repair"),
    [
        ("forced sampler", 10, "data", "a sampler with a generator of its own", "pass generator= to the loader"),
        ("prefetcher", 10, "data", "something reads ahead of the training", "prefetch inside the loader"),
        ("evaluation", 16, "random state", "an evaluation", "with sess.evaluating()"),
        ("gradients", 12, "computation", "gradients that were not applied", "accumulate=n"),
    ],
)
def test_a_resume_that_is_not_exact_is_named_with_its_step(cause, step, what, likely, repair, start):
    found = broken(start, cause)

    assert not found.is_same
    assert (found.first.step, found.first.what, found.first.restarted_at) == (step, what, BROKEN_AT)
    assert found.changes
    said = causes.of_a_disturbed_run(found)
    assert likely in said.likely
    assert repair in said.repair


def test_a_sampler_with_a_generator_of_its_own_is_refused_when_its_run_is_resumed(start, tmp_path):
    start("sampler", "broken", BROKEN_AT)
    start("sampler", "broken", code=1)
    assert "The order of OwnOrder must be drawn when the epoch begins" in (tmp_path / "output").read_text()


def test_the_batches_that_a_prefetcher_has_lost_are_counted(start):
    said = causes.of_a_disturbed_run(broken(start, "prefetcher"))
    assert (
        said.what == "step 10, the first after the restart at 10: the batch is that of step 12: 2 batches were skipped"
    )


@pytest.mark.parametrize(
    ("cause", "what", "likely"),
    [
        ("augmentation", "data", "a generator without a seed"),
        ("kernel", "computation", "kernels that add in any order"),
    ],
)
def test_two_undisturbed_runs_that_differ_are_named(cause, what, likely, start):
    found = compare_runs(start(cause, "one"), start(cause, "two"))

    assert not found.is_same
    assert found.first.what == what
    assert likely in causes.of_two_undisturbed(found).likely


def test_deterministic_algorithms_are_what_a_trial_may_ask_for(tmp_path):
    place = Scratch(tmp_path).place("run", stop_at=LAST, save_every=100, is_deterministic=True)
    process = fork(say_whether_deterministic, place.environment, str(tmp_path / "output"))
    process.join(100)
    assert (tmp_path / "output").read_text().split() == ["False", "True"]
