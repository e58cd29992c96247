"""`stepguard prove` as a user calls it: a program without a framework, really started, killed, stopped and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepguard.cli.commands.prove import environment
from stepguard.disk.system import is_running

PROGRAM = Path(__file__).with_name("training.py")


def prove(way, *options, cwd):
    """Call it; the exit code, stdout and stderr."""
    command = [sys.executable, "-m", "stepguard", "prove", *map(str, options), f"--scratch={cwd / 'scratch'}", "--"]
    (cwd / "scratch").mkdir(exist_ok=True)
    ended = subprocess.run(
        [*command, sys.executable, str(PROGRAM), way], cwd=cwd, capture_output=True, text=True, timeout=200, check=False
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_a_right_program_is_proven_and_nothing_of_its_own_is_touched(tmp_path):
    own = tmp_path / "run"
    own.mkdir()
    (own / "precious").write_text("of the real run")

    code, printed, told = prove("right", "--steps=60", cwd=tmp_path)

    assert code == 0, printed + told
    # On a busy machine a short program may end before the last of five kills, or save faster than one comes.
    lines = [line for line in printed.splitlines() if not line.startswith("  ")]
    assert [re.sub("killed [2-5] times", "killed", line[:23]).strip() for line in lines[:7]] == [
        "undisturbed",
        "begun again",
        "killed",
        "stopped by SIGTERM",
        "stopped by Ctrl-C",
        "newest one damaged",
        "full disk",
    ]
    assert all(line.endswith(" same run, bit for bit") for line in lines[1:7])
    assert "note: the fault process was left out: one process trains" in lines[7]
    assert lines[8].startswith("PROVEN for training.py: ")
    assert max(map(len, printed.splitlines())) == 80
    assert "more starts, about" in told
    assert "at most" in told
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {
        own / "precious": "of the real run"
    }
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_program_that_forgets_a_part_of_its_state_is_not_proven_and_the_step_is_named(tmp_path):
    code, printed, told = prove("forgets", "--steps=40", "--faults=kill", "--json", cwd=tmp_path)

    assert code == 1, printed + told
    found = json.loads(printed)
    assert found["verdict"] == "different"
    run = found["runs"][-1]
    # The first step after the start that went on from a checkpoint.
    assert run["first_difference"]["step"] == run["first_difference"]["restarted_at"]
    assert run["first_difference"]["what"] == "computation"
    assert Path(run["logdir"]).is_dir()


def test_a_program_that_is_another_in_each_run_is_not_deterministic(tmp_path):
    code, printed, told = prove("random", "--steps=20", cwd=tmp_path)

    assert code == 1, printed + told
    assert "NOT DETERMINISTIC: two undisturbed runs of training.py differ" in printed
    assert "try --deterministic" in printed


def test_a_program_that_cannot_go_on_from_its_checkpoint_is_not_proven(tmp_path):
    code, printed, told = prove("refuses", "--steps=40", "--faults=sigterm", cwd=tmp_path)

    assert code == 1, printed + told
    assert "did not come to its end" in printed
    assert "this run is of another data set" in printed.replace("\n    ", " ")


@pytest.mark.parametrize(
    ("way", "told"),
    [
        ("nothing", "the program has made no Supervisor"),
        ("no logdir", "gives its Supervisor no logdir"),
        ("saves nothing", "the Supervisor saves nothing"),
        ("two", "Supervisors with 2 logdirs"),
        ("fails", "no such digit: 10"),
        ("writes", "the program itself writes into its logdir"),
    ],
)
def test_a_program_that_cannot_be_tried_is_told_why(way, told, tmp_path):
    (tmp_path / "run").mkdir()
    code, printed, errors = prove(way, "--steps=20", cwd=tmp_path)

    assert code == 2, printed + errors
    assert told in errors.replace("\n", " ")
    assert list((tmp_path / "run").iterdir()) == []
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_program_that_ignores_the_stop_is_told_so_when_the_time_is_over(tmp_path):
    code, printed, errors = prove("deaf", "--steps=20", "--time-limit-secs=3", cwd=tmp_path)

    assert code == 2, printed + errors
    assert "the time was over" in errors


def test_a_program_that_takes_a_new_logdir_at_each_start_is_told_that_it_never_resumes(tmp_path):
    code, printed, errors = prove("new logdir", "--steps=20", "--faults=sigterm", cwd=tmp_path)

    assert code == 0, printed + errors
    assert "the program gives another logdir at each start" in printed.replace("\n  ", " ")


def test_the_own_end_of_the_program_is_the_end_of_the_proof(tmp_path):
    code, printed, errors = prove("ends", "--steps=500", "--save-steps=5", "--faults=kill", cwd=tmp_path)

    assert code == 0, printed + errors
    assert "undisturbed            30 steps" in printed


def test_a_program_that_reads_its_own_logdir_is_told_that_it_reads_the_real_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.txt").write_text("the best")
    code, printed, errors = prove("reads", "--steps=20", "--faults=sigterm", cwd=tmp_path)

    assert code == 0, printed + errors
    assert f"note: the program reads its own logdir ({tmp_path}/run" in printed.replace("\n  ", " ")


def test_to_leave_one_of_several_processes_alone_there_must_be_several(tmp_path):
    code, printed, errors = prove("right", "--steps=20", "--faults=process", cwd=tmp_path)
    assert code == 2, printed + errors
    assert "process: one process trains" in errors


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    (tmp_path / "scratch").mkdir()
    command = [sys.executable, "-m", "stepguard", "prove", "--steps=100000", f"--scratch={tmp_path / 'scratch'}", "--"]
    proving = subprocess.Popen(
        [*command, sys.executable, str(PROGRAM), "endless"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    ledgers = []
    deadline = time.monotonic() + 60
    while not ledgers:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        ledgers = [path for path in tmp_path.rglob("run.jsonl") if '"fresh"' in path.read_text()]
    pid = json.loads(ledgers[0].read_text().splitlines()[0])["pid"]
    os.killpg(proving.pid, signal.SIGINT)
    proving.communicate(timeout=60)

    assert proving.returncode == 130
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not is_running(pid, None)


def test_deterministic_sets_what_the_frameworks_read_at_their_start(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_thunk_runtime=true")
    assert environment(is_deterministic=False) == {}
    found = environment(is_deterministic=True)
    assert found["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert found["TF_DETERMINISTIC_OPS"] == "1"
    assert found["XLA_FLAGS"] == "--xla_cpu_use_thunk_runtime=true --xla_gpu_deterministic_ops=true"


def test_a_program_that_is_not_there_is_a_mistake(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "stepguard", "prove", "--", str(tmp_path / "gone")],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=False,
    )
    assert ended.returncode == 2
    assert "could not be started: No such file" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_over_before_it_has_saved_begins_with_the_checkpoint_of_a_short_one(tmp_path):
    code, printed, errors = prove("right", "--steps=20", "--save-steps=1000", "--faults=sigterm", cwd=tmp_path)

    assert code == 0, printed + errors
    assert "begun again            20 steps, from step 1 on" in printed
