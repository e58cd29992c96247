"""SIGKILL, 200 times in all: at every phase of a save, and at random times."""

from __future__ import annotations

import contextlib
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from zygote import Child, Zygote, wait_until


class Chain:
    """Runs on one logdir, each killed, each beginning where the one before was; and what must hold at each start."""

    def __init__(self, children: Zygote, logdir: Path) -> None:
        self._children = children
        self._logdir = logdir
        self.acknowledged = 0
        self.kills = 0

    def start(self, **arguments: Any) -> Child:
        child = self._children.start("train", logdir=str(self._logdir), **arguments)
        start = child.wait_for("start")
        assert start["good"], "the state after the restore is not that of its step"
        assert start["torn"] == []
        # A kill damages nothing: a warning would say that something good was given up.
        assert [one for one in child.reports() if "damaged" in one.get("text", "")] == []
        assert start["step"] >= self.acknowledged
        self.acknowledged = start["step"]
        return child

    def note_end(self, child: Child) -> None:
        """It was killed: what it had acknowledged by then must be there from now on."""
        assert child.wait() == -9, child.output
        self.kills += 1
        steps = [one["step"] for one in child.reports("saved")]
        assert steps == sorted(steps)
        self.acknowledged = max([self.acknowledged, *steps])

    def kill_at_every_call(self, **arguments: Any) -> None:
        """Kill at the first call of a save by which the disk changes, at the second, and so on to the last."""
        at = 1
        while True:
            child = self.start(how="die", at=at, **arguments)
            wait_until(partial(_is_over, child), "the kill, or a whole save")
            has_survived = bool(child.reports("survived"))
            if has_survived:
                # Unless the calls of the next save have brought it there meanwhile.
                with contextlib.suppress(ProcessLookupError):
                    child.send(9)
            self.note_end(child)
            if has_survived:
                return
            at += 1

    def kill_at_random(self, times: int, chance: random.Random, longest_secs: float, **arguments: Any) -> None:
        """Kill at any time after the start; sometimes before anything was saved, sometimes after much was."""
        for _ in range(times):
            child = self.start(**arguments)
            if saves := chance.randrange(4):
                child.wait_for("saved", count=saves)
            # Not a wait for a result: the moment of the kill is the test's input.
            time.sleep(chance.uniform(0, longest_secs))
            child.send(9)
            self.note_end(child)
        self.start(**arguments).kill()


def _is_over(child: Child) -> bool:
    return child.poll() is not None or bool(child.reports("survived"))


class TestTheFakeEngine:
    def test_killed_at_every_call_of_a_save_it_resumes(self, fake_children: Zygote, tmp_path: Path) -> None:
        chain = Chain(fake_children, tmp_path / "run")

        chain.kill_at_every_call()

        assert chain.kills >= 20

    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("times", [10, pytest.param(50, marks=pytest.mark.soak)])
    def test_killed_at_random_it_resumes(self, fake_children: Zygote, tmp_path: Path, times: int, threads: int) -> None:
        chain = Chain(fake_children, tmp_path / "run")

        chain.kill_at_random(times, random.Random(threads), 0.03, threads=threads)

        assert chain.kills == times
        assert chain.acknowledged > 0


class TestTensorFlow:
    def test_killed_at_every_call_of_a_save_it_resumes(self, tensorflow_children: Zygote, tmp_path: Path) -> None:
        chain = Chain(tensorflow_children, tmp_path / "run")

        chain.kill_at_every_call()

        assert chain.kills >= 40

    @pytest.mark.soak
    def test_without_a_step_killed_at_every_call_of_a_replacement_it_resumes(
        self, tensorflow_children: Zygote, tmp_path: Path
    ) -> None:
        chain = Chain(tensorflow_children, tmp_path / "run")

        chain.kill_at_every_call(options={"has_global_step": False, "global_step": None})

        assert chain.kills >= 40

    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("times", [4, pytest.param(12, marks=pytest.mark.soak)])
    def test_killed_at_random_it_resumes(
        self, tensorflow_children: Zygote, tmp_path: Path, times: int, threads: int
    ) -> None:
        chain = Chain(tensorflow_children, tmp_path / "run")

        chain.kill_at_random(times, random.Random(threads), 0.1, threads=threads, options={"megabytes": 4})

        assert chain.kills == times
        assert chain.acknowledged > 0
