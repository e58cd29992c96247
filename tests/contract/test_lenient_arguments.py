"""Arguments that look wrong, and with which TensorFlow's class runs to the end: ours does too, and warns of mistakes.

Each is trained with and resumed on both sides. The other way round, what fails there in the session fails here at
construction: departure "wrong_types".
"""

import logging
import types

import numpy as np
import pytest
import tensorflow as tf
from harness import OURS, THEIRS, counting_model, run, v1, wait_until


def float_step(dtype):
    def given(model):
        step = v1.get_variable("seen", shape=[], dtype=dtype, initializer=v1.zeros_initializer(), use_resource=False)
        counted = v1.assign(step, tf.cast(tf.cast(step, tf.int32) + 1, dtype))
        return {"global_step": step, "count": counted}

    return given


def fixed(**given):
    return lambda model: given


def another_graphs_tensor():
    with tf.Graph().as_default():
        return tf.constant(1)


class OnlyRestores:
    def __init__(self):
        self.saver_def = v1.train.Saver().saver_def

    def restore(self, session, path):
        raise AssertionError("nothing was saved")


# Warned of.
MISTAKES = {
    "a float global_step": float_step(tf.float32),
    "a double global_step": float_step(tf.float64),
    "a bool global_step": float_step(tf.bool),
    "save_model_secs True": fixed(save_model_secs=True),
    "save_model_secs negative": fixed(save_model_secs=-1),
    "save_model_secs nan": fixed(save_model_secs=float("nan")),
    "save_model_secs an array": fixed(save_model_secs=np.array(1)),
    "save_summaries_secs True": fixed(save_summaries_secs=True),
    "save_summaries_secs negative": fixed(save_summaries_secs=-0.5),
    "recovery_wait_secs None": fixed(recovery_wait_secs=None),
    "recovery_wait_secs negative": fixed(recovery_wait_secs=-1),
    "recovery_wait_secs a string": fixed(recovery_wait_secs="30"),
    "stop_grace_secs None, no services": fixed(stop_grace_secs=None, logdir=None),
    "stop_grace_secs negative, no services": fixed(stop_grace_secs=-1, logdir=None),
    "stop_grace_secs nan, no services": fixed(stop_grace_secs=float("nan"), logdir=None),
    "stop_grace_secs a string, no services": fixed(stop_grace_secs="5", logdir=None),
    "checkpoint_basename empty": fixed(checkpoint_basename=""),
    "summary_op nothing, never computed": lambda model: {"summary_op": tf.no_op(), "save_summaries_secs": 0},
    "summary_op a list, never computed": lambda model: {"summary_op": [tf.constant("")], "save_summaries_secs": 0},
    "summary_op nothing, no logdir": lambda model: {"summary_op": tf.no_op(), "logdir": None},
    "summary_op nothing, no writer": lambda model: {"summary_op": tf.no_op(), "summary_writer": None},
    "global_step of size 2, no logdir": lambda model: {"global_step": tf.constant([1, 2]), "logdir": None},
    "global_step a number, no writer": fixed(global_step=5, summary_writer=None),
    "checkpoint_basename a number, no logdir": fixed(checkpoint_basename=5, logdir=None),
    "saver without methods, no logdir": lambda model: {
        "saver": types.SimpleNamespace(saver_def=v1.train.Saver().saver_def),
        "logdir": None,
    },
    "ready_op of another graph, a session manager": lambda model: {
        "ready_op": another_graphs_tensor(),
        "session_manager": v1.train.SessionManager(),
    },
    "local_init_run_options of another type": fixed(local_init_run_options=v1.ConfigProto()),
}
# Not even that.
HARMLESS = {
    "save_model_secs False": fixed(save_model_secs=False),
    "save_summaries_secs False": fixed(save_summaries_secs=False),
    "stop_grace_secs True": fixed(stop_grace_secs=True),
    "stop_grace_secs of numpy": fixed(stop_grace_secs=np.float32(5.5)),
    "recovery_wait_secs False": fixed(recovery_wait_secs=False),
    "saver False": fixed(saver=False),
    "saver an empty list": fixed(saver=[]),
    "summary_writer False": fixed(summary_writer=False),
    "init_fn False": fixed(init_fn=False),
    "init_feed_dict False": fixed(init_feed_dict=False),
    "init_feed_dict a list without items": fixed(init_feed_dict=[]),
    "init_feed_dict another mapping": lambda model: {
        "init_feed_dict": types.MappingProxyType({tf.constant(1.0): 2.0}),
    },
    "local_init_run_options False": fixed(local_init_run_options=False),
    "logdir False": fixed(logdir=False),
    "saver that only restores, nothing saved": lambda model: {"saver": OnlyRestores(), "save_model_secs": 0},
}
WORKERS = {
    "init_op": fixed(init_op=7),
    "init_fn": fixed(init_fn="x"),
    "init_feed_dict": fixed(init_feed_dict=7),
    "summary_op": fixed(summary_op=7),
    "summary_op of another graph": lambda model: {"summary_op": another_graphs_tensor()},
    "global_step": lambda model: {"global_step": tf.constant([1, 2])},
    "saver": lambda model: {"saver": types.SimpleNamespace(saver_def=v1.train.Saver().saver_def)},
    "logdir": fixed(logdir=b"bytes"),
    "checkpoint_basename": fixed(checkpoint_basename=5),
    "save_model_secs": fixed(save_model_secs="often"),
}


def trained(given):
    """Train in a session that lasts until every service has done something; where it began, and whether it ended."""

    def scenario(side, logdir):
        found = []
        for _ in range(2):
            with tf.Graph().as_default():
                model = counting_model()
                options = {"logdir": logdir, "save_model_secs": 0.05, "save_summaries_secs": 0.05, "stop_grace_secs": 5}
                options.update(given(model))
                step = [model.train_op, options.pop("count", tf.no_op())]
                sv = side.Supervisor(**options)
                with sv.managed_session() as sess:
                    found.append(int(sess.run(model.global_step)) > 0)
                    for _ in range(3):
                        sess.run(step)
                    if options["logdir"] and options["save_model_secs"] and sv.saver:
                        wait_until(lambda: tf.train.latest_checkpoint(logdir))
        return found

    return scenario


def warnings_of_ours(given, tmp_path, caplog, scenario):
    theirs = run(scenario, THEIRS, tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "stepguard"):
        ours = run(scenario, OURS, tmp_path)
    return theirs, ours, [one.getMessage() for one in caplog.records if one.name.startswith("stepguard.tensorflow.arg")]


@pytest.mark.parametrize("name", [*MISTAKES, *HARMLESS])
def test_what_tensorflow_trains_with_trains_and_resumes_here(name, tmp_path, caplog):
    given = {**MISTAKES, **HARMLESS}[name]
    theirs, ours, warnings = warnings_of_ours(given, tmp_path, caplog, trained(given))
    assert len(theirs) == len(ours) == 2
    # Not less than there: the last step is saved here.
    assert ours >= theirs
    if OURS.name != "itself":
        assert (warnings != []) == (name in MISTAKES), warnings
        argument = next(word for word in name.split() if word not in ("a", "float", "double", "bool"))
        assert all(one.startswith(f"{argument}: expected ") for one in warnings), warnings


@pytest.mark.parametrize("name", WORKERS)
def test_what_a_worker_never_looks_at_may_be_anything(name, tmp_path, caplog):
    given = WORKERS[name]

    def scenario(side, logdir):
        server = v1.train.Server.create_local_server()
        model = counting_model()
        options = given(model)
        chief = side.Supervisor(save_summaries_secs=0, save_model_secs=0)
        worker = side.Supervisor(is_chief=False, recovery_wait_secs=0.05, **options)
        with chief.managed_session(server.target), worker.managed_session(server.target) as sess:
            sess.run(model.train_op)
            return int(sess.run(model.global_step))

    theirs, ours, warnings = warnings_of_ours(given, tmp_path, caplog, scenario)
    assert ours == theirs == 1
    if OURS.name != "itself":
        (warning,) = warnings
        assert warning.startswith(f"{name.split()[0]}: expected")
        assert warning.endswith("It is not used here")


@pytest.mark.skipif(OURS.name == "itself", reason="of ours alone")
def test_a_float_global_step_names_the_checkpoints_and_resumes_from_them(tmp_path):
    def scenario(side, logdir):
        found = []
        for _ in range(2):
            with tf.Graph().as_default():
                step = v1.get_variable("global_step", [], initializer=v1.constant_initializer(0), trainable=False)
                train = v1.assign_add(step, 1)
                sv = side.Supervisor(logdir=logdir, global_step=step, save_summaries_secs=0)
                with sv.managed_session() as sess:
                    found.append(float(sess.run(step)))
                    for _ in range(4):
                        sess.run(train)
        return found, tf.train.latest_checkpoint(logdir) == f"{logdir}/model.ckpt-8"

    assert run(scenario, OURS, tmp_path) == ([0.0, 4.0], True)


def test_a_saver_that_is_to_keep_less_than_none_keeps_all(tmp_path, caplog):
    """Theirs removes each checkpoint right after it was written."""

    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor(logdir=logdir, saver=v1.train.Saver(max_to_keep=-1), save_model_secs=0.05)
        with sv.managed_session() as sess:
            sess.run(model.train_op)
            return int(sess.run(model.global_step))

    assert run(scenario, THEIRS, tmp_path) == run(scenario, OURS, tmp_path) == 1
    if OURS.name != "itself":
        assert tf.train.latest_checkpoint(tmp_path / OURS.name).endswith("model.ckpt-1")
        assert "saver: expected max_to_keep >= 0, found -1: all checkpoints are kept" in caplog.text


@pytest.mark.skipif(OURS.name == "itself", reason="of ours alone")
@pytest.mark.parametrize("first", [-6, 2**62])
def test_a_global_step_that_no_name_can_hold_is_resumed_all_the_same(first, tmp_path, caplog):
    def scenario(side, logdir):
        found = []
        for _ in range(2):
            with tf.Graph().as_default():
                initial = v1.constant_initializer(first, tf.int64)
                step = v1.get_variable("global_step", [], dtype=tf.int64, initializer=initial, trainable=False)
                train = v1.assign_add(step, 1)
                with side.Supervisor(logdir=logdir, save_summaries_secs=0).managed_session() as sess:
                    found.append(int(sess.run(step)) - first)
                    for _ in range(4):
                        sess.run(train)
        return found, tf.train.latest_checkpoint(logdir).removeprefix(f"{logdir}/")

    newest = "model.ckpt-2" if first == -6 else "model.ckpt"
    assert run(scenario, OURS, tmp_path) == ([0, 4], newest)
    assert "such steps are saved as model.ckpt" in caplog.text
