"""`stepguard status` of runs that live, hang, are dead or over, and of logdirs that tell little."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from logdirs import commit

from stepguard.cli.logdir.run_state import read_run_state
from stepguard.cli.main import cli
from stepguard.options import Saving
from stepguard.testing import FakeSupervisor
from stepguard.watching import heartbeat, ledger
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.ledger import Ledger

SOON_SECS = 60.0
TRAINING = [sys.executable, str(Path(__file__).with_name("training_program.py"))]
STATUS = [sys.executable, "-m", "stepguard", "status"]


def status(logdir, *options):
    shown = CliRunner().invoke(cli, ["status", str(logdir), *options], catch_exceptions=False)
    return shown.exit_code, shown.output


def known(logdir):
    """The exit code and the document."""
    code, output = status(logdir, "--json")
    return code, json.loads(output)


def wait_until(condition, what):
    deadline = time.monotonic() + SOON_SECS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {SOON_SECS:g} s"
        time.sleep(0.02)
    return found


def train(logdir, steps, error=None):
    """A run in this process that ends, and has saved its last step then; by an error if there is one."""
    sv = FakeSupervisor(str(logdir), saving=Saving(save_at_end=True), save_model_secs=None, save_summaries_secs=None)
    with sv.managed_session() as session:
        for _ in range(steps):
            session.run_step()
        if error is not None:
            raise error


def tell(logdir, role="chief", **fields):
    """The heartbeat of a process that lives: this one, unless the fields say otherwise."""
    heartbeat.prepare(logdir)
    heartbeat.write(logdir, Heartbeat(role, **{"engine": "fake", "phase": "training", "step": 40, **fields}))


def age(logdir, role, secs):
    """Have a heartbeat be older."""
    path = logdir / heartbeat.DIR_NAME / f"{role}.json"
    beat = json.loads(path.read_text())
    path.write_text(json.dumps({**beat, "time": beat["time"] - secs, "started": beat["started"] - secs}))


@pytest.fixture
def running(tmp_path):
    """A run that is in progress in its logdir, as a process of its own."""
    process = subprocess.Popen([*TRAINING, tmp_path / "run", "train"], stderr=subprocess.DEVNULL)
    wait_until(lambda: (beat := heartbeat.read_one(tmp_path / "run", "chief")) and beat.last_checkpoint, "a checkpoint")
    yield tmp_path / "run", process
    process.kill()
    process.wait()


def test_a_run_in_progress_then_suspended_then_killed(running, monkeypatch):
    logdir, process = running
    code, found = known(logdir)
    assert (code, found["well"]) == (0, True)
    (chief,) = found["processes"]
    assert (chief["role"], chief["state"], chief["phase"], chief["pid"]) == ("chief", "alive", "training", process.pid)
    assert chief["total_steps"] == 10**9
    assert chief["secs_left"] > 0
    assert found["good_checkpoint"]["state"] == "good"
    assert found["steps_at_risk"] == max(0, chief["step"] - found["good_checkpoint"]["step"])
    code, text = status(logdir)
    assert code == 0
    assert "chief       alive, training" in text
    assert "of 1,000,000,000 (0 %)" in text
    assert " left" in text

    # Ten seconds are long for a test; so is half of one, for this process.
    monkeypatch.setattr(heartbeat, "LATE_SECS", 0.5)
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: known(logdir)[1]["processes"][0]["state"] == "silent", "silence")
    code, text = status(logdir)
    assert code == 1
    assert "silent for" in text

    process.kill()
    wait_until(lambda: known(logdir)[1]["processes"][0]["state"] == "dead", "death")
    code, text = status(logdir)
    assert code == 1
    assert "chief       dead, training" in text
    assert "at risk" in text


def test_a_run_that_has_ended(tmp_path):
    train(tmp_path, 12)
    code, found = known(tmp_path)
    assert code == 0
    assert (found["processes"][0]["state"], found["processes"][0]["reason"]) == ("stopped", "finished")
    assert found["good_checkpoint"]["step"] == 12
    assert found["steps_at_risk"] == 0
    assert found["restarts"] == 0
    assert found["attempts"][0]["last_step"] == 12
    assert found["attempts"][0]["options"]["saving.save_at_end"] is True
    code, text = status(tmp_path)
    assert code == 0
    assert "stopped: finished" in text
    assert "at risk" not in text


def test_a_run_that_failed_shows_its_error_also_after_the_next_start(tmp_path):
    train(tmp_path, 5)
    with pytest.raises(ValueError, match="no data"):
        train(tmp_path, 12, ValueError("no data in \x1b[31m/data"))
    code, text = status(tmp_path)
    assert code == 1
    assert "stopped: error" in text
    assert "  error     ValueError: no data in \\x1b[31m/data" in text
    train(tmp_path, 5)
    code, text = status(tmp_path)
    assert code == 0
    assert "last error  ValueError: no data" in text
    assert "restarts    1; 12 steps done again" in text


def test_a_newest_checkpoint_that_is_damaged(tmp_path):
    train(tmp_path, 10)
    train(tmp_path, 10)
    (tmp_path / "model.ckpt-20" / "state.json").write_text("{}")
    code, found = known(tmp_path)
    assert code == 0
    assert (found["checkpoint"]["step"], found["checkpoint"]["state"]) == (20, "damaged")
    assert (found["good_checkpoint"]["step"], found["steps_at_risk"]) == (10, 10)
    _, text = status(tmp_path)
    assert "checkpoint  model.ckpt-20, step 20" in text
    assert "damaged (" in text
    assert "  last good model.ckpt-10" in text


def test_of_another_host_only_the_age_of_the_heartbeat_is_known(tmp_path):
    tell(tmp_path, host="elsewhere", pid=1)
    assert known(tmp_path)[0] == 0
    age(tmp_path, "chief", 3600)
    code, text = status(tmp_path)
    assert code == 1
    assert "silent for 60 min" in text
    assert "pid 1 on elsewhere" in text


def test_what_a_start_before_has_left_behind_counts_no_longer(tmp_path):
    tell(tmp_path)
    tell(tmp_path, "worker-1", host="elsewhere")
    age(tmp_path, "worker-1", 3600)
    tell(tmp_path, "worker-2", host="elsewhere", started=time.time() - 3600)
    code, found = known(tmp_path)
    assert code == 0
    assert [one["left_behind"] for one in found["processes"]] == [False, True, False]
    assert "worker-1    silent, of a start before this one" in status(tmp_path)[1]


def test_a_worker_that_is_dead_is_no_run_that_is_well(tmp_path):
    tell(tmp_path, started=time.time() - 10)
    tell(tmp_path, "worker-1", process_start=1)
    code, found = known(tmp_path)
    assert code == 1
    assert [one["state"] for one in found["processes"]] == ["alive", "dead"]


@pytest.mark.parametrize("is_of_this_start", [True, False])
def test_a_killed_run_had_come_to_its_newest_checkpoint_even_if_it_could_not_tell(is_of_this_start, tmp_path):
    commit(tmp_path, 50)
    tell(tmp_path, process_start=1, started=time.time() + (-10 if is_of_this_start else 10))
    (chief,) = known(tmp_path)[1]["processes"]
    assert (chief["state"], chief["step"]) == ("dead", 50 if is_of_this_start else 40)


def test_a_hang_shows_its_stacks(tmp_path):
    tell(
        tmp_path,
        stacks="stacks/chief-1.txt",
        boundary_time=time.time() - 300,
        warnings=["first", "second", "third", "fourth"],
    )
    code, text = status(tmp_path)
    assert code == 1
    assert "alive, and hangs: no step for 5 min" in text
    assert "stacks/chief-1.txt" in text
    assert [word in text for word in ("first", "second", "third", "fourth")] == [False, True, True, True]


def test_the_metrics_and_failed_saves(tmp_path):
    tell(tmp_path, metrics_url="http://127.0.0.1:9/metrics", save_failures=3, steps_per_sec=2.0, total_steps=100)
    _, text = status(tmp_path)
    assert "http://127.0.0.1:9/metrics" in text
    assert "3 failed saves" in text
    assert "40 of 100 (40 %), 2 steps/s, 30 s left" in text


def test_what_the_cadence_has_come_to(tmp_path):
    cadence = {"overhead": 0.01, "interval_secs": 4.21, "cost": 0.0094, "bytes_per_day": 5 << 40}
    tell(tmp_path, cadence=cadence)
    _, text = status(tmp_path)
    assert "a checkpoint every 4.2 s, which costs 0.94 % of the time (1 % allowed)" in text
    assert "writes 5.00 TiB a day" in text
    assert known(tmp_path)[1]["processes"][0]["cadence"] == cadence


def test_a_logdir_without_a_run_is_not_well(tmp_path):
    code, text = status(tmp_path)
    assert code == 1
    assert "no heartbeat, no ledger and no checkpoint: nothing has run here" in text
    assert "checkpoint  none" in text
    code, found = known(tmp_path)
    assert (code, found["well"], found["processes"]) == (1, False, [])
    assert status(tmp_path / "missing")[0] == 2


@pytest.mark.parametrize("left", [b"", None])
def test_a_killed_run_whose_heartbeat_is_lost_is_dead_as_its_ledger_tells(running, left):
    logdir, process = running
    process.kill()
    process.wait()
    beat = logdir / heartbeat.DIR_NAME / "chief.json"
    beat.unlink()
    if left is not None:
        beat.write_bytes(left)
    code, found = known(logdir)
    assert (code, found["well"]) == (1, False)
    (chief,) = found["processes"]
    assert (chief["role"], chief["state"], chief["from_ledger"], chief["pid"]) == ("chief", "dead", True, process.pid)
    last = [one for one in ledger.read(logdir) if one["event"] == "checkpoint"][-1]
    # The trace may know of later steps than the ledger.
    assert chief["step"] >= last["step"]
    assert chief["last_checkpoint"]["name"] == last["name"]
    # A newer one may have been committed just before its line was written.
    assert found["steps_at_risk"] == max(0, chief["step"] - found["good_checkpoint"]["step"])
    code, text = status(logdir)
    assert code == 1
    assert "chief       dead, training" in text
    assert "none: this is what the ledger tells" in text


def test_a_run_that_ended_well_is_well_without_its_heartbeat(tmp_path):
    train(tmp_path, 12)
    (tmp_path / heartbeat.DIR_NAME / "chief.json").unlink()
    code, found = known(tmp_path)
    assert (code, found["processes"][0]["state"], found["processes"][0]["reason"]) == (0, "stopped", "finished")
    assert "stopped: finished" in status(tmp_path)[1]


def test_a_logdir_of_other_tools_shows_what_its_checkpoints_tell(tmp_path):
    (tmp_path / "model.ckpt-7.index").write_bytes(b"x" * 8)
    (tmp_path / "model.ckpt-7.data-00000-of-00001").write_bytes(b"x" * 8)
    code, text = status(tmp_path)
    assert code == 0
    assert "model.ckpt-7, step 7" in text
    assert "unverified" in text


def test_a_launcher_that_waits_or_gave_up(tmp_path):
    book = Ledger(tmp_path, role="launcher")
    here = heartbeat.process_start(os.getpid())
    book.append("launch", attempt=1, argv=["x"], child_pid=1, process_start=here)
    assert known(tmp_path)[1]["launcher"]["state"] == "running"
    book.append("exit", attempt=1, child_pid=1, code=1, signal=None, secs=1.0, progressed=False, failure="exit code 1")
    book.append("restart", attempt=2, delay_secs=100.0)
    code, text = status(tmp_path)
    assert code == 0
    assert f"launcher    pid {os.getpid()} on" in text
    assert "starts it again in 99 s" in text
    book.append("gave_up", reason="crash loop", failure="exit code 1: no disk")
    code, text = status(tmp_path)
    assert code == 1
    assert "gave up, crash loop: exit code 1: no disk" in text
    book.append("launch", attempt=1, argv=["x"], child_pid=1, process_start=here - 1)
    code, found = known(tmp_path)
    assert (code, found["launcher"]["state"]) == (0, "ended")


def test_a_launcher_that_gave_up_is_a_finding_whatever_its_program_says_until_that_is_started_again(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, 3, SystemExit(3))
    book = Ledger(tmp_path, role="launcher")
    book.append("launch", attempt=3, argv=["x"], child_pid=1, process_start=heartbeat.process_start(os.getpid()))
    book.append("gave_up", reason="crash loop", failure="exit code 3")
    code, found = known(tmp_path)
    assert (found["processes"][0]["reason"], found["launcher"]["state"]) == ("exit", "gave up")
    assert (code, found["well"]) == (1, False)
    train(tmp_path, 3)
    code, found = known(tmp_path)
    assert (code, found["launcher"]["state"]) == (0, "ended")


def test_the_steps_at_risk_of_a_process_that_was_killed_are_those_of_its_trace(tmp_path):
    program = "import os,sys;from stepguard.testing import FakeSupervisor as S;sv=S(sys.argv[1],save_model_secs=1000)\n"
    program += "with sv.managed_session() as s:\n while True:\n  s.run_step()\n"
    program += "  if s.step == 200: os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    code, found = known(tmp_path)
    assert code == 1
    # The last step is inside of its trace, and perhaps not over.
    assert found["processes"][0]["step"] in (199, 200)
    saved = (found["good_checkpoint"] or {"step": 0})["step"]
    assert found["steps_at_risk"] == found["processes"][0]["step"] - saved


# --- going on ---


def test_follow_tells_of_changes_and_ends_well_by_ctrl_c(tmp_path):
    tell(tmp_path, started=1.0)
    following = subprocess.Popen([*STATUS, tmp_path, "--follow"], stdout=subprocess.PIPE, text=True)
    try:
        assert "chief alive, training, step 40" in following.stdout.readline()
        tell(tmp_path, started=1.0, step=41)
        tell(tmp_path, started=1.0, step=42, last_checkpoint={"name": "model.ckpt-42"})
        assert "step 42, checkpoint model.ckpt-42" in following.stdout.readline()
        tell(
            tmp_path,
            started=1.0,
            step=43,
            last_checkpoint={"name": "model.ckpt-42"},
            phase="stopped",
            reason="finished",
        )
        assert "chief stopped: finished, step 43" in following.stdout.readline()
        following.send_signal(signal.SIGINT)
        assert following.wait(SOON_SECS) == 0
        assert following.stdout.read() == ""
    finally:
        following.kill()
        following.communicate()


def test_follow_as_json_is_a_document_a_line(tmp_path):
    tell(tmp_path)
    following = subprocess.Popen([*STATUS, tmp_path, "--follow", "--json"], stdout=subprocess.PIPE, text=True)
    try:
        assert json.loads(following.stdout.readline())["processes"][0]["phase"] == "training"
        tell(tmp_path, phase="stopping")
        assert json.loads(following.stdout.readline())["processes"][0]["phase"] == "stopping"
    finally:
        following.kill()
        following.communicate()


def test_follow_refreshes_in_place_in_a_terminal(tmp_path):
    tell(tmp_path, warnings=["w" * 30 + " " + "v" * 60])
    pid, master = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS="80", LINES="24", TERM="xterm")
        os.execv(sys.executable, [*STATUS, str(tmp_path), "--follow"])
    seen = b""

    def read_until(text, seen):
        while text not in seen:
            ready, _, _ = select.select([master], [], [], SOON_SECS)
            assert ready, seen
            seen += os.read(master, 65536)
        return seen

    seen = read_until(b"alive, training", seen)
    tell(tmp_path, phase="stopping")
    seen = read_until(b"alive, stopping", seen)
    # The cursor went up, over what was there.
    assert b"\x1b[1A" in seen
    os.write(master, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(master)


def test_a_thousand_processes_are_told_of_in_a_moment(tmp_path):
    book = ledger.Ledger(tmp_path, role="chief")
    lines = []
    for number in range(1000):
        role = f"worker-{number}"
        tell(tmp_path, role=role, pid=10**6 + number, host="another")
        lines += [{"event": "warning", "time": time.time(), "pid": 10**6 + number, "host": "another", "role": role}] * 3
    book.path.write_bytes(b"".join(map(ledger.encode, lines)))
    began = time.process_time()
    found = read_run_state(tmp_path)
    # Each process against all lines took four seconds.
    assert time.process_time() - began < 1.5
    assert len(found.processes) == 1000


def test_a_run_without_a_chief_and_one_without_a_heartbeat_are_not_called_none(tmp_path):
    sv = FakeSupervisor(str(tmp_path / "saves nothing"), saving=Saving(save_model_secs=0))
    with sv.managed_session() as session:
        session.run_step()
    (tmp_path / "copied").mkdir()
    commit(tmp_path / "copied", 7)
    code, output = status(tmp_path / "copied", str(tmp_path / "saves nothing"))
    assert code == 0
    copied, saves_nothing = output.splitlines()[1:]
    assert " no heartbeat " in copied
    # Its step as well.
    assert saves_nothing.split("stopped: finished")[1].split()[0] == "1"
    assert f" process-{os.getpid()} stopped: finished " in saves_nothing


def test_each_of_many_runs_is_a_line(tmp_path, monkeypatch):
    train(tmp_path / "sweep" / "a", 3)
    with pytest.raises(ValueError, match="bad batch"):
        train(tmp_path / "sweep" / "deep" / "b", 2, ValueError("bad batch\x1b[31m"))
    (tmp_path / "sweep" / "notes").mkdir()
    (tmp_path / "sweep" / "notes" / "todo.txt").write_text("nothing")
    (tmp_path / "sweep" / "around").symlink_to(tmp_path / "sweep")
    tell(tmp_path / "c", step=1200, total_steps=5000, steps_per_sec=123.4, phase="training")
    code, output = status(tmp_path / "sweep")
    assert code == 1
    title, *rows = output.splitlines()
    assert title.split() == ["RUN", "STATE", "STEP", "OF", "RATE", "CHECKPOINT", "AT", "RISK", "LAST", "ERROR"]
    assert len(rows) == 2
    assert rows[0].split()[:4] == [str(tmp_path / "sweep" / "a"), "stopped:", "finished", "3"]
    assert "stopped: error" in rows[1]
    assert rows[1].endswith("ValueError: bad batch\\x1b[31m")
    both = CliRunner().invoke(cli, ["status", str(tmp_path / "sweep" / "a"), str(tmp_path / "c")])
    assert both.exit_code == 0
    assert both.output.splitlines()[2].split()[1:5] == ["alive", "1,200", "5,000", "123/s"]
    told = json.loads(CliRunner().invoke(cli, ["status", str(tmp_path), "--json"]).output)
    assert [(Path(one["logdir"]).name, one["well"]) for one in told["runs"]] == [("c", True), ("a", True), ("b", False)]
    # One run in a directory of others is a table too, and a directory with nothing is what it was.
    code, output = status(tmp_path / "sweep" / "notes")
    assert (code, "nothing has run here" in output) == (1, True)
    assert status(tmp_path / "sweep" / "deep")[1].startswith("RUN ")
