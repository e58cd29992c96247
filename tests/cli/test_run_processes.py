"""``stepguard run`` that is stopped and goes on, and its program of several processes."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launches import SOON_SECS, TRAINING, ended, events, is_gone, is_training, newest, run, wait_until

from stepguard.watching import heartbeat

# --- a launcher that is stopped and goes on ---


def stop_and_continue(launcher, secs):
    """SIGSTOP for so long, and SIGCONT: a suspended job, a debugger, a frozen container."""
    launcher.send_signal(signal.SIGSTOP)
    wait_until(lambda: _state(launcher.pid) == "T", "the stop")
    time.sleep(secs)
    launcher.send_signal(signal.SIGCONT)
    wait_until(lambda: _state(launcher.pid) != "T", "the continuation")


def _state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_launcher_that_was_stopped_for_longer_than_it_waits_leaves_its_program_alone(tmp_path, children):
    end = tmp_path / "end"
    script = f"trap 'echo term' TERM; echo ready; while ! test -e {end}; do sleep 0.02; done; exit 4"
    launcher = run("sh", "-c", script)
    children.append(launcher)
    assert launcher.stdout.readline() == "ready\n"
    for _ in range(3):
        stop_and_continue(launcher, 0.7)
    # With a request to stop taken before, a wrong second one would kill the program.
    launcher.send_signal(signal.SIGTERM)
    assert launcher.stdout.readline() == "term\n"
    for _ in range(3):
        stop_and_continue(launcher, 0.7)
    end.touch()
    code, output, errors = ended(launcher)
    assert (code, output) == (4, ""), errors


def test_a_program_that_crashes_while_its_launcher_is_stopped_is_started_again(tmp_path, children):
    ready, end = tmp_path / "ready", tmp_path / "end"
    script = f"test $STEPGUARD_ATTEMPT = 2 && exit 0; touch {ready}; while ! test -e {end}; do sleep 0.02; done; exit 3"
    launcher = run("sh", "-c", script)
    children.append(launcher)
    wait_until(ready.exists, "the program")
    launcher.send_signal(signal.SIGSTOP)
    wait_until(lambda: _state(launcher.pid) == "T", "the stop")
    end.touch()
    time.sleep(0.7)  # past the launcher's look
    launcher.send_signal(signal.SIGCONT)
    code, _, errors = ended(launcher)
    assert code == 0, errors
    assert "exit code 3; restart 1" in errors


def test_a_launcher_that_was_stopped_still_gives_the_grace_that_it_promised(tmp_path, children):
    pid, ready, end = tmp_path / "pid", tmp_path / "ready", tmp_path / "end"
    waits = f"touch {ready}; while ! test -e {end}; do sleep 0.02; done; exit 0"
    script = f"(trap 'echo term' TERM; {waits}) & echo $! > {pid}; while ! test -e {ready}; do sleep 0.02; done; exit 3"
    # Its clock goes on by an hour while it is stopped.
    hour = tmp_path / "hour"
    clock = "import os, time; real = time.monotonic; "
    clock += f"time.monotonic = lambda: real() + 3600 * os.path.exists({str(hour)!r})"
    launcher = run("sh", "-c", script, options=["--max-restarts=0", "--grace-secs=600"], before=clock)
    children.append(launcher)
    assert launcher.stdout.readline() == "term\n"
    launcher.send_signal(signal.SIGSTOP)
    wait_until(lambda: _state(launcher.pid) == "T", "the stop")
    hour.touch()
    launcher.send_signal(signal.SIGCONT)
    time.sleep(1.0)  # a look later, nothing was to happen
    end.touch()
    code, _, errors = ended(launcher)
    assert code == 3
    assert "are killed" not in errors


def test_an_alarm_that_rings_after_the_last_wait_does_not_end_the_launcher():
    program = (
        "import os, signal\n"
        "from stepguard.cli.launcher.signal_queue import SignalQueue\n"
        "with SignalQueue() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGALRM)\n"
        "    assert signals.take(60.0) is None\n"
        "    os.kill(os.getpid(), signal.SIGALRM)\n"
        "print('well')\n"
    )
    ending = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=SOON_SECS
    )
    assert (ending.returncode, ending.stdout) == (0, "well\n")


def test_a_program_that_gets_the_pid_of_one_that_has_ended_runs_all_the_same():
    program = (
        "import os, subprocess, time\n"
        "from types import SimpleNamespace\n"
        "from stepguard.cli.launcher.processes import Processes\n"
        "processes = Processes()\n"
        "how = dict(environment=os.environ, stderr=2, has_own_group=False, in_child=lambda: None)\n"
        "pid = processes.start(['sh', '-c', 'exit 3'], **how)\n"
        "while processes.ending(pid) is None: time.sleep(0.01)\n"
        "subprocess.Popen = lambda *_, **__: SimpleNamespace(pid=pid)\n"
        "print(processes.ending(processes.start(['sh'], **how)))\n"
    )
    ending = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=SOON_SECS
    )
    assert ending.stdout == "None\n", ending.stderr


@pytest.mark.parametrize("moment", ["before it is prepared", "while it is prepared"])
def test_ctrl_c_that_comes_before_a_started_process_is_the_program_ends_it(moment):
    program = (
        "import os, signal, sys, time\n"
        "from stepguard.cli.launcher.processes import Processes\n"
        "press = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "before, then = (press, lambda: None) if sys.argv[1].startswith('before') else (lambda: None, press)\n"
        "os.register_at_fork(after_in_child=before)\n"
        "processes = Processes()\n"
        "pid = processes.start(['sh'], environment=os.environ, stderr=2, has_own_group=True, in_child=then)\n"
        "while processes.ending(pid) is None: time.sleep(0.01)\n"
        "print(processes.ending(pid))\n"
    )
    ending = subprocess.run(
        [sys.executable, "-c", program, moment], check=False, capture_output=True, text=True, timeout=SOON_SECS
    )
    assert (ending.stdout, ending.stderr) == (f"{-signal.SIGINT}\n", "")


# --- several processes ---


def replicas(tmp_path, end):
    one, two = (shlex.join([*TRAINING, str(tmp_path / name), "train"]) for name in ("one", "two"))
    return ["sh", "-c", f"{one} & {two} & {end}"]


def test_replicas_of_a_script_are_stopped_cleanly_with_it(tmp_path, children):
    launcher = run(*replicas(tmp_path, "wait"))
    children.append(launcher)
    both = [tmp_path / "one", tmp_path / "two"]
    wait_until(lambda: all(map(is_training, both)), "training")
    launcher.send_signal(signal.SIGTERM)
    assert ended(launcher)[0] == 128 + signal.SIGTERM
    for logdir in both:
        (stop,) = events(logdir, "stop")
        assert (stop["reason"], newest(logdir).step) == ("sigterm", stop["step"])
        assert [one["event"] for one in events(logdir, "launch", "exit")] == ["launch", "exit"]


def test_replicas_that_a_failed_script_left_behind_are_stopped_before_it_is_started_again(tmp_path, children):
    # The first start fails once both train; the second ends well, with none of them.
    script = replicas(tmp_path, "sleep 1000 & wait $!; exit 3")
    script[2] = f"test $STEPGUARD_ATTEMPT = 2 && exit 0; {script[2]}"
    launcher = run(*script)
    children.append(launcher)
    both = [tmp_path / "one", tmp_path / "two"]
    beats = wait_until(lambda: all(map(is_training, both)) and [is_training(one) for one in both], "training")
    (sleeper,) = (pid for pid in _family(launcher.pid) if b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()[:5])
    os.kill(sleeper, signal.SIGKILL)
    code, _, errors = ended(launcher)
    assert code == 0, errors
    assert "progress: exit code 3" in errors
    assert all(is_gone(one.pid) for one in beats)
    assert [events(logdir, "stop")[0]["reason"] for logdir in both] == ["sigterm"] * 2


def test_what_is_left_behind_and_ignores_sigterm_is_killed_after_its_grace(tmp_path):
    pid = tmp_path / "pid"
    script = f"(trap '' TERM; echo > {pid}-ready; exec sleep 1000) & echo $! > {pid}; "
    script += f"while ! test -e {pid}-ready; do sleep 0.01; done; exit 3"
    code, _, errors = ended(run("sh", "-c", script, options=["--max-restarts=0", "--grace-secs=0.2"]))
    assert code == 3
    assert "left behind are killed" in errors
    assert is_gone(int(pid.read_text()))


def test_a_crash_loop_names_the_worker_that_failed_and_not_the_chief_that_lost_it(tmp_path):
    logdir = tmp_path / "run"
    chief, worker = (shlex.join([*TRAINING, str(logdir), what]) for what in ("lose the worker", "fail as worker"))
    waits = f"while ! test -d {logdir}/{heartbeat.DIR_NAME}; do sleep 0.01; done"
    code, _, errors = ended(
        run("sh", "-c", f"{chief} & {waits}; {worker}; wait $!; exit 1", options=["--logdir", logdir])
    )
    assert code == 70
    assert {one["error"] for one in events(logdir, "stop")} == {
        "ValueError: bad batch",
        "RuntimeError: connection closed by peer",
    }
    failures = [one["failure"] for one in events(logdir, "exit", "gave_up")]
    assert set(failures) == {"exit code 1: ValueError: bad batch"}
    assert "in the same way (exit code 1: ValueError: bad batch)" in errors


def _family(pid):
    found = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [below for one in found for below in _family(one)]
