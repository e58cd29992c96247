"""SIGTERM, Ctrl-C, SIGSTOP: what a run does when it is told to end, or held up, from outside."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from zygote import Child, Zygote, wait_until

from stepguard.store import CheckpointStore, tensorflow_files
from stepguard.watching import ledger

# A stop, a save of a few kilobytes and the end of the interpreter, on a busy machine.
QUICKLY_SECS = 60.0


def newest_saved(logdir: Path) -> int:
    """The step of the newest good checkpoint; all of it is what it is at that step."""
    from model import read, wrong

    found = CheckpointStore(logdir, saver_files=tensorflow_files).newest_good(quarantine=False)
    assert found.damaged == ()
    assert found.checkpoint is not None
    state = read(found.checkpoint.path)
    assert found.checkpoint.step == state["global_step"]
    assert wrong(int(state["global_step"]), state) == []
    return int(state["global_step"])


def start(children: Zygote, logdir: Path, loop: str, **options: Any) -> Child:
    """Start a program that trains in that way, and wait until it has."""
    child = children.start("signalled", logdir=str(logdir), loop=loop, **options)
    child.wait_for("blocking" if loop in ("blocked", "fed") else "stepped", count=1)
    return child


def assert_all_steps_saved(child: Child, logdir: Path, threads: int = 1) -> None:
    steps = len(child.reports("stepped"))
    # A step is done before it is reported: each thread may have been stopped between the two.
    assert steps <= newest_saved(logdir) <= steps + threads


class TestSigterm:
    def test_of_a_forked_worker_ends_the_worker_and_nothing_else(
        self, tensorflow_children: Zygote, tmp_path: Path
    ) -> None:
        child = start(tensorflow_children, tmp_path, "forks")

        assert child.wait(QUICKLY_SECS) == 0, child.output
        (ended,) = child.reports("worker ended")
        assert ended["by"] == signal.SIGTERM
        assert not ended["stops"]
        assert newest_saved(tmp_path) == 2

    @pytest.mark.parametrize(
        ("loop", "threads"),
        [("never asks", 1), ("swallows", 1), ("asks", 1), ("fed", 1), ("threads", 3), ("threads that never ask", 4)],
    )
    def test_ends_the_run_after_its_last_step_was_saved(
        self, tensorflow_children: Zygote, tmp_path: Path, loop: str, threads: int
    ) -> None:
        child = start(tensorflow_children, tmp_path, loop)

        child.send(signal.SIGTERM)

        assert child.wait(QUICKLY_SECS) == -signal.SIGTERM, child.output
        assert_all_steps_saved(child, tmp_path, threads)
        assert child.reports("swallowed") == []

    def test_leaves_a_loop_that_asks_to_end_in_its_own_way(self, tensorflow_children: Zygote, tmp_path: Path) -> None:
        child = start(tensorflow_children, tmp_path, "reads at the end")

        child.send(signal.SIGTERM)

        assert child.wait(QUICKLY_SECS) == -signal.SIGTERM, child.output
        (read,) = child.reports("read")
        assert newest_saved(tmp_path) == read["step"] + 1

    def test_ends_a_run_that_an_error_ends_after_it(self, tensorflow_children: Zygote, tmp_path: Path) -> None:
        child = start(tensorflow_children, tmp_path, "fails at the end")

        child.send(signal.SIGTERM)

        # A program that tries again after an AbortedError does not get this one.
        assert child.wait(QUICKLY_SECS) == -signal.SIGTERM, child.output
        assert child.reports("left") == []
        (told,) = [one["text"] for one in child.reports("warning") if "ended by SIGTERM, and by" in one["text"]]
        assert "AbortedError" in told
        assert child.reports("warning")[-1]["text"].startswith("stopped at step ")

    def test_ends_a_run_whose_main_thread_waits_for_input_that_nobody_ends(
        self, tensorflow_children: Zygote, tmp_path: Path
    ) -> None:
        child = start(tensorflow_children, tmp_path, "blocked", stop_grace_secs=4)

        child.send(signal.SIGTERM)

        assert child.wait(QUICKLY_SECS) == -signal.SIGTERM, child.output
        assert newest_saved(tmp_path) == 3

    def test_ends_a_run_whose_main_thread_waits_for_something_else(
        self, tensorflow_children: Zygote, tmp_path: Path
    ) -> None:
        child = start(tensorflow_children, tmp_path, "sleeps", stop_grace_secs=4)

        child.send(signal.SIGTERM)

        assert child.wait(QUICKLY_SECS) in (-signal.SIGTERM, 128 + signal.SIGTERM), child.output
        assert_all_steps_saved(child, tmp_path)
        (stop,) = [one for one in ledger.read(tmp_path) if one["event"] == "stop"]
        assert stop["reason"] == "sigterm"
        step = newest_saved(tmp_path)
        said = f"stopped at step {step}: step {step} is saved in {tmp_path}/model.ckpt-{step}"
        assert child.reports("warning")[-1]["text"] == said

    def test_ends_a_preparation_that_does_not_end(self, tensorflow_children: Zygote, tmp_path: Path) -> None:
        child = tensorflow_children.start("preparing_for_ever", logdir=str(tmp_path))
        child.wait_for("preparing")

        child.send(signal.SIGTERM)

        assert child.wait(QUICKLY_SECS) in (-signal.SIGTERM, 128 + signal.SIGTERM), child.output

    def test_ends_a_worker_that_waits_for_its_chief(self, tensorflow_children: Zygote, tmp_path: Path) -> None:
        child = tensorflow_children.start("waiting_worker")
        child.wait_for("waiting")

        child.send(signal.SIGTERM)

        assert child.wait(QUICKLY_SECS) == -signal.SIGTERM, child.output

    @pytest.mark.parametrize("loop", ["stuck", "blocked"])
    def test_a_second_time_ends_the_process_at_once(
        self, tensorflow_children: Zygote, tmp_path: Path, loop: str
    ) -> None:
        child = start(tensorflow_children, tmp_path, loop, stop_grace_secs=3600)
        child.send(signal.SIGTERM)
        wait_until(
            lambda: any("SIGTERM" in one["text"] for one in child.reports("warning")), "the notice of the first one"
        )
        assert child.poll() is None

        child.send(signal.SIGTERM)

        assert child.wait(QUICKLY_SECS) in (-signal.SIGTERM, 128 + signal.SIGTERM)

    def test_finds_a_handler_of_the_programs_own_left_alone(self, tensorflow_children: Zygote, tmp_path: Path) -> None:
        child = tensorflow_children.start("with_own_handler", logdir=str(tmp_path))
        child.wait_for("stepped")

        child.send(signal.SIGTERM)

        child.wait_for("own handler")
        steps = len(child.reports("stepped"))
        child.wait_for("stepped", count=steps + 5)
        assert [one["is_own"] for one in child.reports("handlers")] == [True, True]
        child.kill()

    def test_is_nothing_to_a_supervisor_outside_the_main_thread(
        self, tensorflow_children: Zygote, tmp_path: Path
    ) -> None:
        child = tensorflow_children.start("outside_the_main_thread", logdir=str(tmp_path))
        child.wait_for("stepped")

        child.send(signal.SIGTERM)

        assert child.wait(QUICKLY_SECS) == -signal.SIGTERM
        assert all(one["is_default"] and not one["wakes"] for one in child.reports("handlers"))
        assert child.reports("left") == []

    def test_ends_the_process_as_ever_when_told_not_to_stop_on_it(
        self, tensorflow_children: Zygote, tmp_path: Path
    ) -> None:
        child = start(tensorflow_children, tmp_path, "never asks", stop_on_sigterm=False)

        child.send(signal.SIGTERM)

        assert child.wait(QUICKLY_SECS) == -signal.SIGTERM
        assert all(one["is_default"] and not one["wakes"] for one in child.reports("handlers"))
        assert child.reports("left") == []

    def test_is_the_systems_again_after_the_run(self, tensorflow_children: Zygote, tmp_path: Path) -> None:
        child = start(tensorflow_children, tmp_path, "never asks")

        child.send(signal.SIGINT)

        assert child.wait(QUICKLY_SECS) == -signal.SIGINT
        before, inside, after = child.reports("handlers")
        assert inside["wakes"]
        assert not inside["is_default"]
        for outside in (before, after):
            assert outside["is_default"]
            assert not outside["wakes"]


class TestCtrlC:
    @pytest.mark.parametrize("loop", ["never asks", "swallows"])
    def test_leaves_the_block_as_itself_after_the_last_step_was_saved(
        self, tensorflow_children: Zygote, tmp_path: Path, loop: str
    ) -> None:
        child = start(tensorflow_children, tmp_path, loop)

        child.send(signal.SIGINT)

        assert child.wait(QUICKLY_SECS) == -signal.SIGINT
        assert [one["by"] for one in child.reports("left")] == ["KeyboardInterrupt"]
        assert_all_steps_saved(child, tmp_path)

    def test_reaches_the_programs_own_except(self, tensorflow_children: Zygote, tmp_path: Path) -> None:
        child = tensorflow_children.start("catching_ctrl_c", logdir=str(tmp_path))
        child.wait_for("stepped")

        child.send(signal.SIGINT)

        assert child.wait(QUICKLY_SECS) == 0, child.output
        assert child.reports("caught")
        assert_all_steps_saved(child, tmp_path)


class TestSigstop:
    @pytest.mark.parametrize("at", [1, 4, 8, 12, 16, 20])
    def test_during_a_save_only_delays_it(self, fake_children: Zygote, tmp_path: Path, at: int) -> None:
        child = fake_children.start("train", logdir=str(tmp_path / "run"), how="stop", at=at)
        child.wait_for("stopping")
        wait_until(lambda: child.state() == "T", "the stop")
        saved = len(child.reports("saved"))
        # What a stopped process does not do, no time makes it do: this is how long it is stopped, and no more.
        time.sleep(0.1)
        assert len(child.reports("saved")) == saved

        child.send(signal.SIGCONT)

        child.wait_for("saved", count=saved + 3)
        child.kill()
        again = fake_children.start("train", logdir=str(tmp_path / "run"))
        resumed = again.wait_for("start")
        assert resumed["good"]
        assert resumed["step"] >= child.reports("saved")[-1]["step"]
        assert again.reports("damage") == []
        again.kill()

    def test_at_random_times_only_delays_a_tensorflow_run(self, tensorflow_children: Zygote, tmp_path: Path) -> None:
        child = tensorflow_children.start("train", logdir=str(tmp_path), options={"megabytes": 4})
        child.wait_for("saved")
        for _ in range(5):
            saved = len(child.reports("saved"))
            child.send(signal.SIGSTOP)
            wait_until(lambda: child.state() == "T", "the stop")
            child.send(signal.SIGCONT)
            child.wait_for("saved", count=saved + 1)

        child.send(signal.SIGTERM)

        assert child.wait(QUICKLY_SECS) == -signal.SIGTERM
        assert newest_saved(tmp_path) >= child.reports("saved")[-1]["step"]
