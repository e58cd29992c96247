"""``stepguard run``: restart or give up, the cause of a crash, and what counts as progress."""

import time

import pytest
from launches import ended, events, run, wait_until

from stepguard.cli.launcher.launched_logdirs import LaunchedLogdirs
from stepguard.cli.launcher.restarts import CRASH_LOOP, NO_RESTARTS_LEFT, Crash, Restart, Restarts
from stepguard.cli.logdir.run_state import read_run_state
from stepguard.testing import FakeSupervisor
from stepguard.watching import heartbeat, ledger
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.trace import NUMBERS, Start
from stepguard.watching.trace_writer import TraceWriter

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


def test_steps_that_only_the_trace_knows_are_progress(tmp_path):
    """A start that was killed came 10 steps further than the one before; its last heartbeat does not tell."""
    logdir = tmp_path / "run"
    heartbeat.prepare(logdir)
    began = time.time() - 1
    ledger.Ledger(logdir, role="chief").append("restore", step=100, previous_step=200)
    beat = Heartbeat("chief", pid=7, started=began, phase="training", step=150)
    heartbeat.write(logdir, beat)
    found = runs(tmp_path, logdir)
    assert not found.has_progressed(began)
    writer = TraceWriter(logdir, "chief")
    writer.open(Start(100, is_resumed=True, pid=7, time=began + 0.1))
    writer.add(NUMBERS, 210, 0, {"loss": 0.5})
    writer.close()
    assert found.has_progressed(began)


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
