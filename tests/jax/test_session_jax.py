"""The front door: what it takes, and what it refuses."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from stepguard.jax import Supervisor
from stepguard.options import Restoring, Watching

STATE = {"weight": jnp.zeros(2)}


def test_a_second_session_is_refused_while_the_first_runs(tmp_path):
    sv = Supervisor(tmp_path)
    with sv.managed_session(STATE), pytest.raises(RuntimeError, match="a session that still runs"):
        sv.prepare_or_wait_for_session(STATE)


def test_init_fn_gives_the_first_state_and_is_not_called_for_a_restored_one(tmp_path):
    for begin in (0, 3):
        sv = Supervisor(tmp_path, init_fn=lambda state: {"weight": state["weight"] + 7})
        with sv.managed_session(STATE) as session:
            assert session.global_step == begin
            assert session.state["weight"].tolist() == [7 + begin] * 2
            for _ in session.steps(max_steps=3):
                session.state = {"weight": session.state["weight"] + 1}


@pytest.mark.parametrize("is_in_steps", [True, False])
def test_a_loop_that_is_not_of_the_session_is_told_of_at_its_end(is_in_steps, tmp_path, caplog):
    with Supervisor(tmp_path).managed_session(STATE) as session:
        for _ in session.steps(max_steps=3) if is_in_steps else range(3):
            session.state = {"weight": session.state["weight"] + 1}
    assert ("ends at step 0, where it began, and the program has trained in it" in caplog.text) != is_in_steps


def test_work_between_loops_that_is_done_again_does_not_count_twice(tmp_path):
    """A loop over epochs of the program's own does its work after the first loop again; the restored state has it."""

    def train(loops):
        data = [1, 2]
        with Supervisor(tmp_path, save_model_secs=3600).managed_session(STATE) as session:
            for epoch in range(loops):
                for _ in session.steps(data, epochs=epoch + 1):
                    session.state = {"weight": session.state["weight"] + 1}
                session.state = {"weight": session.state["weight"] * 10}
        return session.state["weight"].tolist()

    assert train(2) == [220.0, 220.0]
    assert train(3) == [2220.0, 2220.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"restoring": Restoring(hyperparameters="program")}, "hyperparameters"),
        ({"watching": Watching(peer_timeout_secs=5)}, "peer_timeout_secs"),
        ({"init_fn": 3}, "init_fn must be a function of the state"),
        ({"logdir": 3}, "logdir must be a path"),
        ({"summary_writer": 3}, "add_scalar"),
    ],
)
def test_what_means_nothing_is_refused(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Supervisor(**given)
