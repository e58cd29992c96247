"""Keys, streams and generators that steps use and that are not in the state are named at a restart; others are not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from stepguard.jax import Supervisor

TOLD = "the run has drawn random numbers from generators or keys that are not saved, and they begin anew"


def split_in_a_loop(sess, state):
    key = jax.random.key(1)
    for _ in sess.steps(max_steps=sess.global_step + 4):
        key, drawn = jax.random.split(key)
        sess.state = {**state, "w": jax.random.normal(drawn)}


def split_in_a_loop_of_its_own(sess, state):
    random_key, end = jax.random.PRNGKey(1), sess.global_step + 4
    while sess.global_step < end:
        with sess.step():
            noise = jax.random.normal(random_key)
            sess.state = {**state, "w": noise}
            random_key = jax.random.fold_in(random_key, 0)


def split_in_each_epoch(sess, state):
    key = jax.random.key(1)
    for _ in sess.epochs(sess.epoch + 2):
        key, drawn = jax.random.split(key)
        for step in sess.steps(range(3)):
            sess.state = {**state, "w": jax.random.normal(jax.random.fold_in(drawn, step))}


def drawn_from_streams(sess, state):
    rngs = nnx.Rngs(1)
    for _ in sess.steps(max_steps=sess.global_step + 4):
        sess.state = {**state, "w": jax.random.normal(rngs.noise())}


def folded_from_the_step(sess, state):
    root = key = jax.random.key(1)
    for step in sess.steps(max_steps=sess.global_step + 4):
        key = jax.random.fold_in(root, step)
        key, drawn = jax.random.split(key)
        sess.state = {**state, "w": jax.random.normal(drawn)}


def carried_beside_the_state(sess, state):
    key = sess.state["key"]
    for _ in sess.steps(max_steps=sess.global_step + 4):
        key, drawn = jax.random.split(key)
        sess.state = {**state, "w": jax.random.normal(drawn), "key": jax.random.clone(key)}


def streams_of_the_state(sess, _):
    rngs = sess.state["rngs"]
    start = nnx.Rngs(3)
    start.params()
    for _ in sess.steps(max_steps=sess.global_step + 4):
        sess.state = {**sess.state, "w": jax.random.normal(rngs.noise())}


def in_an_evaluation(sess, state):
    rngs = nnx.Rngs(1)
    for step in sess.steps(max_steps=sess.global_step + 4):
        sess.state = {**state, "w": jnp.ones(()) * step}
        with sess.evaluating():
            rngs.noise()


@pytest.mark.parametrize(
    ("program", "named"),
    [
        (split_in_a_loop, "key"),
        (split_in_a_loop_of_its_own, "random_key"),
        (split_in_each_epoch, "key"),
        (drawn_from_streams, "rngs.default"),
        (folded_from_the_step, None),
        (carried_beside_the_state, None),
        (streams_of_the_state, None),
        (in_an_evaluation, None),
    ],
)
def test_what_the_steps_draw_from_is_named_if_it_is_not_saved(program, named, tmp_path, caplog):
    for _ in range(2):
        state = {"w": jnp.zeros(()), "key": jax.random.key(5), "rngs": nnx.Rngs(2)}
        with Supervisor(tmp_path, save_summaries_secs=0).managed_session(state) as sess:
            program(sess, sess.state)

    found = [one.getMessage() for one in caplog.records if one.levelname == "WARNING" and TOLD in one.getMessage()]
    assert [one.removeprefix(f"{TOLD}: ").split(". ")[0] for one in found] == ([] if named is None else [named])
