"""`stepguard run` around real programs that end in every way, and real signals."""

import contextlib
import fcntl
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from stepguard.cli.launcher.launched_logdirs import LaunchedLogdirs
from stepguard.cli.launcher.restarts import CRASH_LOOP, NO_RESTARTS_LEFT, Crash, Restart, Restarts
from stepguard.cli.logdir.run_state import read_run_state
from stepguard.store import CheckpointStore
from stepguard.testing import FakeSupervisor
from stepguard.watching import heartbeat, ledger

SOON_SECS = 60.0
TRAINING = [sys.executable, str(Path(__file__).with_name("training_program.py"))]


def run(*arguments, options=(), **how):
    """Start the launcher; delays are short unless the options say otherwise."""
    command = [sys.executable, "-m", "stepguard", "run", "--first-delay-secs=0.01", *options, "--", *arguments]
    piped = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(one) for one in command], **{**piped, **how})


def ended(launcher):
    """Its exit code, and what it and its program wrote to stdout and stderr."""
    output, errors = launcher.communicate(timeout=SOON_SECS)
    return launcher.returncode, output, errors


def wait_until(condition, what):
    deadline = time.monotonic() + SOON_SECS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {SOON_SECS:g} s"
        time.sleep(0.01)
    return found


def is_training(logdir, role="chief"):
    beat = heartbeat.read_one(logdir, role)
    return beat if beat is not None and beat.phase == "training" and (beat.step or 0) > 0 else None


def is_gone(pid):
    return not heartbeat.is_running(pid, None)


def newest(logdir):
    return CheckpointStore(logdir).newest_good().checkpoint


def events(logdir, *names):
    return [one for one in ledger.read(logdir) if one["event"] in names]


def counting(path, script):
    """A program that counts its starts, and then runs a line of shell."""
    return ["sh", "-c", f"echo x >> {shlex.quote(str(path))}; {script}"]


def starts(path):
    return len(path.read_text().split())


@pytest.fixture
def children():
    """Processes that are gone at the end of the test, with all that they have started."""
    started = []
    yield started
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
        one.communicate()


# --- what is started again ---


def test_a_clean_end_is_the_end_and_the_streams_are_the_programs_own(tmp_path):
    program = counting(tmp_path / "starts", "read line; echo got $line; echo $STEPGUARD_ATTEMPT >&2")
    launcher = run(*program, stdin=subprocess.PIPE)
    output, errors = launcher.communicate("a word\n", timeout=SOON_SECS)
    assert launcher.returncode == 0
    assert output == "got a word\n"
    assert errors.splitlines()[0] == "1"
    assert re.fullmatch(r"stepguard: ended well after \d+ s, 0 restarts", errors.splitlines()[1])
    assert starts(tmp_path / "starts") == 1


def test_a_crash_at_once_is_a_crash_loop_after_three_starts(tmp_path):
    program = counting(tmp_path / "starts", "echo why >&2; echo Error: no disk $$ >&2; echo ===== >&2; exit 5")
    code, _, errors = ended(run(*program, options=["--logdir", tmp_path]))
    assert code == 70
    assert starts(tmp_path / "starts") == 3
    told = errors[errors.index("crash loop") :]
    assert "3 starts in a row made no progress" in told
    assert "  why\n  Error: no disk" in told
    launches = events(tmp_path, "launch", "exit", "restart", "gave_up")
    assert [one["event"] for one in launches] == ["launch", "exit", "restart"] * 2 + ["launch", "exit", "gave_up"]
    assert {one["role"] for one in launches} == {"launcher"}
    assert [one["attempt"] for one in launches if one["event"] == "launch"] == [1, 2, 3]
    last = launches[-2]
    assert (last["code"], last["signal"], last["progressed"]) == (5, None, False)
    assert last["failure"].startswith("exit code 5: Error: no disk")
    assert launches[-1]["reason"] == "crash loop"


@pytest.mark.parametrize("code", [2, 126, 127])
def test_a_mistake_in_the_arguments_is_not_tried_again(tmp_path, code):
    program = counting(tmp_path / "starts", f"exit {code}")
    assert ended(run(*program))[0] == code
    assert starts(tmp_path / "starts") == 1


def test_a_program_that_is_not_there_or_no_program(tmp_path):
    code, _, errors = ended(run("no-such-program"))
    assert code == 127
    assert "no-such-program could not be started: No such file" in errors
    (tmp_path / "text").write_text("text")
    assert ended(run(tmp_path / "text"))[0] == 126
    assert ended(run(options=["--grace-secs=1"]))[0] == 2


def test_a_program_that_was_killed_is_started_again_and_the_last_exit_code_is_its_own(tmp_path):
    program = counting(tmp_path / "starts", "kill -9 $$")
    code, _, errors = ended(run(*program, options=["--max-restarts", "1"]))
    assert code == 128 + signal.SIGKILL
    assert starts(tmp_path / "starts") == 2
    assert "not started again after 1 restart, which is what --max-restarts allows: SIGKILL" in errors


def test_failures_that_differ_are_no_crash_loop(tmp_path):
    program = counting(
        tmp_path / "starts", "test $STEPGUARD_ATTEMPT = 4 && exit 0; exit $STEPGUARD_ATTEMPT$STEPGUARD_ATTEMPT"
    )
    assert ended(run(*program))[0] == 0
    assert starts(tmp_path / "starts") == 4


def test_crashes_with_progress_go_on_to_the_end(tmp_path):
    logdir = tmp_path / "run"
    code, _, errors = ended(run(*TRAINING, logdir, "die", 24))
    assert code == 0, errors
    assert newest(logdir).step == 24
    assert [one["attempt"] for one in events(logdir, "start")] == [1, 2, 3, 4, 5]
    assert [one["signal"] for one in events(logdir, "exit")] == ["SIGKILL"] * 4 + [None]
    assert all(one["progressed"] for one in events(logdir, "exit"))
    summary = errors[errors.index("ended well") :]
    assert "4 restarts" in summary
    assert re.search(r"productive \d+ s, replayed \d+ s, down \d+ s", summary)
    # A process that SIGKILL ended has told nothing of its end itself.
    assert read_run_state(logdir).last_error.startswith("SIGKILL")


def test_a_step_that_always_fails_is_a_crash_loop_once_there_is_no_more_progress(tmp_path):
    logdir = tmp_path / "run"
    code, _, errors = ended(run(*TRAINING, logdir, "fail"))
    assert code == 70
    assert [one["progressed"] for one in events(logdir, "exit")] == [True, False, False, False]
    assert "exit code 1: ValueError: step 7 cannot be done" in errors[errors.index("crash loop") :]
    assert newest(logdir).step == 5


# --- requests to stop ---


def test_sigterm_is_passed_on_and_the_last_step_is_saved(tmp_path, children):
    logdir = tmp_path / "run"
    launcher = run(*TRAINING, logdir, "train")
    children.append(launcher)
    wait_until(lambda: is_training(logdir), "training")
    launcher.send_signal(signal.SIGTERM)
    assert ended(launcher)[0] == 128 + signal.SIGTERM
    (stop,) = events(logdir, "stop")
    assert stop["reason"] == "sigterm"
    assert newest(logdir).step == stop["step"]
    assert len(events(logdir, "launch")) == 1


def test_sigterm_to_all_processes_of_a_job_is_one_request(tmp_path, children):
    logdir = tmp_path / "run"
    launcher = run(*TRAINING, logdir, "train")
    children.append(launcher)
    beat = wait_until(lambda: is_training(logdir), "training")
    assert beat
    for _ in range(2):
        os.kill(heartbeat.read_one(logdir, "chief").pid, signal.SIGTERM)
    launcher.send_signal(signal.SIGTERM)
    assert ended(launcher)[0] == 128 + signal.SIGTERM
    (stop,) = events(logdir, "stop")
    assert stop["reason"] == "sigterm"
    assert newest(logdir).step == stop["step"]


def test_two_requests_at_once_are_passed_on_as_one(children):
    # `timeout` sends it to the launcher, and to its group; a program under Stepguard ends at once by a second one.
    launcher = run(
        "sh", "-c", "trap 'echo term' TERM; echo ready; for _ in 1 2 3 4 5 6 7 8; do sleep 0.05; done; exit 4"
    )
    children.append(launcher)
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(signal.SIGTERM)
    assert launcher.stdout.readline() == "term\n"
    launcher.send_signal(signal.SIGTERM)
    code, output, _ = ended(launcher)
    assert (code, output) == (4, "")


def test_a_request_during_the_delay_ends_it_at_once(tmp_path, children):
    launcher = run("sh", "-c", "exit 7", options=["--first-delay-secs", "1000", "--longest-delay-secs", "1000"])
    children.append(launcher)
    line = launcher.stderr.readline()
    assert "restart 1 in" in line
    launcher.send_signal(signal.SIGTERM)
    code, _, errors = ended(launcher)
    assert code == 7
    assert "SIGTERM: not started again" in errors


@pytest.mark.parametrize("what", ["ignore", "stopped"])
def test_what_does_not_stop_is_killed_by_the_second_request_with_its_children(tmp_path, children, what):
    logdir = tmp_path / "run"
    grandchild = tmp_path / "grandchild"
    script = f"setsid sleep 1000 & echo $! > {grandchild}; exec {shlex.join(TRAINING)} {logdir} {what}"
    launcher = run("sh", "-c", script)
    children.append(launcher)
    beat = wait_until(lambda: is_training(logdir), "training")
    if what == "stopped":
        os.kill(beat.pid, signal.SIGSTOP)
    sleeper = int(grandchild.read_text())
    launcher.send_signal(signal.SIGTERM)
    time.sleep(1.0)  # nothing is to happen, and two requests that are closer count as one
    assert launcher.poll() is None
    assert not is_gone(beat.pid)
    launcher.send_signal(signal.SIGTERM)
    code, _, errors = ended(launcher)
    assert code == 128 + signal.SIGKILL
    assert "a second SIGTERM" in errors
    assert is_gone(beat.pid)
    assert is_gone(sleeper)


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "sigterm"), (signal.SIGINT, "interrupt")])
def test_a_program_that_was_itself_asked_to_stop_is_not_started_again(tmp_path, children, number, reason):
    logdir = tmp_path / "run"
    launcher = run(*TRAINING, logdir, "train")
    children.append(launcher)
    os.kill(wait_until(lambda: is_training(logdir), "training").pid, number)
    code, _, errors = ended(launcher)
    assert code == 128 + number
    assert "it was asked to stop" in errors
    assert [one["reason"] for one in events(logdir, "stop")] == [reason]


@pytest.mark.parametrize("reason", ["sigterm", "interrupt", "request_stop"])
def test_a_requested_stop_ends_with_the_exit_code_that_the_program_has_chosen(tmp_path, children, reason):
    logdir = tmp_path / "run"
    launcher = run(*TRAINING, logdir, "choose to stop" if reason == "request_stop" else "choose")
    children.append(launcher)
    if reason != "request_stop":
        pid = wait_until(lambda: is_training(logdir), "training").pid
        os.kill(pid, signal.SIGTERM if reason == "sigterm" else signal.SIGINT)
    code, _, errors = ended(launcher)
    assert code == 75, errors
    (stop,) = events(logdir, "stop")
    assert (stop["reason"], stop["exit_code"], stop["error"]) == (reason, 75, None)
    assert newest(logdir).step == stop["step"]
    assert len(events(logdir, "launch")) == 1
    assert f"stopped ({reason}), exit code 75, after" in errors
    assert "Traceback" not in errors


def test_ctrl_c_ends_in_one_line_that_says_what_was_saved(tmp_path, children):
    logdir = tmp_path / "run"
    training = subprocess.Popen([*TRAINING, logdir, "train"], stderr=subprocess.PIPE, text=True)
    children.append(training)
    wait_until(lambda: is_training(logdir), "training")
    training.send_signal(signal.SIGINT)
    _, errors = training.communicate(timeout=SOON_SECS)
    assert training.returncode == -signal.SIGINT
    step = newest(logdir).step
    # A checkpoint that was skipped on a slow disk is told of before.
    assert errors.splitlines()[-1] == f"stopped at step {step}: step {step} is saved in {logdir}/model.ckpt-{step}"
    assert "Traceback" not in errors


def test_an_interrupt_that_the_program_raises_elsewhere_keeps_its_traceback(tmp_path):
    program = (
        "import sys\n"
        "from stepguard.testing import FakeSupervisor\n"
        "try:\n"
        "    with FakeSupervisor(sys.argv[1]).managed_session():\n"
        "        raise KeyboardInterrupt\n"
        "except KeyboardInterrupt:\n"
        "    raise ValueError('of the program') from None\n"
    )
    ending = subprocess.run(
        [sys.executable, "-c", program, tmp_path], check=False, capture_output=True, text=True, timeout=SOON_SECS
    )
    assert ending.returncode == 1
    assert "Traceback" in ending.stderr
    assert "ValueError: of the program" in ending.stderr


def test_sigterm_that_was_no_clean_stop_is_a_crash(tmp_path):
    program = counting(tmp_path / "starts", "kill -TERM $$")
    assert ended(run(*program, options=["--max-restarts=1"]))[0] == 128 + signal.SIGTERM
    assert starts(tmp_path / "starts") == 2


def test_other_signals_are_passed_on(tmp_path, children):
    launcher = run("sh", "-c", "trap 'echo usr1; exit 0' USR1; echo ready; while :; do sleep 0.05; done")
    children.append(launcher)
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(signal.SIGUSR1)
    code, output, _ = ended(launcher)
    assert (code, output) == (0, "usr1\n")


def test_a_launcher_that_is_killed_leaves_no_run_behind(tmp_path, children):
    logdir = tmp_path / "run"
    launcher = run(*TRAINING, logdir, "train")
    children.append(launcher)
    pid = wait_until(lambda: is_training(logdir), "training").pid
    launcher.kill()
    wait_until(lambda: is_gone(pid), "the end of the program")
    (stop,) = events(logdir, "stop")
    assert stop["reason"] == "sigterm"
    assert newest(logdir).step == stop["step"]


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
    launcher = run("sh", "-c", script, options=["--max-restarts=0", "--grace-secs=2"])
    children.append(launcher)
    assert launcher.stdout.readline() == "term\n"
    stop_and_continue(launcher, 2.5)
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


# --- in a terminal ---


@pytest.fixture
def terminal(children):
    """Starts a launcher in the foreground of a terminal of 91 columns; gives the terminal's other end."""
    masters = []

    def start(*program):
        pid, master = pty.fork()
        if pid == 0:
            os.execv(sys.executable, [sys.executable, "-m", "stepguard", "run", "--", *program])
        masters.append((pid, master))
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 91, 0, 0))
        return pid, master

    yield start
    for pid, master in masters:
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        os.close(master)


def _read_until(master, text):
    seen = ""
    while text not in seen:
        ready, _, _ = select.select([master], [], [], SOON_SECS)
        assert ready, f"{text!r} did not come: {seen}"
        try:
            seen += os.read(master, 4096).decode()
        except OSError:
            raise AssertionError(f"{text!r} did not come: {seen}") from None
    return seen


def test_ctrl_c_reaches_the_program_once_and_it_has_a_terminal(terminal):
    program = (
        "import os, signal, sys, time\n"
        "count = 0\n"
        "def counted(*_):\n"
        "    global count\n"
        "    count += 1\n"
        "signal.signal(signal.SIGINT, counted)\n"
        "print('tty', [os.isatty(one) for one in (0, 1, 2)], os.get_terminal_size(2).columns, file=sys.stderr)\n"
        "while not count: time.sleep(0.01)\n"
        "print('interrupted', file=sys.stderr)\n"
        "time.sleep(0.8)\n"
        "print('interrupts:', count, file=sys.stderr)\n"
        "sys.exit(9)\n"
    )
    pid, master = terminal(sys.executable, "-c", program)
    seen = _read_until(master, "tty [True, True, True] 91\r\n")
    assert "\r\r\n" not in seen
    # Two that come at the same moment are one to the kernel: so the launcher takes its own a little later.
    os.kill(pid, signal.SIGSTOP)
    os.write(master, b"\x03")
    _read_until(master, "interrupted")
    os.kill(pid, signal.SIGCONT)
    seen = _read_until(master, "restarts")
    assert "interrupts: 1\r\n" in seen
    assert "restart 1" not in seen
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


# --- the decision ---


def decide(*failures, most=100, first=1.0, longest=300.0):
    restarts = Restarts(most=most, first_delay_secs=first, longest_delay_secs=longest, uniform=lambda low, high: high)
    return [restarts.after(Crash(*one[:2]), has_progressed=one[2:] == (True,)) for one in failures]


def test_the_delay_doubles_without_progress_and_begins_anew_with_it():
    failures = [("exit code 1", word) for word in ("a", "b", "c", "d")]
    delays = [
        one.delay_secs for one in decide(*failures, ("exit code 1", "e", True), ("exit code 1", "f"), longest=5.0)
    ]
    assert delays == [1.0, 2.0, 4.0, 5.0, 1.0, 1.0]
    many = [("exit code 1", "ab"[number % 2]) for number in range(2000)]
    assert decide(*many, most=5000)[-1].delay_secs == 300.0


def test_the_delay_is_shortened_by_up_to_a_half():
    seen = []
    restarts = Restarts(
        most=9, first_delay_secs=8.0, longest_delay_secs=9.0, uniform=lambda *of: seen.append(of) or 0.5
    )
    assert restarts.after(Crash("SIGKILL", ""), has_progressed=False) == Restart(1, 4.0)
    assert seen == [(0.5, 1.0)]


def test_three_same_failures_without_progress_are_a_crash_loop():
    same = ("exit code 1", "ValueError: no")
    assert decide(same, same, same)[-1] is CRASH_LOOP
    assert decide(same, same, ("exit code 3", "ValueError: no"), same)[-1] != CRASH_LOOP
    assert decide(same, same, (*same, True), same, same)[-1] != CRASH_LOOP
    assert decide(same, same, (*same, True), same, same, same)[-1] is CRASH_LOOP


def test_numbers_and_addresses_make_no_other_failure():
    assert Crash("exit code 1", "at 0xdeadbeef, step 12").is_same(Crash("exit code 1", "at 0x1, step 9"))
    assert not Crash("exit code 1", "no disk").is_same(Crash("exit code 1", "no memory"))
    assert Crash("SIGKILL", "saved step 12").is_same(Crash("SIGKILL", "began"))


def test_restarts_are_limited():
    one, two = ("SIGKILL", "", True), ("SIGKILL", "", True)
    assert decide(one, two, most=1) == [Restart(1, 1.0), NO_RESTARTS_LEFT]
    assert decide(one, most=0) == [NO_RESTARTS_LEFT]


# --- the cause ---


def stopped(time, role, error):
    return {"time": time, "role": role, "reason": "error", "error": error}


def test_the_cause_is_the_first_error_of_any_process_since_the_start(tmp_path):
    book = ledger.Ledger(tmp_path, role="chief")
    for line in (
        stopped(5.0, "worker-1", "before"),
        stopped(12.0, "worker-2", "first, on a host whose clock is late"),
        {"time": 11.0, "role": "worker-1", "reason": "sigterm", "error": None},
        stopped(11.5, "chief", "what follows from it"),
    ):
        book.append("stop", **line)
    found = LaunchedLogdirs(tmp_path, tmp_path / "nothing-announced")
    assert found.cause(10.0) == "first, on a host whose clock is late"
    assert found.cause(0.0) == "before"
    assert found.cause(20.0) is None
    # torchrun has started all of them again, and then something else has failed.
    for role in ("worker-1", "worker-2", "chief"):
        book.append("start", time=13.0, role=role)
    assert found.cause(10.0) is None
    book.append("stop", **stopped(14.0, "chief", "last"))
    assert found.cause(10.0) == "last"


def test_an_error_that_came_after_a_request_to_stop_is_not_the_cause(tmp_path):
    # A rank was killed, and torchrun has ended the others, with the workers of their loaders.
    book = ledger.Ledger(tmp_path, role="chief")
    follows = "RuntimeError: DataLoader worker (pid 7) is killed by signal: Terminated."
    book.append("stop", **stopped(12.0, "chief", follows), request="sigterm")
    found = LaunchedLogdirs(tmp_path, tmp_path / "nothing-announced")
    assert found.cause(10.0) is None
    assert read_run_state(tmp_path).last_error == follows
    launcher = ledger.Ledger(tmp_path, role="launcher")
    launcher.append("exit", time=13.0, failure="exit code 1: Signal 9 (SIGKILL) received by PID 6")
    launcher.append("gave_up", time=13.0)
    assert read_run_state(tmp_path).last_error == "exit code 1: Signal 9 (SIGKILL) received by PID 6"


@pytest.mark.parametrize(
    ("written", "end", "failure"),
    [
        (r"\r 10%%|#  | 1/10 [00:01<00:09]\r 20%%|## | 2/10 [00:02<00:08]", "exit 3", "exit code 3: Error: no disk"),
        (r"\rstep 1/10\rstep 2/10", "exit 3", "exit code 3: Error: no disk"),
        (r"\r 20%%|## | 2/10 [00:02<00:08]fatal: no memory\n", "exit 3", "exit code 3: fatal: no memory"),
        (r"\repoch 1: loss 0.5, 20%%\n", "kill -9 $$", "SIGKILL: Error: no disk"),
        (r"saved step 9\n", "kill -9 $$", "SIGKILL: Error: no disk"),
    ],
)
def test_the_cause_of_a_death_is_not_the_last_state_of_a_progress_bar(tmp_path, written, end, failure):
    program = f"printf 'Error: no disk\\n' >&2; printf '{written}' >&2; {end}"
    ended(run("sh", "-c", program, options=["--logdir", tmp_path, "--max-restarts=0"]))
    assert [one["failure"] for one in events(tmp_path, "exit")] == [failure]


def test_of_what_a_signal_has_ended_a_line_that_tells_of_no_error_is_no_cause(tmp_path):
    ended(run("sh", "-c", "echo step 9 done >&2; kill -9 $$", options=["--logdir", tmp_path, "--max-restarts=0"]))
    assert [one["failure"] for one in events(tmp_path, "exit")] == ["SIGKILL"]


# --- progress ---


def runs(tmp_path, logdir):
    """What the launcher sees of a logdir that was announced after the start."""
    announcements = tmp_path / "announcements"
    announcements.mkdir()
    found = LaunchedLogdirs(None, announcements)
    (announcements / "1.logdir").write_text(str(logdir))
    found.find_announced()
    return found


def test_checkpoints_that_were_there_before_are_no_progress(tmp_path):
    with FakeSupervisor(str(tmp_path / "run")).managed_session() as session:
        session.run_step()
    began = time.time() + 0.001
    found = runs(tmp_path, tmp_path / "run")
    assert not found.has_progressed(began)
    book = ledger.Ledger(tmp_path / "run", role="chief")
    wait_until(lambda: time.time() > began + 0.001, "a moment")
    book.append("restore", step=1, previous_step=1)
    assert not found.has_progressed(began)
    book.append("checkpoint", step=2)
    assert found.has_progressed(began)
    assert not found.has_progressed(time.time() + 1)


def test_a_checkpoint_whose_line_in_the_ledger_is_missing_is_progress(tmp_path):
    began = time.time() - 0.001
    with FakeSupervisor(str(tmp_path / "run")).managed_session() as session:
        session.run_step()
    book = tmp_path / "run" / ledger.FILE_NAME
    book.write_bytes(b"".join(line for line in book.read_bytes().splitlines(True) if b'"fresh"' in line))
    (tmp_path / "run" / heartbeat.DIR_NAME / "chief.json").unlink()
    assert runs(tmp_path, tmp_path / "run").has_progressed(began)


def test_a_run_that_damage_has_thrown_back_makes_progress_below_where_it_was(tmp_path):
    logdir = tmp_path / "run"
    logdir.mkdir()
    book = ledger.Ledger(logdir, role="chief")
    book.append("checkpoint", step=500)
    began = time.time() + 0.001
    wait_until(lambda: time.time() > began + 0.001, "a moment")
    book.append("restore", step=50, previous_step=500)
    found = runs(tmp_path, logdir)
    assert not found.has_progressed(began)
    book.append("checkpoint", step=60)
    assert found.has_progressed(began)


def test_checkpoints_of_other_tools_in_a_logdir_that_is_given_are_progress(tmp_path):
    def save(step):
        (tmp_path / f"model.ckpt-{step}.data-00000-of-00001").write_bytes(b"x")
        (tmp_path / f"model.ckpt-{step}.index").write_bytes(b"x")

    save(7)
    given = LaunchedLogdirs(tmp_path, tmp_path / "nothing-announced")
    began = time.time() - 0.001
    assert not given.has_progressed(began)
    save(9)
    assert given.has_progressed(began)
    assert not given.has_progressed(began)


def test_a_logdir_that_is_made_known_late_is_told_all(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    told = LaunchedLogdirs(None, tmp_path)
    told.record("launch", 1.0, attempt=1)
    for name in ("one", "two"):
        (tmp_path / f"{name}.logdir").write_text(str(tmp_path / name))
        told.find_announced()
    told.record("exit", 2.0, attempt=1)
    for name in ("one", "two"):
        assert [(one["event"], one["time"]) for one in ledger.read(tmp_path / name)] == [("launch", 1.0), ("exit", 2.0)]
