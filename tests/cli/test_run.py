"""``stepguard run``: what is started again, and how it is stopped."""

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
from launches import SOON_SECS, TRAINING, ended, events, is_gone, is_training, newest, run, wait_until

from stepguard.cli.logdir.run_state import read_run_state
from stepguard.watching import heartbeat


def counting(path, script):
    """A program that counts its starts, and then runs a line of shell."""
    return ["sh", "-c", f"echo x >> {shlex.quote(str(path))}; {script}"]


def starts(path):
    return len(path.read_text().split())


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
    program.append("\x1b]0;title\x07")
    code, _, errors = ended(run(*program, options=["--logdir", tmp_path]))
    assert code == 70
    assert starts(tmp_path / "starts") == 3
    told = errors[errors.index("crash loop") :]
    assert "3 starts in a row made no progress" in told
    # Once where it came first, once where it is given up; in between it is counted.
    assert re.findall(r"progress: (?:exit code 5: Error|the same failure, \d times in a row)", errors) == [
        "progress: exit code 5: Error",
        "progress: the same failure, 2 times in a row",
    ]
    assert "  why\n  Error: no disk" in told
    assert "\\x1b]0;title\\x07" in told
    assert "\x1b" not in told
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


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "sigterm"), (signal.SIGUSR1, "sigusr1")])
def test_a_request_is_passed_on_and_the_last_step_is_saved(tmp_path, children, number, reason):
    logdir = tmp_path / "run"
    launcher = run(*TRAINING, logdir, "train")
    children.append(launcher)
    wait_until(lambda: is_training(logdir), "training")
    launcher.send_signal(number)
    assert ended(launcher)[0] == 128 + number
    (stop,) = events(logdir, "stop")
    assert stop["reason"] == reason
    assert newest(logdir).step == stop["step"]
    assert len(events(logdir, "launch")) == 1


@pytest.mark.parametrize(
    ("what", "number", "ends_by"),
    [
        # The program stops at SIGUSR2 and SIGINT only: it gets the first of them for SIGTERM, which would kill it.
        ("usr2", signal.SIGTERM, signal.SIGUSR2),
        # And SIGTERM for SIGUSR2, which it does not handle.
        ("train", signal.SIGUSR2, signal.SIGTERM),
    ],
)
def test_a_signal_that_would_kill_the_program_becomes_one_that_stops_it(tmp_path, children, what, number, ends_by):
    logdir = tmp_path / "run"
    launcher = run(*TRAINING, logdir, what)
    children.append(launcher)
    wait_until(lambda: is_training(logdir), "training")
    launcher.send_signal(number)
    if number == signal.SIGUSR2:
        # The scheduler's warning, and its request: no second request of anybody who is impatient.
        launcher.send_signal(signal.SIGTERM)
    code, _, errors = ended(launcher)
    assert code == 128 + ends_by, errors
    assert f"{number.name} would kill the program, which gets {ends_by.name} instead" in errors
    (stop,) = events(logdir, "stop")
    assert stop["reason"] == ends_by.name.lower()
    assert newest(logdir).step == stop["step"]
    assert len(events(logdir, "launch")) == 1


def test_a_second_ctrl_c_ends_a_program_that_stops_at_the_first(tmp_path, children):
    logdir = tmp_path / "run"
    training = subprocess.Popen([*TRAINING, logdir, "usr2 and sleep"], stderr=subprocess.PIPE, text=True)
    children.append(training)
    wait_until(lambda: is_training(logdir), "training")
    training.send_signal(signal.SIGINT)
    line = training.stderr.readline()
    assert "SIGINT: stopping at the next step boundary; a second one ends the process at once" in line
    training.send_signal(signal.SIGINT)
    assert training.wait(SOON_SECS) == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("what", "steps", "code", "reason"), [("choose", 3, 10, "finished"), ("choose to fail", 9, 11, "error")]
)
def test_an_end_and_a_failure_end_with_the_exit_codes_that_the_program_has_chosen(tmp_path, what, steps, code, reason):
    logdir = tmp_path / "run"
    found, _, errors = ended(run(*TRAINING, logdir, what, steps, options=["--max-restarts=1"]))
    assert found == code, errors
    stops = events(logdir, "stop")
    # A failure is started again, whatever its code; an end is not.
    assert [(one["reason"], one["exit_code"]) for one in stops] == [(reason, code)] * (2 if reason == "error" else 1)
    assert ("ValueError: bad batch" in errors) == (reason == "error")


def test_sigterm_to_all_processes_of_a_job_is_one_request(tmp_path, children):
    logdir = tmp_path / "run"
    # What comes within half a second is one request; a busy machine needs longer for three signals.
    launcher = run(*TRAINING, logdir, "train", env={**os.environ, "ECHO_SECS": "60"})
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
    # What comes within half a second is one request; a busy machine needs longer for two signals.
    launcher = run(
        "sh",
        "-c",
        "trap 'echo term' TERM; echo ready; for _ in 1 2 3 4 5 6 7 8; do sleep 0.05; done; exit 4",
        before="from stepguard.cli.launcher import launcher; launcher._ONE_REQUEST_SECS = 60.0",
    )
    children.append(launcher)
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(signal.SIGTERM)
    assert launcher.stdout.readline() == "term\n"
    launcher.send_signal(signal.SIGTERM)
    code, output, _ = ended(launcher)
    assert (code, output) == (4, "")


def is_pending(pid, number):
    (mask,) = re.findall(r"^ShdPnd:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_request_during_the_delay_ends_it_at_once(tmp_path, children):
    launcher = run("sh", "-c", "exit 7", options=["--first-delay-secs", "1000", "--longest-delay-secs", "1000"])
    children.append(launcher)
    line = launcher.stderr.readline()
    assert "restart 1 in" in line
    launcher.send_signal(signal.SIGTERM)
    code, _, errors = ended(launcher)
    assert code == 7
    assert "SIGTERM: not started again" in errors


@pytest.mark.parametrize("is_suspended", [False, True])
def test_what_does_not_stop_is_killed_by_the_second_request_with_its_children(tmp_path, children, is_suspended):
    logdir = tmp_path / "run"
    grandchild = tmp_path / "grandchild"
    script = f"setsid sleep 1000 & echo $! > {grandchild}; exec {shlex.join(TRAINING)} {logdir} ignore"
    # However soon the second comes after the first, it is one: a launcher that waits for a processor counts no time.
    before = "from stepguard.cli.launcher import launcher; launcher._ONE_REQUEST_SECS = 0.0"
    launcher = run("sh", "-c", script, before=before)
    children.append(launcher)
    beat = wait_until(lambda: is_training(logdir), "training")
    if is_suspended:
        os.kill(beat.pid, signal.SIGSTOP)
    sleeper = int(grandchild.read_text())
    launcher.send_signal(signal.SIGTERM)
    wait_until(lambda: not is_pending(launcher.pid, signal.SIGTERM), "the first request")
    time.sleep(0.5)  # nothing is to happen
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
    said = f"stopped at step {stop['step']}: step {stop['step']} is saved in {logdir}/model.ckpt-{stop['step']}"
    assert (said in errors) == (reason != "request_stop")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_in_one_line_that_says_what_was_saved(number, tmp_path, children):
    logdir = tmp_path / "run"
    training = subprocess.Popen([*TRAINING, logdir, "train"], stderr=subprocess.PIPE, text=True)
    children.append(training)
    wait_until(lambda: is_training(logdir), "training")
    training.send_signal(number)
    _, errors = training.communicate(timeout=SOON_SECS)
    assert training.returncode == -number
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


def test_a_request_reaches_a_program_that_is_suspended(tmp_path, children):
    launcher = run(
        "sh", "-c", "trap 'echo asked; exit 0' TERM; echo ready; kill -STOP $$; while :; do sleep 0.05; done"
    )
    children.append(launcher)
    assert launcher.stdout.readline() == "ready\n"
    launcher.terminate()
    code, output, _ = ended(launcher)
    assert (code, output) == (0, "asked\n")


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
