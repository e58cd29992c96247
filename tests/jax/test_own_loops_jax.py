"""Loops of the program's own around `sess.step()`: the work between two steps counts once."""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp

from stepguard.jax import Supervisor
from stepguard.options import Saving

STEPS = 7


def outcome(logdir, draw, left=None):
    """The batches, and the state at the end, of a program that is stopped in its step ``left``, as after SIGTERM."""
    random.seed(1)
    sv = Supervisor(logdir, save_summaries_secs=0, saving=Saving(save_model_secs=0, save_at_end=True))
    batches = {}
    with sv.managed_session({"weight": jnp.ones(2), "average": jnp.zeros(2), "key": jax.random.key(0)}) as sess:
        scale = random.random()
        while sess.global_step < STEPS:
            x = draw(sess) * scale
            with sess.step() as step:
                batches[step] = x
                sess.state = {**sess.state, "weight": 0.9 * sess.state["weight"] + x}
                if step == left:
                    sess.boundary.stop(lambda: False)
                    sv.request_stop()
            sess.state = {**sess.state, "average": 0.5 * sess.state["average"] + sess.state["weight"]}
    return batches, {name: sess.state[name].tolist() for name in ("weight", "average")}


def of_python(sess):
    return random.random()


def of_the_key(sess):
    key, drawn = jax.random.split(sess.state["key"])
    sess.state = {**sess.state, "key": key}
    return float(jax.random.normal(drawn))


def test_the_work_between_two_steps_counts_once(tmp_path, caplog):
    whole, state = outcome(tmp_path / "whole", of_python)
    first, _ = outcome(tmp_path / "left", of_python, left=3)
    second, found = outcome(tmp_path / "left", of_python)

    assert ({**first, **second}, found) == (whole, state)
    assert min(second) == 4
    assert not [one for one in caplog.records if one.levelname == "WARNING"]


def test_a_key_of_the_state_that_was_split_before_the_block_is_told_of(tmp_path, caplog):
    outcome(tmp_path, of_the_key, left=3)
    assert "takes something from" not in caplog.text
    outcome(tmp_path, of_the_key)
    assert "takes something from ['key'] between two steps of its own loop" in caplog.text
