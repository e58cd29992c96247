"""The verdict of a proof: what two traces say, the words for it at 80 columns, and the faults of a seed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from stepguard.cli.logdir.checkpoint_changes import Change
from stepguard.cli.logdir.tensor_statistics import Difference
from stepguard.cli.proving import causes, faults, report
from stepguard.cli.proving.comparing import Comparison, compare_traces, first_difference
from stepguard.cli.proving.faults import Pace, damage_newest, plan
from stepguard.cli.proving.proof import (
    AGAIN,
    DIFFERENT,
    NOT_TRIED,
    PROVEN,
    UNDISTURBED,
    Options,
    Result,
    Verdict,
)
from stepguard.cli.proving.runs import Restart, Run, is_at_end
from stepguard.cli.proving.scratch import Scratch
from stepguard.options import Saving
from stepguard.store import CheckpointStore
from stepguard.testing import FakeSupervisor
from stepguard.watching import trace
from stepguard.watching.replay import Replay, first_cause
from stepguard.watching.trace import Record, Start, steps
from stepguard.watching.trace_writer import TraceWriter

OPTIONS = Options(200, faults.KINDS, 0)
PACE = Pace(20, 200, 0.01, 0.05, processes=2)


def trace_of(values_of):
    """A trace of ten steps with what ``values_of(step)`` says: a loss, a batch, a random state, a learning rate."""
    items = []
    for step in range(10):
        for kind, values in values_of(step).items():
            items.append(Record(kind, step, 0, values))
    return steps(items)


def usual(step, **other):
    return {
        "settings": {"optimizer.lr": 0.1},
        "digests": {"random": 100 + step, "batch[0]": 200 + step},
        "numbers": {"loss": 1.0 / (step + 1), "secs": random.random()},
    } | other


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"numbers": {"loss": 0.5}}, "computation"),
        ({"digests": {"random": 106, "batch[0]": 7}}, "data"),
        ({"digests": {"random": 7, "batch[0]": 8}}, "random state"),
        ({"digests": {"random": 7, "batch[0]": 206}, "numbers": {"loss": 0.5}}, "random state"),
        ({"settings": {"optimizer.lr": 0.2}, "numbers": {"loss": 0.5}}, "hyperparameters"),
    ],
)
def test_the_first_difference_says_what_differs_first(other, what):
    now = trace_of(lambda step: usual(step, **(other if step == 6 else {})))

    found = first_difference("chief", trace_of(usual), now, [2, 5, 9])

    assert (found.step, found.what, found.restarted_at) == (6, what, 5)


def test_what_a_run_has_not_traced_is_counted_and_not_passed_over(tmp_path):
    def written(name, steps, *, of_all=range(20)):
        writer = TraceWriter(tmp_path / name, "chief")
        (tmp_path / name).mkdir()
        writer.open(Start(0))
        for step in of_all:
            writer.add(trace.DIGESTS, step, 0, {"batch[0]": step})
            if step in steps:
                writer.add(trace.NUMBERS, step, 0, {"loss": 1.0}, 1)
        return tmp_path / name

    whole = written("whole", range(20))
    cut = written("cut", range(12), of_all=range(12))
    # The first 10 steps were copied, the others compared.
    found = compare_traces(whole, written("again", range(20)), (10,), 10)
    assert (found.steps, found.batches, found.untraced, found.first) == (20, 10, 0, None)
    found = compare_traces(whole, cut, (10,), 10)
    assert (found.steps, found.batches, found.untraced) == (4, 2, 16)
    # A process whose trace is not there at all.
    assert compare_traces(whole, tmp_path / "none", (10,), 10).untraced == 19
    # What is recorded between two steps, where a run goes on, belongs to the time before, or after.
    assert compare_traces(whole, written("skips", set(range(20)) - {15}), (10, 15), 10).untraced == 0
    assert compare_traces(whole, written("lacks", set(range(20)) - {15}), (10,), 10).untraced == 1
    # A program that reports by the clock.
    by_clock = written("clock", {3, 12, 17})
    assert compare_traces(by_clock, written("other clock", {4, 13, 18}), (10,), 10).untraced == 0


def test_the_beginning_is_where_the_trace_says_that_its_checkpoint_was_taken(tmp_path):
    for name, runs in (("whole", 10), ("cut", 5)):
        writer = TraceWriter(tmp_path / name, "chief")
        (tmp_path / name).mkdir()
        writer.open(Start(0))
        for run in range(runs):
            # Each run of the graph does eight steps.
            writer.note(trace.Mark(run, 8 * run))
            writer.add(trace.NUMBERS, run, 0, {"loss": 1.0})
    found = compare_traces(tmp_path / "whole", tmp_path / "cut", (16,), 16)
    assert (found.steps, found.untraced) == (3, 5)


def test_a_trace_that_has_lost_its_oldest_part_is_compared_from_there_on(tmp_path):
    for name, most in (("whole", 1 << 20), ("bounded", 2000)):
        writer = TraceWriter(tmp_path / name, "chief", most_bytes=most)
        (tmp_path / name).mkdir()
        writer.open(Start(0))
        for step in range(1000):
            writer.add(trace.NUMBERS, step, 0, {"loss": 1.0})
    for one, other in (("whole", "bounded"), ("bounded", "whole")):
        found = compare_traces(tmp_path / one, tmp_path / other)
        assert 70 < found.steps < 150
        assert found.untraced == 0


def test_state_and_random_state_that_differ_are_told_alike_by_the_run_and_by_the_proof():
    def other(step):
        digests = {"random": 7, "state model": 8, "batch[0]": 200 + step}
        return usual(step, digests=digests)

    def first(step):
        return usual(step, digests={"random": 1, "state model": 2, "batch[0]": 200 + step})

    found = first_difference("chief", trace_of(first), trace_of(other))
    assert found.what == first_cause(found.differences) == "random state"
    records = [Record("digests", 3, 0, first(3)["digests"])]
    replay = Replay([Start(0), *records], Start(3, is_resumed=True))
    replay.see(Record("digests", 3, 0, other(3)["digests"]))
    replay.end()
    assert replay.found.cause == found.what


def test_times_that_were_measured_make_no_difference_and_are_named(tmp_path):
    assert first_difference("chief", trace_of(usual), trace_of(usual)) is None
    for name, secs in (("one", 1.0), ("other", 2.0)):
        writer = TraceWriter(tmp_path / name, "chief")
        (tmp_path / name).mkdir()
        writer.open(Start(0))
        writer.add(trace.NUMBERS, 0, 0, {"loss": 0.5, "secs": secs, "images/sec": 5.0})
    found = compare_traces(tmp_path / "one", tmp_path / "other")
    assert (found.first, found.measured) == (None, ("secs",))
    rows = [result(UNDISTURBED, tmp_path), result(AGAIN, tmp_path, comparison=found)]
    assert next(report.conclusion(Verdict(PROVEN, rows), ["train.py"], OPTIONS)) == (
        "note: not compared, because the names say that they are measured: secs"
    )
    assert report.document(Verdict(PROVEN, rows), ["train.py"], OPTIONS)["measured"] == ["secs"]


@pytest.mark.parametrize("name", ["memory/loss", "speed_error", "time_loss", "train/time_mse", "gpu/grad_norm_2"])
def test_what_a_model_computes_is_compared_whatever_else_is_in_its_name(name):
    now = trace_of(lambda step: usual(step, numbers={name: float(step)}))
    then = trace_of(lambda step: usual(step, numbers={name: 0.0}))
    assert first_difference("chief", then, now).differences[0].name == name


def test_random_states_that_nobody_draws_from_make_no_difference():
    def drawn(step):
        return usual(step, digests={"random": 7 if step >= 4 else 100 + step, "batch[0]": 200 + step})

    assert first_difference("chief", trace_of(usual), trace_of(drawn)) is None


def test_random_states_that_are_not_restored_do_not_hide_what_differs_later():
    def other(step):
        numbers = {"loss": 0.5 if step == 8 else 1.0 / (step + 1)}
        return usual(step, digests={"random": 7 if step >= 4 else 100 + step, "batch[0]": 200 + step}, numbers=numbers)

    found = first_difference("chief", trace_of(usual), trace_of(other), [4])
    assert (found.step, found.what) == (8, "computation")


def test_a_batch_of_a_later_step_tells_how_many_were_skipped():
    def ahead(step):
        skipped = 3 if step >= 4 else 0
        return usual(step, digests={"random": 100 + step, "batch[0]": 200 + step + skipped})

    found = first_difference("worker-1", trace_of(usual), trace_of(ahead), [4])

    assert found.batch_of == 7
    said = causes.of_a_disturbed_run(Comparison((9, 9), found))
    assert said.what == (
        "in worker-1, step 4, the first after the restart at 4: the batch is that of step 7: 3 batches were skipped"
    )


def test_a_loss_of_another_last_bit_is_told_with_both():
    now = trace_of(lambda step: usual(step, numbers={"loss": 0.0562030} if step == 3 else {"loss": 1.0 / (step + 1)}))
    found = first_difference("chief", trace_of(usual), now)
    assert causes.of_two_undisturbed(Comparison((9, 9), found)).what == (
        "step 3: loss 0.25 then, 0.056203 now; random state and batch the same"
    )


# --- words ---


def result(kind, tmp_path, *, restarts=0, again=0, missed=(), comparison=None):
    place = Scratch(tmp_path).place(kind, stop_at=200, save_every=20)
    done = Run(place, secs=11.2, step=200, missed=list(missed))
    done.restarts = [Restart(kind, "", again if number == 0 else 0, 0) for number in range(restarts)]
    found = Comparison((200, 200), equal=92, steps=200, batches=200) if comparison is None else comparison
    cause = None if found.is_same else causes.of_a_disturbed_run(found)
    return Result(kind, done, None if kind == UNDISTURBED else found, cause)


def test_the_lines_of_a_proof_fit_into_80_columns_and_say_what_was_done(tmp_path):
    rows = [
        result(UNDISTURBED, tmp_path),
        result(AGAIN, tmp_path),
        result("kill", tmp_path, restarts=5, again=138),
        result("sigterm", tmp_path, restarts=1),
        result("disk", tmp_path),
    ]
    lines = [report.line(one, 20) for one in rows]

    assert lines == [
        "undisturbed            200 steps, 11.2 s",
        "begun again            200 steps, from step 20 on ........ same run, bit for bit",
        "killed 5 times         200 steps, 138 of them done again . same run, bit for bit",
        "stopped by SIGTERM     200 steps, 0 done again ........... same run, bit for bit",
        "full disk              200 steps, training went on ....... same run, bit for bit",
    ]
    verdict = Verdict(PROVEN, rows, longest_stall_secs=0.0213, stall_share=0.028)
    assert " ".join(report.conclusion(verdict, ["python", "-u", "train.py"], OPTIONS)) == (
        "PROVEN for train.py: 92 tensors and values, 200 batches, 6 restarts. A save each 20 steps stops the training "
        "21.3 ms at most, 2.8% of the time."
    )


def test_a_run_that_is_not_the_same_says_where_why_and_what_to_do(tmp_path):
    now = trace_of(lambda step: usual(step, **({"numbers": {"loss": 0.5}} if step == 6 else {})))
    changes = (
        Change("model.0.weight", "values", difference=Difference(3, 8, 0.004, 0.1)),
        Change("model.0.bias", "values", difference=Difference(1, 8, 0.01, 0.1)),
        Change("optimizer.state.0.step", "only in A"),
    )
    found = Comparison((200, 200), first_difference("chief", trace_of(usual), now, [5]), changes)
    bad = result("kill", tmp_path, restarts=1, comparison=found)

    assert report.line(bad, 0).endswith(" NOT the same run")
    said = "\n".join(report.details(bad))
    # A path is never broken.
    assert max(len(line) for line in said.splitlines() if str(tmp_path) not in line) <= 80
    said = " ".join(said.split())
    assert "step 6, 1 after the restart at 5: loss 0.142857143 then, 0.5 now" in said
    assert "the last state differs in model (by 0.01), optimizer" in said
    assert "likely: something that the step uses is not in the saved state" in said
    verdict = Verdict(DIFFERENT, [result(UNDISTURBED, tmp_path), bad])
    assert list(report.conclusion(verdict, ["train.py"], OPTIONS)) == [
        "NOT PROVEN for train.py: not the same run when killed once."
    ]


def test_a_fault_that_could_not_be_done_is_named(tmp_path):
    late = result("sigterm", tmp_path, missed=["sigterm: the program had ended before"])
    assert " the program had ended before ." in report.line(late, 0)
    assert report.line(late, 0).endswith(" not tried")
    lost = result("disk", tmp_path, comparison=Comparison((200, 200), equal=92, steps=112, untraced=88))
    assert report.line(lost, 0).startswith("full disk              88 steps left no trace ....")
    assert report.line(lost, 0).endswith(" not tried")
    untried = result("disk", tmp_path, missed=["disk: only Linux limits the files of another process"])
    assert report.line(untried, 0).endswith(" not tried")
    verdict = Verdict(NOT_TRIED, [result(UNDISTURBED, tmp_path), untried])
    assert next(report.conclusion(verdict, ["train.py"], OPTIONS)) == (
        "NOT ALL TRIED for train.py: full disk. The rest is proven."
    )


def test_kills_that_were_left_out_are_named_below_the_line_of_the_others(tmp_path):
    over, after = "the program had ended before", "the kill came when no save was under way"
    some = result("kill", tmp_path, restarts=3, missed=[f"kill: {over}", f"kill: {over}", f"save: {after}"])
    assert report.line(some, 0).startswith("killed 3 times ")
    assert report.line(some, 0).endswith(" same run, bit for bit")
    assert list(report.details(some)) == [f"  left out: kill, 2 times: {over}", f"  left out: save, 1 time: {after}"]
    # The line itself has the reason of a fault that is alone.
    assert list(report.details(result("sigterm", tmp_path, missed=[f"sigterm: {over}"]))) == []


def test_the_document_has_all_of_it(tmp_path):
    found = report.document(Verdict(PROVEN, [result(UNDISTURBED, tmp_path)]), ["python", "train.py"], OPTIONS)
    assert (found["verdict"], found["steps"], found["runs"][0]["kind"]) == ("proven", 200, "undisturbed")


# --- faults ---


def test_the_same_seed_plans_the_same_faults_and_another_does_not():
    assert plan(faults.KINDS, PACE, 3) == plan(faults.KINDS, PACE, 3)
    assert plan(faults.KINDS, PACE, 3) != plan(faults.KINDS, PACE, 4)


def test_faults_come_in_order_inside_the_steps():
    rungs = plan(faults.KINDS, PACE, 0)
    assert [one.kind for one in rungs] == ["kill", "sigterm", "interrupt", "damage", "disk", "process"]
    for rung in rungs:
        moments = [one.after_step for one in rung.faults]
        assert moments == sorted(moments)
        assert all(PACE.first_step < one < PACE.last_step for one in moments)
    assert sorted(one.kind for one in rungs[0].faults) == ["kill", "kill", "kill", "save", "save"]


def test_one_process_alone_is_not_killed_as_one_of_several():
    assert plan(("process",), Pace(0, 200, 0.01, 0.05), 0) == []


def test_a_damaged_checkpoint_costs_a_step_back(tmp_path):
    for step in (2, 4):
        sv = FakeSupervisor(str(tmp_path), save_model_secs=0, saving=Saving(save_at_end=True))
        with sv.managed_session() as sess:
            while sess.step < step:
                sess.run_step()
    damaged = damage_newest(tmp_path, 0.5)

    assert Path(damaged).parts[0] == "model.ckpt-4"
    assert CheckpointStore(tmp_path, engine="fake").newest_good(quarantine=False).checkpoint.step == 2


@pytest.mark.parametrize(
    ("stop", "code", "is_so"),
    [
        ({"reason": "trial", "error": None}, 0, True),
        ({"reason": "finished", "error": None}, 0, True),
        # The program has chosen what it ends with after a request to stop.
        ({"reason": "trial", "error": None, "exit_code": 75}, 75, True),
        ({"reason": "trial", "error": None}, 1, False),
        ({"reason": "sigterm", "error": None}, -15, False),
        ({"reason": "error", "error": "ValueError: no"}, 1, False),
        ({}, -9, False),
    ],
)
def test_a_start_has_come_to_the_end_if_its_ledger_and_its_exit_code_say_so(stop, code, is_so):
    assert is_at_end(stop, code) is is_so
