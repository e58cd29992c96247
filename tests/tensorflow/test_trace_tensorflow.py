"""TensorFlow: the scalars that steps return are compared when the steps are done again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from stepguard.options import Guarding, Saving, Watching
from stepguard.tensorflow import Supervisor
from stepguard.watching import ledger, trace
from stepguard.watching.trace import Mark, Record

v1 = tf.compat.v1


class CrashError(Exception):
    """Ends a run without a last checkpoint, as a kill does."""


class Program:
    """Fits a number to a constant; ``runs`` runs that train make one step, of which the last raises the counter."""

    def __init__(self, logdir: Path, *, runs: int = 1, **options: Any) -> None:
        with tf.Graph().as_default():
            self.step = v1.train.get_or_create_global_step()
            self.given = v1.placeholder_with_default(0.5, [], name="given")
            x = v1.get_variable("x", initializer=5.0, use_resource=True)
            self.loss = tf.square(x - self.given, name="loss")
            optimizer = v1.train.GradientDescentOptimizer(0.01)
            self.train = optimizer.minimize(self.loss, global_step=self.step)
            with tf.control_dependencies([self.train]):
                self.after = self.step.read_value()
            self.others = [optimizer.minimize(self.loss) for _ in range(runs - 1)]
            saving = Saving(save_model_secs=0, save_model_steps=10, save_at_end=False)
            self.sv = Supervisor(logdir=str(logdir), saving=saving, **options)

    def run(
        self,
        until: int,
        *,
        crashes: bool = False,
        feed: Callable[[int], float] | None = None,
        each: Callable[[Any, int, float], object] | None = None,
    ) -> None:
        with self.sv.managed_session() as sess:
            step = int(sess.run(self.step))
            while step < until:
                feeds = None if feed is None else {self.given: np.float32(feed(step))}
                for one in self.others:
                    sess.run(one)
                _, loss, step = sess.run([self.train, self.loss, self.after], feeds)
                if each is not None:
                    each(sess, int(step), float(loss))
            if crashes:
                self.sv._saving.writer.drain(30)
                raise CrashError


def crash_and_go_on(
    logdir: Path, *, then: dict[str, Any], now: dict[str, Any], runs: int = 1, **options: Any
) -> dict[str, Any] | None:
    with pytest.raises(CrashError):
        Program(logdir, runs=runs, **options).run(17, crashes=True, **then)
    Program(logdir, runs=runs, **options).run(25, **now)
    found = [one for one in ledger.read(logdir) if one["event"] == "replay"]
    assert len(found) <= 1
    return found[0] if found else None


def test_the_same_scalars_are_the_same_steps(tmp_path: Path) -> None:
    found = crash_and_go_on(tmp_path, then={}, now={})
    assert found is not None
    assert found["message"] == "steps 10 to 16 were done again: bit for bit the same (loss:0)"


def test_a_scalar_that_differs_names_its_step(tmp_path: Path) -> None:
    found = crash_and_go_on(tmp_path, then={}, now={"feed": lambda step: 0.5 + (step == 13) / 2**20})
    assert found is not None
    assert (found["outcome"], found["differs_at"], found["cause"]) == ("differs", 13, None)


def test_with_digests_what_was_fed_is_named(tmp_path: Path) -> None:
    found = crash_and_go_on(
        tmp_path,
        then={"feed": lambda step: 0.5},
        now={"feed": lambda step: 0.5 + (step >= 13)},
        watching=Watching(trace="batches"),
    )
    assert found is not None
    assert (found["differs_at"], found["cause"]) == (13, "data")
    assert "batch[given:0] of the feeds differs" in found["message"]


def test_the_guard_and_the_trace_look_at_the_same_run(tmp_path: Path) -> None:
    found = crash_and_go_on(tmp_path, then={}, now={}, guarding=Guarding(nan_guard="stop"))
    assert found is not None
    assert (found["outcome"], found["compared"]) == ("same", 7)


def test_several_runs_for_each_step_are_matched_by_their_checkpoint(tmp_path: Path) -> None:
    found = crash_and_go_on(tmp_path, then={}, now={}, runs=3)
    assert found is not None
    assert (found["outcome"], found["compared"]) == ("same", 7)
    marks = [one for one in trace.read(tmp_path) if isinstance(one, Mark)]
    assert (marks[0].step, marks[0].checkpoint_step) == (30, 10)


def test_summaries_that_the_program_computes_are_compared_too(tmp_path: Path) -> None:
    def told(shift: float) -> dict[str, Any]:
        def each(sess: Any, step: int, loss: float) -> None:
            value = v1.Summary.Value(tag="accuracy", simple_value=step / 100 + shift * (step == 15))
            program.sv.summary_computed(sess, v1.Summary(value=[value]), step)

        return {"each": each}

    program = Program(tmp_path)
    with pytest.raises(CrashError):
        program.run(17, crashes=True, **told(0.0))
    program = Program(tmp_path)
    program.run(25, **told(1.0))
    (found,) = [one for one in ledger.read(tmp_path) if one["event"] == "replay"]
    assert (found["outcome"], found["differs_at"]) == ("differs", 15)
    assert "accuracy 0.150000 then, 1.15000 now" in found["message"]


def test_a_run_that_trains_nothing_is_no_step(tmp_path: Path) -> None:
    program = Program(tmp_path)
    program.run(3, each=lambda sess, step, loss: sess.run(program.loss))
    records = [one for one in trace.read(tmp_path) if isinstance(one, Record)]
    assert [(one.step, list(one.values)) for one in records] == [(step, ["loss:0"]) for step in range(3)]


def test_after_a_return_of_the_guard_the_count_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    spoiled: list[int] = []

    def feed(step: int) -> float:
        if step == 14 and not spoiled:
            spoiled.append(step)
            return float("nan")
        return 0.5 + len(spoiled)

    program = Program(tmp_path, guarding=Guarding(nan_guard="return"))
    with pytest.raises(CrashError):
        program.run(17, crashes=True, feed=feed, each=lambda sess, step, loss: program.sv._saving.writer.drain(30))
    Program(tmp_path).run(25, feed=lambda step: 1.5)
    (found,) = [one for one in ledger.read(tmp_path) if one["event"] == "replay"]
    assert found["message"] == "steps 10 to 16 were done again: bit for bit the same (loss:0)"
