"""``stepguard log``: the story of a run from its ledger, also from those that were put aside."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stepguard.cli.logdir import story
from stepguard.options import Saving
from stepguard.testing import FakeSupervisor
from stepguard.watching import ledger
from stepguard.watching.ledger import Ledger


def train(logdir, steps, error=None):
    sv = FakeSupervisor(str(logdir), saving=Saving(save_at_end=True), save_model_secs=None, save_summaries_secs=None)
    with sv.managed_session() as session:
        for _ in range(steps):
            session.run_step()
        if error is not None:
            raise error


def lines(shown):
    """The sentences, without day and time."""
    return [one.split(None, 1)[1] for one in shown.stdout.splitlines() if one[2:3] == ":"]


def without_warnings(shown):
    """The same without those that a slow disk causes."""
    return [one for one in lines(shown) if "warning: " not in one]


def test_starts_restores_saves_and_stops_are_told_in_order(tmp_path, stepguard):
    train(tmp_path, 3)
    with pytest.raises(ValueError, match="bad batch"):
        train(tmp_path, 2, ValueError("bad batch\nand more"))
    shown = stepguard("log", tmp_path)
    assert shown.exit_code == 0
    told = lines(shown)
    assert "begins at step 0: there was nothing to restore" in told[1]
    assert told[2].startswith("chief     checkpoint model.ckpt-3, step 3, ")
    assert told[3] == "chief     finished at step 3"
    assert told[5] == "chief     goes on from model.ckpt-3, step 3"
    assert told[-1] == "chief     failed at step 5: ValueError: bad batch"


def test_a_killed_process_is_told_by_the_next_start_and_what_it_lost(tmp_path, stepguard):
    program = "import os,sys;from stepguard.testing import FakeSupervisor as S;sv=S(sys.argv[1],save_model_steps=5)\n"
    program += "with sv.managed_session() as s:\n while True:\n  s.run_step()\n"
    program += "  if s.step == 8: os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", program, tmp_path], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    dead = without_warnings(stepguard("log", tmp_path, "--trouble"))
    assert len(dead) == 1
    assert "ended without a word" in dead[0]
    train(tmp_path, 1)
    told = without_warnings(stepguard("log", tmp_path, "--trouble"))
    assert "ended without a word: it was killed, or crashed, or its machine went down" in told[0]
    assert sum("ended without a word" in one for one in told) == 1


@pytest.mark.parametrize("folds", [True, False])
def test_an_end_without_a_word_comes_after_the_last_checkpoint(folds):
    events = [
        {"event": "start", "time": 10.0, "pid": 1, "role": "chief"},
        {"event": "fresh", "time": 11.0, "pid": 1, "role": "chief", "step": 0},
        *({"event": "checkpoint", "time": 10.0 + one, "pid": 1, "role": "chief", "step": one} for one in (5, 6, 7)),
        {"event": "start", "time": 30.0, "pid": 2, "role": "chief"},
    ]
    times = [one.time for one in story.told(events, folds=folds)]
    assert times == sorted(times)
    (end,) = [one for one in story.told(events, folds=folds) if "without a word" in one.text]
    assert end.time == 17


@pytest.mark.parametrize(("before", "is_trouble"), [(None, False), (0, False), (7, True)])
def test_a_fresh_start_is_trouble_where_steps_are_lost(before, is_trouble):
    event = {"event": "fresh", "time": 1.0, "role": "chief", "step": 0, "previous_step": before}
    (entry,) = story.told([event])
    assert entry.is_trouble == is_trouble
    assert ("although" in entry.text) == is_trouble


def test_checkpoints_in_a_row_are_one_line_unless_each_is_wanted(tmp_path, stepguard):
    told = Ledger(tmp_path, role="chief")
    for step in (10, 20, 30):
        told.append("checkpoint", name=f"model.ckpt-{step}", step=step, bytes=7, secs=step / 10, stall_secs=step / 1e4)
    told.append("warning", message="the disk is full")
    told.append("checkpoint", name="model.ckpt-40", step=40, bytes=7, secs=0.1, stall_secs=0.001)
    row, warning, last = lines(stepguard("log", tmp_path))
    assert row == ("chief     3 checkpoints, steps 10 to 30: the slowest took 3.0 s, training waited 3 ms at most")
    assert warning == "chief     warning: the disk is full"
    assert last.endswith("checkpoint model.ckpt-40, step 40, 7 B: took 100 ms, training waited 1 ms")
    assert len(lines(stepguard("log", tmp_path, "--every"))) == 5
    assert lines(stepguard("log", tmp_path, "--trouble")) == [warning]


def test_copies_to_the_mirror_are_in_the_line_of_the_checkpoints_in_a_row(tmp_path, stepguard):
    told = Ledger(tmp_path, role="chief")
    for step in (10, 20):
        told.append("checkpoint", name=f"model.ckpt-{step}", step=step, bytes=7, secs=0.1, stall_secs=0.001)
        told.append("mirrored", name=f"model.ckpt-{step}", step=step, bytes=7, secs=0.2)
    (row,) = lines(stepguard("log", tmp_path))
    assert row == (
        "chief     2 checkpoints, steps 10 to 20: the slowest took 100 ms, training waited 1 ms at most; "
        "2 copied to the mirror, the last of step 20"
    )
    each = lines(stepguard("log", tmp_path, "--every"))
    assert each[1] == "chief     model.ckpt-10, step 10, is copied to the mirror: 7 B in 200 ms"
    told.append("warning", message="the disk is full")
    told.append("checkpoint", name="model.ckpt-30", step=30, bytes=7, secs=0.1, stall_secs=0.001)
    told.append("mirrored", name="model.ckpt-30", step=30, bytes=7, secs=0.2)
    assert lines(stepguard("log", tmp_path))[-1].endswith("waited 1 ms; 1 copied to the mirror, the last of step 30")


def test_filters_by_age_and_role(tmp_path, stepguard):
    Ledger(tmp_path, role="chief").append("warning", message="long ago", time=1e9)
    Ledger(tmp_path, role="chief").append("warning", message="now")
    Ledger(tmp_path, role="worker-1").append("warning", message="there")
    assert [one[-3:] for one in lines(stepguard("log", tmp_path, "--since", "2h"))] == ["now", "ere"]
    assert lines(stepguard("log", tmp_path, "--role", "worker-1")) == ["worker-1  warning: there"]
    wrong = stepguard("log", tmp_path, "--since", "soon")
    assert (wrong.exit_code, "such as 90s, 30min, 2h or 3d, found 'soon'" in wrong.stderr) == (2, True)


def test_json_lines_are_the_events(tmp_path, stepguard):
    train(tmp_path, 2)
    shown = stepguard("log", tmp_path, "--json")
    assert [json.loads(one) for one in shown.stdout.splitlines()] == ledger.read(tmp_path)


def test_a_start_with_other_options_says_which_and_the_events_stay_one_each(tmp_path, stepguard):
    for options in ({"saving.max_to_keep": 5000}, {"saving.max_to_keep": 5000}, {"saving.overhead": 0.01}):
        Ledger(tmp_path, role="chief").append("start", argv=["train"], options=options)
    told = lines(stepguard("log", tmp_path))
    assert [one for one in told if "options" in one] == [
        "chief     with other options than the start before: saving.overhead 0.01 (before: the default), "
        "saving.max_to_keep the default (before: 5000)"
    ]
    events = [json.loads(one) for one in stepguard("log", tmp_path, "--json").stdout.splitlines()]
    assert sum(one["event"] == "start" and one["options"] == {"saving.overhead": 0.01} for one in events) == 1


def test_json_has_each_event_once_also_the_start_of_a_killed_process(tmp_path, stepguard):
    for _ in range(3):
        Ledger(tmp_path, role="chief").append("start", argv=["train"])
        Ledger(tmp_path, role="chief").append("fresh", step=0)
    written = ledger.read(tmp_path)
    assert [json.loads(one) for one in stepguard("log", tmp_path, "--json").stdout.splitlines()] == written
    killed = [json.loads(one) for one in stepguard("log", tmp_path, "--json", "--trouble").stdout.splitlines()]
    assert killed[:2] == [written[0], written[2]]


def test_ledgers_that_were_put_aside_belong_to_the_story_once(tmp_path, stepguard, monkeypatch):
    monkeypatch.setattr(ledger, "_MOST_BYTES", 4000)
    told = Ledger(tmp_path, role="chief")
    told.append("start", argv=["train.py"])
    for number in range(120):
        told.append("warning", message=f"number {number}")
    assert (tmp_path / "run.2.jsonl").exists()
    warnings = [one for one in lines(stepguard("log", tmp_path)) if "warning" in one]
    assert warnings == [f"chief     warning: number {number}" for number in range(120)]
    (tmp_path / "run.1.jsonl").unlink()
    left = lines(stepguard("log", tmp_path))
    assert left[0].startswith("chief     started as process")
    assert len(left) < 120


@pytest.mark.parametrize("kind", ["nothing", "directory"])
def test_what_tells_of_no_run_is_a_finding(kind, tmp_path, stepguard):
    if kind == "directory":
        (tmp_path / "run.jsonl").mkdir()
    shown = stepguard("log", tmp_path)
    assert shown.exit_code == 1
    assert "no ledger tells of a run" in shown.stderr
    assert ("could not be read" in shown.stdout) == (kind == "directory")


@pytest.mark.parametrize("command", ["log", "verify", "report"])
def test_a_directory_above_the_runs_names_them(command, tmp_path, stepguard):
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.jsonl").write_text("")
    options = ("-o", tmp_path / "report.html") if command == "report" else ()
    shown = stepguard(command, tmp_path / "runs", *options)
    assert shown.exit_code == 1
    assert f"takes one: {tmp_path / 'runs' / 'one'}, {tmp_path / 'runs' / 'two'}" in shown.output


def test_every_event_that_is_documented_has_a_sentence():
    text = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    table = text[text.index("| event | when | its fields |") : text.index("The `reason` of a stop")]
    events = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert len(events) > 10
    for event in events:
        # With all fields missing, as in a damaged line.
        (entry,) = story.told([{"event": event, "time": 1.0, "role": "chief"}])
        assert entry.text not in ("", event)
    (unknown,) = story.told([{"event": "landed", "time": 1.0, "role": "chief", "where": "\x1b[31mthe moon"}])
    assert unknown.text == "landed: where \\x1b[31mthe moon"
