"""A function that makes batches may draw from generators that it holds: a restart goes on with them."""

from __future__ import annotations

import functools
import random

import jax.numpy as jnp
import numpy as np
import pytest

from stepguard.jax import Supervisor


class Source:
    def __init__(self):
        self.rng = np.random.RandomState(1)

    def batches(self):
        yield from (float(one) for one in self.rng.permutation(6))


def in_a_closure():
    rng = np.random.default_rng(0)

    def batches():
        for one in rng.permutation(6):
            yield float(one) + rng.random() / 2

    return batches, rng.random


def of_an_object():
    return Source().batches, lambda: 0.0


def of_an_argument():
    rng = random.Random(2)
    return functools.partial(lambda source: [source.random() for _ in range(6)], rng), lambda: 0.0


def drawn_from_by_the_steps_too():
    rng = np.random.default_rng(0)
    return lambda: [float(one) for one in rng.permutation(6)], rng.random


def run(logdir, build, until):
    batches, draw = build()
    if build is in_a_closure:
        draw = float
    seen = {}
    with Supervisor(logdir, save_summaries_secs=0).managed_session({"w": jnp.zeros(())}) as sess:
        for x in sess.steps(batches, max_steps=until):
            sess.state = {"w": sess.state["w"] + x}
            seen[sess.global_step] = x, draw()
    return seen


@pytest.mark.parametrize("build", [in_a_closure, of_an_object, of_an_argument, drawn_from_by_the_steps_too])
def test_the_run_goes_on_with_them(build, tmp_path, caplog):
    whole = run(tmp_path / "whole", build, 20)
    found = {}
    for until in (6, 10, 11, 20):  # At the end of an epoch, inside of one, and inside of the same.
        found |= run(tmp_path / "parts", build, until)

    assert found == whole
    assert not [one for one in caplog.records if one.levelname == "WARNING"]


def two_loops(logdir, until):
    rng = np.random.default_rng(0)
    first, second = (lambda: list(rng.random(3))), (lambda: list(rng.random(2)))
    seen = []
    with Supervisor(logdir, save_summaries_secs=0).managed_session({"w": jnp.zeros(())}) as sess:
        for _ in sess.epochs(until):
            for loader in (first, second):
                for x in sess.steps(loader):
                    sess.state = {"w": sess.state["w"] + x}
                    seen.append(x)
    return seen


def test_two_loops_that_share_one_go_on_with_it(tmp_path):
    whole = two_loops(tmp_path / "whole", 5)

    assert (
        two_loops(tmp_path / "parts", 2) + two_loops(tmp_path / "parts", 3) + two_loops(tmp_path / "parts", 5) == whole
    )
