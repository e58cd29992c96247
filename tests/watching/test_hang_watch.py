"""The hang watch, on real processes that hang: with the interpreter's lock held in C, asleep, stopped by a signal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from stepguard.watching import heartbeat, ledger

SOON_SECS = 60.0

# Long enough that a process which waits for a processor on a busy machine does not hang.
HANG_SECS = 3.0

CHILD = """
    import collections, itertools, logging, json, os, signal, sys, time
    from stepguard import Saving, Watching
    from stepguard.testing import FakeSupervisor
    logging.basicConfig(level=logging.WARNING, format="LOG %(message)s")

    def hang_in_c():
        # Never returns to the interpreter, which holds its lock all the time.
        collections.deque(itertools.repeat(None), maxlen=0)

    def hang_asleep():
        while not os.path.exists(sys.argv[1] + "/wake"):
            time.sleep(0.02)

    def suspend_itself():
        os.kill(os.getpid(), signal.SIGSTOP)

    saving, watching = Saving(save_model_secs=0, save_at_end=True), Watching(**json.loads(sys.argv[3]))
    with FakeSupervisor(sys.argv[1], saving=saving, watching=watching).managed_session() as session:
        for _ in range(3):
            session.run_step()
        print("hanging", flush=True)
        {"in C": hang_in_c, "asleep": hang_asleep, "suspended": suspend_itself}[sys.argv[2]]()
        # Not a hang: each step comes in time. On a busy machine it may not, and then it is one.
        last = time.monotonic()
        end, gaps = last + float(sys.argv[4]), []
        while last < end:
            session.run_step()
            time.sleep(0.05)
            gaps.append(time.monotonic() - last)
            last += gaps[-1]
    print(json.dumps(gaps), flush=True)
"""


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + SOON_SECS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {SOON_SECS:g} s"
        time.sleep(0.02)
    return found


class Child:
    def __init__(self, logdir: Path, how: str, *, go_on_secs: float = 0.0, **watching: Any) -> None:
        self.logdir = logdir
        self.errors = logdir / "stderr"
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(logdir), how]
        command += [json.dumps({"hang_secs": HANG_SECS, **watching}), str(go_on_secs)]
        with self.errors.open("wb") as stderr:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "hanging\n", self.errors.read_text()

    @property
    def stacks(self) -> Path:
        return self.logdir / "stacks" / f"chief-{self.process.pid}.txt"

    def hangs(self) -> list[dict[str, Any]]:
        return [one for one in ledger.read(self.logdir) if one["event"] == "hang"]

    def monitors(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start_child(how: str, **options: Any) -> Child:
        children.append(Child(tmp_path, how, **options))
        return children[-1]

    yield start_child
    for child in children:
        child.process.kill()
        child.process.communicate()


def test_stacks_and_a_warning_come_while_c_holds_the_lock_of_the_interpreter(start) -> None:
    child = start("in C")

    wait_until(lambda: str(child.stacks) in child.errors.read_text(), "the warning")

    assert child.process.poll() is None
    stacks = child.stacks.read_text()
    assert float(re.search(r"no step boundary for ([\d.]+) s in process", stacks)[1]) >= HANG_SECS
    assert "in hang_in_c" in stacks
    assert stacks.count("Thread 0x") >= 2
    (hang,) = child.hangs()
    assert (hang["stacks"], hang["ended"], hang["role"]) == (str(child.stacks), False, "chief")
    assert hang["secs"] >= HANG_SECS


def test_the_process_is_ended_if_that_is_asked_for(start) -> None:
    child = start("in C", end_on_hang=True)
    (monitor,) = child.monitors()

    assert child.process.wait(SOON_SECS) == -signal.SIGKILL
    assert "in hang_in_c" in child.stacks.read_text()
    assert child.hangs()[0]["ended"] is True
    assert "and ends it" in child.errors.read_text()
    command = [sys.executable, "-m", "stepguard", "status", str(child.logdir), "--json"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 1, said.stderr
    (process,) = json.loads(said.stdout)["processes"]
    assert process["state"] == "dead"
    assert "ended by its hang watch" in process["error"]
    assert process["stacks"] == str(child.stacks)
    wait_until(lambda: not monitor.is_running() or monitor.status() == psutil.STATUS_ZOMBIE, "the monitor's end")


def test_a_hang_that_ends_is_reported_once_by_the_log_and_the_run_goes_on(start) -> None:
    child = start("asleep", go_on_secs=2 * HANG_SECS)
    wait_until(lambda: "no step boundary" in child.errors.read_text(), "the warning")
    beat = wait_until(lambda: _with_stacks(child.logdir), "a heartbeat that names the stacks")
    assert beat.stacks == str(child.stacks)
    (child.logdir / "wake").touch()

    printed, _ = child.process.communicate(timeout=SOON_SECS)
    assert child.process.returncode == 0
    others = sum(secs > HANG_SECS / 2 for secs in json.loads(printed))
    lines = child.errors.read_text().splitlines()
    told = [line for line in lines if "no step boundary" in line]
    assert set(told) == {f"LOG no step boundary for {HANG_SECS:g} s: the stacks of all threads are in {child.stacks}"}
    assert 1 <= len(told) <= 1 + others
    assert "LOG steps are done again, after a hang" in lines
    assert "in hang_asleep" in child.stacks.read_text()
    assert 1 <= len(child.hangs()) <= 1 + others
    assert heartbeat.read(child.logdir)[0].stacks is None


def test_a_process_that_is_suspended_does_not_hang(start) -> None:
    child = start("suspended", end_on_hang=True)
    (monitor,) = child.monitors()
    # It looks once in a second at most, and is blocked between two looks.
    before = monitor.num_ctx_switches().voluntary
    wait_until(lambda: monitor.num_ctx_switches().voluntary >= before + HANG_SECS + 2, "looks for longer than a hang")
    child.process.send_signal(signal.SIGCONT)

    assert child.process.wait(SOON_SECS) == 0, child.errors.read_text()
    assert child.hangs() == []


def test_a_process_that_was_frozen_together_with_its_monitor_does_not_hang(start) -> None:
    child = start("asleep", hang_secs=6.0, end_on_hang=True)
    (monitor,) = child.monitors()
    before = monitor.num_ctx_switches().voluntary
    wait_until(lambda: monitor.num_ctx_switches().voluntary >= before + 2, "the last step, and no more")
    for pid in (child.process.pid, monitor.pid):
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: monitor.status() == psutil.STATUS_STOPPED, "the freeze")
    time.sleep(6.1)  # longer than a hang
    for pid in (child.process.pid, monitor.pid):
        os.kill(pid, signal.SIGCONT)
    (child.logdir / "wake").touch()

    assert child.process.wait(SOON_SECS) == 0, child.errors.read_text()
    assert child.hangs() == []


def test_what_follows_the_last_step_does_not_hang(start) -> None:
    # Such as the evaluation of the model: the three steps were all.
    child = start("asleep", end_on_hang=True, total_steps=3)
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + HANG_SECS + 1.5, "the time of a hang, and of a look")
    (child.logdir / "wake").touch()

    assert child.process.wait(SOON_SECS) == 0, child.errors.read_text()
    assert child.hangs() == []


def test_the_monitor_goes_with_a_process_that_is_killed(start) -> None:
    child = start("asleep", hang_secs=1000)
    (monitor,) = child.monitors()

    child.process.kill()
    child.process.wait()

    wait_until(lambda: not monitor.is_running(), "the monitor's end")


def test_signals_to_the_whole_group_do_not_take_the_watch_away(start) -> None:
    child = start("asleep", hang_secs=1000)
    (monitor,) = child.monitors()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        monitor.send_signal(number)

    assert os.getsid(monitor.pid) == monitor.pid
    (child.logdir / "wake").touch()
    assert child.process.wait(SOON_SECS) == 0


def test_nothing_is_left_where_nothing_hangs(start) -> None:
    child = start("asleep", hang_secs=20)
    (child.logdir / "wake").touch()

    assert child.process.wait(SOON_SECS) == 0
    assert not (child.logdir / "stacks").exists()
    assert child.errors.read_text() == ""


def _with_stacks(logdir: Path) -> heartbeat.Heartbeat | None:
    beat = heartbeat.read_one(logdir, "chief")
    return beat if beat is not None and beat.stacks else None
