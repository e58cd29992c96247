"""``stepguard status --probe``: a quick yes or no for whoever asks every few seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from stepguard.cli.main import cli
from stepguard.watching import heartbeat
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.ledger import Ledger

GONE = 2**22 + 1  # a pid that Linux never gives


def probe(*arguments):
    shown = CliRunner().invoke(cli, ["status", "--probe", *map(str, arguments)], catch_exceptions=False)
    return shown.exit_code, shown.output


def tell(logdir, role="chief", *, age_secs=0.0, **fields):
    """The heartbeat of a process, this one unless the fields say otherwise, written ``age_secs`` ago."""
    heartbeat.prepare(logdir)
    beat = Heartbeat(role, **{"phase": "training", "step": 7, **fields})
    heartbeat.write(logdir, beat)
    path = logdir / heartbeat.DIR_NAME / f"{role}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "time": time.time() - age_secs}))


@pytest.mark.parametrize(
    ("fields", "code", "line"),
    [
        ({}, 0, "chief alive, step 7"),
        ({"phase": "stopped", "reason": "finished"}, 0, "chief stopped: finished, step 7"),
        ({"phase": "stopped", "reason": "sigterm", "age_secs": 1e6}, 0, "chief stopped: sigterm, step 7"),
        ({"phase": "stopped", "reason": "error"}, 1, "chief stopped: error, step 7"),
        ({"age_secs": 60}, 1, "chief silent, step 7"),
        ({"pid": GONE}, 1, "chief dead, step 7"),
        ({"stacks": "stacks/chief.txt"}, 1, "chief hangs, step 7"),
    ],
)
def test_the_exit_code_says_whether_the_run_lives(tmp_path, fields, code, line):
    tell(tmp_path, **fields)
    assert probe(tmp_path) == (code, f"{line}\n")


def test_before_the_first_heartbeat_there_is_nothing_to_say(tmp_path):
    assert probe(tmp_path) == (4, "no heartbeat yet\n")


def test_a_worker_that_hangs_is_told_and_one_of_an_earlier_start_is_not(tmp_path):
    tell(tmp_path)
    tell(tmp_path, "worker-2", pid=GONE, age_secs=1e6)
    assert probe(tmp_path)[0] == 0
    tell(tmp_path, "worker-1", stacks="stacks/worker-1.txt")
    assert probe(tmp_path) == (1, "worker-1 hangs, step 7\n")


def test_processes_of_other_hosts_count_where_none_has_run_on_this_one(tmp_path):
    tell(tmp_path, host="another", age_secs=60)
    assert probe(tmp_path)[0] == 1
    tell(tmp_path, "worker-1")
    assert probe(tmp_path) == (0, "worker-1 alive, step 7\n")


def test_a_crashed_process_is_well_as_long_as_its_launcher_will_start_it_again(tmp_path):
    tell(tmp_path, pid=GONE)
    ledger = Ledger(tmp_path, role="launcher")
    ledger.append("launch", attempt=1, argv=["train"], child_pid=GONE, process_start=None)
    ledger.append(
        "exit", attempt=1, child_pid=GONE, code=1, signal=None, secs=1.0, progressed=True, failure="exit code 1"
    )
    ledger.append("restart", attempt=2, delay_secs=200.0)
    assert probe(tmp_path)[0] == 0
    ledger.append("gave_up", reason="crash loop", failure="exit code 1")
    assert probe(tmp_path)[0] == 1


def test_a_probe_takes_one_logdir_and_no_other_form(tmp_path):
    for arguments in ([tmp_path, tmp_path], [tmp_path, "--json"], [tmp_path, "--follow"]):
        code, output = probe(*arguments)
        assert code == 2
        assert "--probe takes one LOGDIR, and neither --follow nor --json" in output


def test_a_probe_loads_neither_a_framework_nor_what_reads_checkpoints(tmp_path):
    # A probe has to be quick, which a clock cannot tell on a busy machine. Most of these would double its time.
    tell(tmp_path)
    program = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules))))\n"
        f"sys.argv = ['stepguard', 'status', '--probe', {os.fspath(tmp_path)!r}]\n"
        "from stepguard.cli.main import main\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    line, modules = ended.stdout.splitlines()
    assert line == "chief alive, step 7"
    heavy = {
        "tensorflow",
        "torch",
        "jax",
        "numpy",
        "rich",
        "xxhash",
        "stepguard.store",
        "stepguard.cli.logdir.contents",
        "stepguard.watching.history",
        "stepguard.watching.trace",
    }
    assert heavy.isdisjoint(json.loads(modules))
