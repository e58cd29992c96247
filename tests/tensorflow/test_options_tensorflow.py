"""Where the contract's arguments, TensorFlow's own objects and the groups meet."""

from __future__ import annotations

import os
from typing import Any

import pytest
import tensorflow as tf

from stepguard.options import Restoring, Saving, Stopping, Watching
from stepguard.tensorflow import Supervisor

v1 = tf.compat.v1


class Manager:
    """A session manager of the program's own."""

    def prepare_session(self, *_: Any, **__: Any) -> None:
        """Never called."""


@pytest.fixture(autouse=True)
def model():
    with tf.Graph().as_default():
        v1.train.get_or_create_global_step()
        yield


@pytest.mark.parametrize(
    ("given", "twice"),
    [
        ({"stop_grace_secs": 5, "stopping": Stopping(stop_grace_secs=6)}, "stop_grace_secs"),
        ({"checkpoint_basename": "net", "saving": Saving(checkpoint_basename="net")}, "checkpoint_basename"),
    ],
)
def test_an_argument_of_the_contract_is_given_in_one_way(given, twice):
    with pytest.raises(TypeError, match=f"{twice} is given twice"):
        Supervisor(**given)


def test_an_argument_of_the_contract_by_position_is_seen_too():
    sv = Supervisor()
    by_position = [sv.USE_DEFAULT] * 2
    with tf.Graph().as_default(), pytest.raises(TypeError, match="save_model_secs is given twice"):
        Supervisor(None, *by_position, True, 0, None, 0, None, 0, 0, 0, 120, 60, saving=Saving(save_model_secs=30))


def test_the_basename_of_the_group_names_the_checkpoints(tmp_path):
    sv = Supervisor(logdir=tmp_path, summary_writer=None, saving=Saving(checkpoint_basename="net"))
    assert sv.save_path == os.path.join(tmp_path, "net")


@pytest.mark.parametrize("option", [{"max_to_keep": 5}, {"keep_checkpoint_every_n_hours": 1}])
def test_how_many_checkpoints_are_kept_is_for_the_saver_to_say(option, tmp_path):
    with pytest.raises(ValueError, match=rf"Saving\({next(iter(option))}=.*train\.Saver"):
        Supervisor(logdir=tmp_path, saving=Saving(**option))


@pytest.mark.parametrize(
    "given",
    [{"watching": Watching(peer_timeout_secs=5)}, {"restoring": Restoring(start_over_when_all_damaged=True)}],
)
def test_what_a_session_manager_of_the_program_would_not_do_is_refused(given, tmp_path):
    with pytest.raises(ValueError, match="session manager that was given"):
        Supervisor(logdir=tmp_path, session_manager=Manager(), **given)
