"""What a run says of itself: ledger, heartbeat, warnings, in this process and in real ones that are killed."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepguard.options import Saving, Watching
from stepguard.testing import FakeSupervisor
from stepguard.watching import heartbeat, ledger, trace

SOON_SECS = 60.0

CHILD = """
    import json, logging, os, sys, time
    from stepguard.testing import FakeSupervisor
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = json.loads(sys.argv[2])
    steps = options.pop("steps", 10**9)
    sv = FakeSupervisor(sys.argv[1], **{"save_model_secs": 0.05, **options})
    with sv.managed_session() as session:
        for number in range(steps):
            if sv.should_stop():
                break
            session.run_step()
            time.sleep(0.002)
"""


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + SOON_SECS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {SOON_SECS:g} s"
        time.sleep(0.01)
    return found


def events(logdir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    return [one for one in ledger.read(logdir) if kind in (None, one["event"])]


def chief(logdir: Path) -> heartbeat.Heartbeat | None:
    return heartbeat.read_one(logdir, "chief")


def train(logdir: Path | None, steps: int, **options: Any) -> FakeSupervisor:
    # No checkpoint but the last: the others come when the timer does.
    options = {"saving": Saving(save_model_secs=0, save_at_end=True), **options}
    sv = FakeSupervisor(None if logdir is None else str(logdir), **options)
    with sv.managed_session() as session:
        for _ in range(steps):
            session.run_step()
    return sv


class Child:
    """A program that trains the fake model in a process of its own."""

    def __init__(self, logdir: Path, **options: Any) -> None:
        self.logdir = logdir
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), str(logdir), json.dumps(options)],
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_steps(self, steps: int) -> heartbeat.Heartbeat:
        def has_come() -> heartbeat.Heartbeat | None:
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
            beat = chief(self.logdir)
            is_there = beat is not None and beat.pid == self.process.pid and (beat.step or 0) >= steps
            return beat if is_there else None

        return wait_until(has_come, f"step {steps}")

    def end(self, number: int) -> str:
        self.process.send_signal(number)
        self.process.send_signal(signal.SIGCONT)
        return self.process.communicate(timeout=SOON_SECS)[1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start_child(**options: Any) -> Child:
        children.append(Child(tmp_path, **options))
        return children[-1]

    yield start_child
    for child in children:
        child.process.kill()
        child.process.communicate()


class TestTheLedger:
    def test_tells_of_a_run_from_its_start_to_its_end(self, tmp_path: Path) -> None:
        train(tmp_path, 5)

        assert [one["event"] for one in events(tmp_path)] == ["start", "fresh", "checkpoint", "stop"]
        start, fresh, checkpoint, stop = events(tmp_path)
        assert (start["engine"], start["restarts"], start["argv"]) == ("fake", 0, sys.orig_argv)
        assert fresh["step"] == 0
        assert (checkpoint["name"], checkpoint["step"]) == ("model.ckpt-5", 5)
        assert checkpoint["bytes"] == sum(one.stat().st_size for one in (tmp_path / "model.ckpt-5").iterdir())
        assert checkpoint["secs"] > 0
        assert checkpoint["stall_secs"] >= 0
        assert (stop["reason"], stop["step"], stop["error"]) == ("finished", 5, None)
        assert {one["role"] for one in events(tmp_path)} == {"chief"}
        assert {one["pid"] for one in events(tmp_path)} == {os.getpid()}

    def test_tells_what_was_restored_when_nothing_was_lost(self, tmp_path: Path, caplog) -> None:
        train(tmp_path, 5)
        with caplog.at_level(logging.WARNING, "stepguard"):
            train(tmp_path, 1)

        (restored,) = events(tmp_path, "restore")
        assert (restored["step"], restored["checkpoint"], restored["lost_steps"]) == (5, "model.ckpt-5", 0)
        assert restored["damaged"] == []
        assert caplog.records == []

    def test_tells_what_was_damaged_and_where_it_is_now(self, tmp_path: Path) -> None:
        train(tmp_path, 5)
        train(tmp_path, 5)
        (tmp_path / "model.ckpt-10" / "state.json").write_bytes(b"{}")

        train(tmp_path, 1)

        restored = events(tmp_path, "restore")[-1]
        assert (restored["step"], restored["lost_steps"], restored["previous_step"]) == (5, 5, 10)
        (damage,) = restored["damaged"]
        assert damage["name"] == "model.ckpt-10"
        assert "state.json" in damage["reason"]
        assert Path(damage["moved_to"]).is_dir()
        beat = chief(tmp_path)
        assert beat is not None
        assert any("model.ckpt-10 is damaged" in one for one in beat.warnings)

    def test_tells_the_error_that_ended_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError):
            self.fail(tmp_path)

        (stop,) = events(tmp_path, "stop")
        assert (stop["reason"], stop["error"], stop["step"]) == ("error", "ZeroDivisionError: on purpose", 1)

    def test_tells_of_an_error_that_cannot_tell_its_message(self, tmp_path: Path, capfd) -> None:
        class UnspeakableError(Exception):
            def __str__(self) -> str:
                raise ValueError("no message either")

        with pytest.raises(UnspeakableError):
            self.fail(tmp_path, UnspeakableError())

        (stop,) = events(tmp_path, "stop")
        assert (stop["reason"], stop["error"]) == ("error", "UnspeakableError (its __str__ raises ValueError)")
        assert "Traceback" not in capfd.readouterr().err

    @pytest.mark.parametrize(("error", "reason"), [(KeyboardInterrupt, "interrupt"), (SystemExit, "exit")])
    def test_tells_who_ended_a_run(self, tmp_path: Path, error: type[BaseException], reason: str) -> None:
        with pytest.raises(error):
            self.fail(tmp_path, error())

        (stop,) = events(tmp_path, "stop")
        assert (stop["reason"], stop["error"]) == (reason, None)

    @pytest.mark.parametrize("how", ["sv.request_stop()", "sv.coord.request_stop()", "threading.Thread(...)"])
    def test_tells_that_a_run_was_stopped_by_the_program_and_has_not_finished(self, tmp_path: Path, how: str) -> None:
        sv = FakeSupervisor(str(tmp_path))
        with sv.managed_session() as session:
            session.run_step()
            if how == "sv.request_stop()":
                sv.request_stop()
            elif how == "sv.coord.request_stop()":
                sv.coord.request_stop()
            else:
                thread = threading.Thread(target=sv.request_stop)
                thread.start()
                thread.join()

        assert [one["reason"] for one in events(tmp_path, "stop")] == ["request_stop"]

    @pytest.mark.parametrize("how", ["its block ends", "its input ends", "its input ends in a thread"])
    def test_tells_that_a_run_has_finished_when_it_came_to_its_end(self, tmp_path: Path, how: str) -> None:
        sv = FakeSupervisor(str(tmp_path))
        with sv.managed_session() as session:
            session.run_step()
            if how == "its input ends":
                raise EOFError
            if how == "its input ends in a thread":
                sv.request_stop(EOFError())
                # Who asks then asks for what has come already.
                sv.request_stop()

        assert [one["reason"] for one in events(tmp_path, "stop")] == ["finished"]

    def test_tells_of_a_preparation_that_failed(self, tmp_path: Path) -> None:
        sv = FakeSupervisor(str(tmp_path))
        sv.engine.fail_prepare = RuntimeError("no input")
        with pytest.raises(RuntimeError, match="no input"):
            sv.prepare_or_wait_for_session()

        assert [one["event"] for one in events(tmp_path)] == ["start", "stop"]
        assert events(tmp_path)[-1]["error"] == "RuntimeError: no input"

    def test_tells_of_saves_that_failed_and_of_those_that_followed(self, tmp_path: Path) -> None:
        sv = FakeSupervisor(str(tmp_path), saving=Saving(save_model_secs=0, save_model_steps=1))
        sv.engine.fail_writes = [OSError(5, "Input/output error")]
        with sv.managed_session() as session:
            session.run_step()
            wait_until(lambda: events(tmp_path, "checkpoint"), "a checkpoint")
            # A beat follows what it tells of.
            wait_until(lambda: chief(tmp_path) is not None and chief(tmp_path).last_checkpoint, "a beat that knows it")

        (warning, *_) = events(tmp_path, "warning")
        assert "Input/output error" in warning["message"]
        beat = chief(tmp_path)
        assert beat is not None
        assert beat.save_failures == 1
        assert beat.last_checkpoint is not None
        assert beat.last_checkpoint["step"] == 1

    def test_a_second_session_of_one_supervisor_is_a_second_start(self, tmp_path: Path) -> None:
        sv = FakeSupervisor(str(tmp_path), saving=Saving(save_model_secs=0, save_at_end=True))
        for _ in range(2):
            with sv.managed_session() as session:
                session.run_step()

        kinds = [one["event"] for one in events(tmp_path)]
        assert kinds == ["start", "fresh", "checkpoint", "stop", "start", "restore", "checkpoint", "stop"]

    def test_nothing_is_written_without_a_logdir(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        train(None, 2)

        assert os.listdir(tmp_path) == []

    def test_nothing_is_written_and_no_thread_started_without_standard_services(self, tmp_path: Path) -> None:
        sv = FakeSupervisor(str(tmp_path))
        with sv.managed_session(start_standard_services=False) as session:
            session.run_step()

        assert os.listdir(tmp_path) == []

    def fail(self, logdir: Path, error: BaseException | None = None) -> None:
        with FakeSupervisor(str(logdir)).managed_session() as session:
            session.run_step()
            raise error or ZeroDivisionError("on purpose")


class TestAProcess:
    def test_that_is_killed_says_when_it_comes_back_what_it_lost(self, tmp_path: Path, start) -> None:
        # One checkpoint, of the beginning: all that follows it is lost.
        child = start(save_model_secs=1000)
        first = wait_until(lambda: events(tmp_path, "checkpoint"), "the checkpoint")[0]["step"]
        child.wait_for_steps(first + 50)
        child.end(signal.SIGKILL)
        beat = chief(tmp_path)
        assert beat is not None
        assert heartbeat.state(beat) == "dead"
        # The trace may know of steps after the last heartbeat.
        came_to = max(one.step for one in trace.read(tmp_path) if isinstance(one, trace.Record))
        assert came_to >= beat.step - 1

        again = start(save_model_secs=1000)
        again.wait_for_steps(1)
        output = again.end(signal.SIGTERM)

        (restored,) = events(tmp_path, "restore")
        assert restored["previous_step"] == max(came_to, beat.step)
        assert restored["lost_steps"] == restored["previous_step"] - restored["step"]
        assert restored["lost_steps"] >= 45
        assert f"{restored['lost_steps']} steps are done again" in output
        assert [one["restarts"] for one in events(tmp_path, "start")] == [0, 1]
        assert [one["reason"] for one in events(tmp_path, "stop")] == ["sigterm"]

    def test_is_alive_then_silent_then_alive_and_then_stopped(self, tmp_path: Path, start) -> None:
        child = start()
        beat = child.wait_for_steps(5)
        assert (heartbeat.state(beat, beat.time + 1), beat.phase) == ("alive", "training")
        child.process.send_signal(signal.SIGSTOP)
        # Another clock, so that nobody has to wait.
        assert heartbeat.state(chief(tmp_path), time.time() + heartbeat.LATE_SECS + 3) == "silent"
        child.process.send_signal(signal.SIGCONT)

        wait_until(lambda: chief(tmp_path).time > beat.time + 1, "the next heartbeat")
        child.end(signal.SIGTERM)

        beat = chief(tmp_path)
        assert (heartbeat.state(beat), beat.reason) == ("stopped", "sigterm")
        assert (
            beat.step
            == events(tmp_path, "stop")[0]["step"]
            == max(one["step"] for one in events(tmp_path, "checkpoint"))
        )

    @pytest.mark.parametrize("how", ["sys.exit(3)", "raise ZeroDivisionError", "os.kill(os.getpid(), 15)"])
    def test_that_is_forked_inside_the_block_ends_and_leaves_the_run_to_its_parent(self, tmp_path: Path, how) -> None:
        program = f"""
            import os, signal, sys, time
            from stepguard.testing import FakeSupervisor
            from stepguard import Watching
            sv = FakeSupervisor(sys.argv[1], save_model_secs=0.01, watching=Watching(metrics_port=0, hang_secs=100))
            with sv.managed_session() as session:
                for number in range(60):
                    session.run_step()
                    if number == 30:
                        child = os.fork()
                        if not child:
                            {how}
                        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(ended)
        """
        command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SOON_SECS, check=True)

        assert ended.stdout == {"sys": "3\n", "rai": "1\n", "os.": "-15\n"}[how[:3]], ended.stderr
        assert [(one["reason"], one["step"]) for one in events(tmp_path, "stop")] == [("finished", 60)]
        assert {one["pid"] for one in events(tmp_path)} == {events(tmp_path, "start")[0]["pid"]}

    def test_that_was_killed_had_come_to_its_newest_checkpoint_at_least(self, tmp_path: Path, start) -> None:
        child = start(save_model_secs=0, save_model_steps=10)
        child.wait_for_steps(50)
        wait_until(lambda: len(events(tmp_path, "checkpoint")) > 1, "two checkpoints")
        child.end(signal.SIGKILL)
        saved = max(one["step"] for one in events(tmp_path, "checkpoint"))
        # A newer one may have been committed just before its line was written, or be finished by the next start.
        for state in tmp_path.rglob("state.json"):
            if int(state.parent.name.rpartition("-")[2]) >= saved:
                state.write_bytes(b"{}")

        train(tmp_path, 0)

        (restored,) = events(tmp_path, "restore")
        assert restored["previous_step"] >= saved
        assert restored["lost_steps"] == restored["previous_step"] - restored["step"] >= 10


class TestOthersThanTheChief:
    def test_a_worker_writes_nothing_where_no_chief_watches(self, tmp_path: Path) -> None:
        train(tmp_path, 2, is_chief=False)

        assert os.listdir(tmp_path) == []

    def test_a_worker_leaves_signs_of_life_beside_its_chief(self, tmp_path: Path) -> None:
        sv = FakeSupervisor(str(tmp_path))
        with sv.managed_session():
            train(tmp_path, 2, is_chief=False)
            beats = heartbeat.read(tmp_path)

        assert [one.role for one in beats] == ["chief", "worker"]
        assert (beats[1].phase, beats[1].step) == ("stopped", 2)
        assert [one["event"] for one in events(tmp_path) if one["role"] == "worker"] == ["start", "stop"]

    def test_a_worker_that_began_before_its_chief_is_in_the_ledger_while_it_trains(self, tmp_path: Path) -> None:
        before = time.time()
        worker = FakeSupervisor(str(tmp_path), is_chief=False)
        with worker.managed_session():
            assert not (tmp_path / "run.jsonl").exists()
            began = time.time()
            with FakeSupervisor(str(tmp_path)).managed_session():
                # A worker that is killed now adds no line of its own any more.
                found = wait_until(
                    lambda: [one for one in events(tmp_path, "start") if one["role"] == "worker"], "its line"
                )
        assert before - 0.001 <= found[0]["time"] <= began + 0.001
        assert [one["event"] for one in events(tmp_path) if one["role"] == "worker"] == ["start", "stop"]

    def test_one_who_only_reads_the_logdir_does_not_speak_for_the_chief(self, tmp_path: Path) -> None:
        with FakeSupervisor(str(tmp_path)).managed_session() as session:
            session.run_step()
            wait_until(lambda: chief(tmp_path).phase == "training", "the heartbeat of a training")
            train(tmp_path, 0, saving=Saving(save_model_secs=0))
            beats = heartbeat.read(tmp_path)

        assert [(one.role, one.phase) for one in beats] == [("chief", "training")]
        assert [one["role"] for one in events(tmp_path, "stop")] == [f"process-{os.getpid()}", "chief"]

    def test_a_new_run_forgets_the_workers_of_the_last(self, tmp_path: Path) -> None:
        heartbeat.prepare(tmp_path)
        gone = heartbeat.Heartbeat("worker-99", pid=2**22 + 1)
        heartbeat.write(tmp_path, gone)

        train(tmp_path, 1)

        assert [one.role for one in heartbeat.read(tmp_path)] == ["chief"]


def test_what_an_earlier_run_has_left_and_nobody_can_read_is_no_end_of_a_run(tmp_path: Path, caplog) -> None:
    (tmp_path / "run.jsonl").mkdir()

    with caplog.at_level(logging.WARNING, "stepguard"):
        train(tmp_path, 2)

    assert "cannot be read" in caplog.text
    assert (tmp_path / "model.ckpt-2.manifest.json").exists()


def test_without_a_heartbeat_the_ledger_tells_of_the_run_before(tmp_path: Path) -> None:
    train(tmp_path, 5)
    train(tmp_path, 5)
    (tmp_path / heartbeat.DIR_NAME / "chief.json").write_bytes(b"")
    (tmp_path / "model.ckpt-10" / "state.json").write_bytes(b"{}")

    train(tmp_path, 1)

    restored = events(tmp_path, "restore")[-1]
    assert (restored["step"], restored["previous_step"], restored["lost_steps"]) == (5, 10, 5)
    assert restored["previous_time"] == events(tmp_path, "stop")[1]["time"]


def test_a_heartbeat_of_wrong_types_is_no_end_of_a_run(tmp_path: Path) -> None:
    heartbeat.prepare(tmp_path)
    for role in ("chief", "worker-1"):
        beat = tmp_path / heartbeat.DIR_NAME / f"{role}.json"
        beat.write_text(json.dumps({"role": role, "time": None, "step": "abc"}))

    train(tmp_path, 2)

    assert (tmp_path / "model.ckpt-2.manifest.json").exists()
    last = chief(tmp_path)
    assert last is not None
    assert last.step == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total_steps": -1}, ValueError, "total_steps must be a whole number >= 0 or None, got -1"),
        ({"total_steps": 1.5}, TypeError, "total_steps must be a whole number >= 0 or None, got float: 1.5"),
        ({"hang_secs": 0}, ValueError, "hang_secs must be a finite number of seconds > 0 or None, got 0"),
        ({"hang_secs": float("inf")}, ValueError, "hang_secs must be a finite number"),
        ({"hang_secs": "soon"}, TypeError, "hang_secs must be a finite number of .*, got str: 'soon'"),
        ({"end_on_hang": True}, ValueError, "end_on_hang needs hang_secs"),
        ({"metrics_port": -1}, ValueError, "metrics_port must be a whole number from 0 to 65535 or None, got -1"),
        ({"metrics_port": 65536}, ValueError, "metrics_port must be"),
        ({"metrics_port": True}, TypeError, "metrics_port must be .*, got bool: True"),
        ({"metrics_host": ""}, ValueError, "metrics_host must be an address such as '127.0.0.1', got ''"),
    ],
)
def test_an_option_that_makes_no_sense_is_named_at_construction(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Watching(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"progress": 3}, "progress must be True or False, got int: 3"),
        ({"end_on_hang": "no"}, "end_on_hang must be True or False, got str: 'no'"),
    ],
)
def test_a_switch_is_on_or_off_and_nothing_else(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Watching(**options)


def test_hangs_that_leave_no_trace_are_not_watched_for() -> None:
    with pytest.raises(ValueError, match="hang_secs needs a logdir on this machine"):
        FakeSupervisor(watching=Watching(hang_secs=5))
