"""The constructor, the signatures, and what the properties say, on both sides."""

import inspect

import pytest
import tensorflow as tf
from harness import (
    OURS,
    PROPERTIES,
    SIDES,
    THEIRS,
    assert_same,
    collections,
    counting_model,
    files,
    operations,
    outcome,
    properties,
    shown,
    v1,
)

METHODS = {
    "prepare_or_wait_for_session": "PrepareSession",
    "start_standard_services": "StartStandardServices",
    "start_queue_runners": "StartQueueRunners",
    "loop": "Loop",
    "stop": "Stop",
    "request_stop": "RequestStop",
    "should_stop": "ShouldStop",
    "stop_on_exception": "StopOnException",
    "summary_computed": "SummaryComputed",
    "wait_for_stop": "WaitForStop",
    "managed_session": None,
}


def parameters(function):
    """(name, default) of each parameter that can be given by position."""
    return [
        (parameter.name, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]


def test_the_constructor_takes_the_same_arguments_in_the_same_order_with_the_same_defaults():
    assert parameters(OURS.Supervisor.__init__) == parameters(THEIRS.Supervisor.__init__)


def test_whatever_else_the_constructor_takes_is_keyword_only_and_has_a_default():
    known = dict(parameters(OURS.Supervisor.__init__))
    for parameter in inspect.signature(OURS.Supervisor.__init__).parameters.values():
        if parameter.name not in known:
            assert parameter.kind is parameter.KEYWORD_ONLY
            assert parameter.default is not parameter.empty


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_the_same_arguments_in_both_spellings(method):
    theirs = parameters(getattr(THEIRS.Supervisor, method))
    assert parameters(getattr(OURS.Supervisor, method)) == theirs
    if METHODS[method]:
        assert parameters(getattr(OURS.Supervisor, METHODS[method])) == theirs


@pytest.mark.parametrize("method", ["prepare_session", "recover_session", "wait_for_session", "__init__"])
def test_a_method_of_the_session_manager_takes_the_same_arguments(method):
    assert parameters(getattr(OURS.SessionManager, method)) == parameters(getattr(THEIRS.SessionManager, method))


def test_every_public_name_of_theirs_is_one_of_ours():
    public = {name for name in dir(THEIRS.Supervisor) if not name.startswith("_")}
    assert public <= set(dir(OURS.Supervisor))
    assert {name for name in dir(THEIRS.SessionManager) if not name.startswith("_")} <= set(dir(OURS.SessionManager))


def test_use_default_is_zero():
    assert [side.Supervisor.USE_DEFAULT for side in SIDES] == [0, 0]


@pytest.mark.parametrize("name", [*PROPERTIES, "coord", "session_manager"])
def test_a_property_cannot_be_assigned(name, tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        return outcome(lambda: setattr(sv, name, None))

    assert assert_same(scenario, tmp_path) == ("raised", "AttributeError")


@pytest.mark.parametrize("is_chief", [True, False])
@pytest.mark.parametrize("where", [None, "", "LOGDIR", "LOGDIR/a/b"])
@pytest.mark.parametrize("secs", [{}, {"save_model_secs": 0, "save_summaries_secs": 0}, {"save_model_secs": None}])
def test_the_properties_of_a_new_supervisor(is_chief, where, secs, tmp_path):
    def scenario(side, logdir):
        counting_model()
        chosen = where and where.replace("LOGDIR", logdir)
        sv = side.Supervisor(is_chief=is_chief, logdir=chosen, **secs)
        # Departure "event_file_of_a_new_supervisor".
        return properties(sv, logdir), [name for name in files(logdir) if "tfevents" not in name]

    assert_same(scenario, tmp_path)


@pytest.mark.parametrize("is_chief", [1, 0, "yes", None])
def test_is_chief_is_what_was_given(is_chief, tmp_path):
    def scenario(side, logdir):
        counting_model()
        return bool(side.Supervisor(is_chief=is_chief).is_chief)

    assert_same(scenario, tmp_path)


def test_the_checkpoint_basename_ends_the_save_path(tmp_path):
    def scenario(side, logdir):
        counting_model()
        return properties(side.Supervisor(logdir=logdir, checkpoint_basename="net"), logdir)["save_path"]

    assert assert_same(scenario, tmp_path) == "LOGDIR/net"


def test_the_defaults_are_built_in_the_same_order_under_the_same_names(tmp_path):
    def scenario(side, logdir):
        counting_model()
        before = len(operations(v1.get_default_graph()))
        side.Supervisor(logdir=logdir)
        return operations(v1.get_default_graph())[before:], collections(v1.get_default_graph())

    assert_same(scenario, tmp_path)


def test_a_graph_without_variables_gets_no_saver(tmp_path):
    def scenario(side, logdir):
        tf.constant(1)
        sv = side.Supervisor(logdir=logdir)
        return properties(sv, logdir), collections(v1.get_default_graph())

    assert assert_same(scenario, tmp_path)[0]["saver"] is None


DEFAULTED = ("ready_op", "ready_for_local_init_op", "init_op", "local_init_op", "saver", "summary_op", "global_step")


@pytest.mark.parametrize("argument", DEFAULTED)
def test_none_means_none_and_builds_nothing(argument, tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, **{argument: None})
        graph = v1.get_default_graph()
        return properties(sv, logdir), collections(graph), operations(graph)

    record = assert_same(scenario, tmp_path)
    if argument != "local_init_op":
        assert record[0][argument] is None


@pytest.mark.parametrize("argument", DEFAULTED)
def test_an_explicit_use_default_is_the_default(argument, tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, **{argument: side.Supervisor.USE_DEFAULT})
        return properties(sv, logdir), operations(v1.get_default_graph())

    assert_same(scenario, tmp_path)


def test_what_is_given_is_what_the_properties_return(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        given = {
            "ready_op": v1.report_uninitialized_variables(name="mine"),
            "ready_for_local_init_op": tf.constant([], tf.string),
            "init_op": v1.global_variables_initializer(),
            "init_feed_dict": {},
            "saver": v1.train.Saver(),
            "summary_op": v1.summary.merge_all(),
            "global_step": model.global_step,
            "summary_writer": v1.summary.FileWriter(logdir),
            "save_summaries_secs": 7,
            "save_model_secs": 8.5,
            "session_manager": side.SessionManager(),
        }
        sv = side.Supervisor(logdir=logdir, **given)
        given["summary_writer"].close()
        return {name: getattr(sv, name) is value for name, value in given.items()}

    assert set(assert_same(scenario, tmp_path).values()) == {True}


def test_all_arguments_by_position(tmp_path):
    def scenario(side, logdir):
        counting_model()
        default = side.Supervisor.USE_DEFAULT
        sv = side.Supervisor(
            v1.get_default_graph(),
            default,  # ready_op
            default,  # ready_for_local_init_op
            True,
            default,  # init_op
            {"a:0": 1},
            default,  # local_init_op
            logdir,
            default,  # summary_op
            default,  # saver
            default,  # global_step
            11,
            22,
            33,
            44,
            "base",
            None,  # session_manager
            default,  # summary_writer
            None,  # init_fn
            None,  # local_init_run_options
        )
        return properties(sv, logdir)

    record = assert_same(scenario, tmp_path)
    assert (record["save_summaries_secs"], record["save_model_secs"]) == (11, 22)
    assert record["save_path"] == "LOGDIR/base"


def test_another_graph_than_the_default_one_can_be_given(tmp_path):
    def scenario(side, logdir):
        graph = tf.Graph()
        with graph.as_default():
            counting_model()
        sv = side.Supervisor(graph, logdir=logdir)
        default = v1.get_default_graph()
        with sv.managed_session(start_standard_services=False) as sess:
            in_session = sess.graph is graph
        return graph.finalized, default.finalized, operations(default), properties(sv, logdir), in_session

    assert assert_same(scenario, tmp_path)[:3] == (True, False, [])


@pytest.mark.parametrize("is_chief", [True, False])
def test_the_graph_is_finalised(is_chief, tmp_path):
    def scenario(side, logdir):
        counting_model()
        side.Supervisor(logdir=logdir, is_chief=is_chief)
        return v1.get_default_graph().finalized

    assert assert_same(scenario, tmp_path) is True


def test_a_finalised_graph_is_taken_if_nothing_has_to_be_built(tmp_path):
    def scenario(side, logdir):
        counting_model()
        first = side.Supervisor(logdir=logdir)
        return outcome(lambda: properties(side.Supervisor(logdir=logdir), logdir)), properties(first, logdir)

    assert_same(scenario, tmp_path)


def test_a_finalised_graph_is_refused_if_something_has_to_be_built(tmp_path):
    def scenario(side, logdir):
        counting_model()
        v1.get_default_graph().finalize()
        return outcome(lambda: side.Supervisor(logdir=logdir))

    assert assert_same(scenario, tmp_path) == ("raised", "RuntimeError")


@pytest.mark.parametrize("side", SIDES, ids=lambda side: side.name)
def test_eager_execution_is_refused(side):
    assert tf.executing_eagerly()
    with pytest.raises(RuntimeError):
        side.Supervisor()


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64, tf.float32])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_default_global_step_is_the_integer_of_that_name(dtype, shape, tmp_path):
    def scenario(side, logdir):
        with v1.variable_scope("", use_resource=False):
            v1.get_variable("global_step", shape=shape, dtype=dtype, initializer=v1.zeros_initializer())
        sv = side.Supervisor()
        return shown(sv.global_step), shown(v1.get_collection(v1.GraphKeys.GLOBAL_STEP))

    expected = (None, []) if dtype == tf.float32 else ("global_step:0", ["global_step:0"])
    assert assert_same(scenario, tmp_path) == expected


def test_a_worker_needs_a_device_for_its_reference_variables(tmp_path):
    def scenario(side, logdir):
        counting_model(resource=False)
        return outcome(lambda: side.Supervisor(is_chief=False)), v1.get_default_graph().finalized

    assert assert_same(scenario, tmp_path) == (("raised", "ValueError"), False)


def test_a_worker_with_devices_is_built(tmp_path):
    def scenario(side, logdir):
        with tf.device("/job:ps/task:0"):
            counting_model(resource=False)
        return properties(side.Supervisor(is_chief=False), logdir)

    assert_same(scenario, tmp_path)


def test_a_check_before_local_init_needs_a_local_init(tmp_path):
    def scenario(side, logdir):
        check = tf.constant([], tf.string)
        return outcome(lambda: side.Supervisor(local_init_op=None, ready_for_local_init_op=check))

    assert assert_same(scenario, tmp_path) == ("raised", "ValueError")
