"""SessionManager by itself, and how a Supervisor calls the one that it is given."""

import threading

import pytest
import tensorflow as tf
from harness import RecordingManager, assert_same, counting_model, outcome, v1


def saved_model(logdir, steps=3):
    """Train in a graph of its own, save at the end, and return the prefix."""
    with tf.Graph().as_default():
        model = counting_model()
        saver = v1.train.Saver()
        with v1.Session() as sess:
            sess.run(v1.global_variables_initializer())
            for _ in range(steps):
                sess.run(model.train_op)
            tf.io.gfile.makedirs(logdir)
            return saver.save(sess, f"{logdir}/model.ckpt", global_step=model.global_step)


@pytest.mark.parametrize("is_chief", [True, False])
def test_a_given_manager_is_called_the_same_way(is_chief, tmp_path):
    def scenario(side, logdir):
        counting_model()
        real = side.SessionManager(local_init_op=v1.global_variables_initializer())
        manager = RecordingManager(real, logdir)
        sv = side.Supervisor(logdir=logdir, is_chief=is_chief, session_manager=manager, init_feed_dict={}, init_fn=repr)
        assert sv.session_manager is manager
        sv.prepare_or_wait_for_session("", max_wait_secs=5, start_standard_services=False).close()
        sv.stop()
        return manager.calls

    calls = assert_same(scenario, tmp_path)
    assert [name for name, _, _ in calls] == ["prepare_session" if is_chief else "wait_for_session"]


def test_every_argument_of_prepare_reaches_the_manager(tmp_path):
    def scenario(side, logdir):
        counting_model()
        manager = RecordingManager(side.SessionManager(), logdir)
        sv = side.Supervisor(logdir=logdir, session_manager=manager)
        config = v1.ConfigProto(allow_soft_placement=True)
        sess = sv.PrepareSession("", config, True, 0, False)
        sess.close()
        with sv.managed_session("", config, False):
            pass
        return manager.calls

    assert_same(scenario, tmp_path)


def test_a_manager_without_readiness_checks_replaces_those_of_the_supervisor(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, init_op=None, session_manager=side.SessionManager(local_init_op=tf.no_op()))
        with sv.managed_session(start_standard_services=False) as sess:
            return sess.run(sv.ready_op).tolist()

    assert_same(scenario, tmp_path)


def test_prepare_session_initialises(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        calls = []
        feed = v1.placeholder(tf.float32, [2])
        init = tf.group(v1.global_variables_initializer(), v1.assign(model.weights, feed))
        manager = side.SessionManager(local_init_op=tf.no_op(), ready_op=None)
        sess = manager.prepare_session(
            "", init_op=tf.group(model.weights.initializer, model.global_step.initializer), init_fn=calls.append
        )
        with sess:
            first = sess.run(model.weights).tolist()
        with manager.prepare_session("", init_op=init, init_feed_dict={feed: [5.0, 6.0]}) as sess:
            pass
        return first, [isinstance(call, v1.Session) for call in calls]

    assert assert_same(scenario, tmp_path) == ([0.0, 0.0], [True])


@pytest.mark.parametrize("by", ["dir", "filename"])
def test_prepare_session_restores_and_does_not_initialise(by, tmp_path):
    def scenario(side, logdir):
        prefix = saved_model(logdir)
        model = counting_model()
        where = {"checkpoint_dir": logdir} if by == "dir" else {"checkpoint_filename_with_path": prefix}
        called = []
        saver = v1.train.Saver()
        manager = side.SessionManager(ready_op=v1.report_uninitialized_variables())
        with manager.prepare_session(
            "", init_op=v1.global_variables_initializer(), saver=saver, init_fn=called.append, **where
        ) as sess:
            return sess.run(model.weights).tolist(), int(sess.run(model.global_step)), called

    assert assert_same(scenario, tmp_path) == ([3.0, 3.0], 3, [])


def test_a_restored_saver_goes_on_with_the_list_of_checkpoints(tmp_path):
    def scenario(side, logdir):
        saved_model(logdir)
        counting_model()
        saver = v1.train.Saver()
        side.SessionManager().prepare_session("", saver=saver, checkpoint_dir=logdir).close()
        return [path.replace(logdir, "LOGDIR") for path in saver.last_checkpoints]

    assert assert_same(scenario, tmp_path) == ["LOGDIR/model.ckpt-3"]


def test_both_places_to_restore_from_are_refused(tmp_path):
    def scenario(side, logdir):
        counting_model()
        saver = v1.train.Saver()
        manager = side.SessionManager()
        both = {"saver": saver, "checkpoint_dir": logdir, "checkpoint_filename_with_path": logdir + "/x"}
        return outcome(lambda: manager.prepare_session("", **both)), outcome(
            lambda: manager.recover_session("", **both)
        )

    assert assert_same(scenario, tmp_path) == (("raised", "ValueError"),) * 2


def test_a_checkpoint_that_is_not_there_is_a_value_error(tmp_path):
    def scenario(side, logdir):
        counting_model()
        where = {"saver": v1.train.Saver(), "checkpoint_filename_with_path": logdir + "/model.ckpt-7"}
        manager = side.SessionManager()
        return outcome(lambda: manager.recover_session("", **where)), outcome(
            lambda: manager.prepare_session("", init_op=v1.global_variables_initializer(), **where)
        )

    assert assert_same(scenario, tmp_path) == (("raised", "ValueError"),) * 2


def test_nothing_to_initialise_with_is_refused(tmp_path):
    def scenario(side, logdir):
        counting_model()
        return outcome(lambda: side.SessionManager().prepare_session(""))

    assert assert_same(scenario, tmp_path) == ("raised", "RuntimeError")


def test_an_initialisation_that_leaves_variables_out_is_refused_and_names_them(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        manager = side.SessionManager(ready_op=v1.report_uninitialized_variables())
        with pytest.raises(RuntimeError) as caught:
            manager.prepare_session("", init_op=model.global_step.initializer)
        return "weights" in str(caught.value)

    assert assert_same(scenario, tmp_path) is True


def test_a_model_that_is_not_ready_for_local_init_is_refused(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        manager = side.SessionManager(
            local_init_op=tf.no_op(), ready_for_local_init_op=v1.report_uninitialized_variables()
        )
        return outcome(lambda: manager.prepare_session("", init_op=model.global_step.initializer))

    assert assert_same(scenario, tmp_path) == ("raised", "RuntimeError")


def test_recover_session_says_whether_it_recovered(tmp_path):
    def scenario(side, logdir):
        tf.io.gfile.makedirs(logdir + "/empty")
        saved_model(logdir)
        model = counting_model()
        saver = v1.train.Saver()
        manager = side.SessionManager(ready_op=v1.report_uninitialized_variables())
        record = []
        for where in (logdir, logdir + "/empty", None):
            sess, recovered = manager.recover_session("", saver=saver, checkpoint_dir=where)
            with sess:
                record.append((recovered, int(sess.run(model.global_step)) if recovered else None))
        sess, recovered = manager.recover_session("", saver=None, checkpoint_dir=logdir)
        sess.close()
        return [*record, recovered]

    assert assert_same(scenario, tmp_path) == [(True, 3), (False, None), (False, None), False]


def test_recover_session_is_false_for_a_model_that_is_not_ready_after_it(tmp_path):
    def scenario(side, logdir):
        saved_model(logdir)
        counting_model()
        saver = v1.train.Saver()
        v1.get_variable("extra", shape=[])
        manager = side.SessionManager(ready_op=v1.report_uninitialized_variables())
        sess, recovered = manager.recover_session("", saver=saver, checkpoint_dir=logdir)
        sess.close()
        return recovered

    assert assert_same(scenario, tmp_path) is False


def test_local_init_is_run_with_its_feed_and_its_options(tmp_path):
    def scenario(side, logdir):
        feed = v1.placeholder(tf.float32, [])
        local = v1.get_variable("local", shape=[], collections=[v1.GraphKeys.LOCAL_VARIABLES])
        manager = side.SessionManager(
            local_init_op=v1.assign(local, feed),
            local_init_feed_dict={feed: 4.0},
            local_init_run_options=v1.RunOptions(trace_level=v1.RunOptions.NO_TRACE),
        )
        with manager.prepare_session("") as sess:
            return float(sess.run(local))

    assert assert_same(scenario, tmp_path) == 4.0


def test_wait_for_session_waits_until_another_session_has_initialised(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        init = v1.global_variables_initializer()
        ready = v1.report_uninitialized_variables()
        graph = v1.get_default_graph()
        server = v1.train.Server.create_local_server()
        manager = side.SessionManager(ready_op=ready, recovery_wait_secs=0.02)

        def initialise():
            with v1.Session(server.target, graph=graph) as sess:
                sess.run(init)

        chief = threading.Timer(0.1, initialise)
        chief.start()
        with manager.wait_for_session(server.target, max_wait_secs=60) as sess:
            weights = sess.run(model.weights).tolist()
        chief.join()
        return weights

    assert assert_same(scenario, tmp_path) == [0.0, 0.0]


def test_wait_for_session_gives_up(tmp_path):
    def scenario(side, logdir):
        counting_model()
        ready = v1.report_uninitialized_variables()
        manager = side.SessionManager(ready_op=ready, recovery_wait_secs=0.02)
        return outcome(lambda: manager.wait_for_session("", max_wait_secs=0.1))

    assert assert_same(scenario, tmp_path) == ("raised", "DeadlineExceededError")


def test_wait_for_session_runs_local_init(tmp_path):
    def scenario(side, logdir):
        local = v1.get_variable("local", initializer=2.0, collections=[v1.GraphKeys.LOCAL_VARIABLES], use_resource=True)
        manager = side.SessionManager(
            local_init_op=v1.local_variables_initializer(), ready_op=v1.report_uninitialized_variables()
        )
        with manager.wait_for_session("") as sess:
            return float(sess.run(local))

    assert assert_same(scenario, tmp_path) == 2.0


def test_prepare_session_waits_for_a_checkpoint(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        saver = v1.train.Saver()
        init = v1.global_variables_initializer()
        manager = side.SessionManager(recovery_wait_secs=0.02)
        other = threading.Timer(0.1, saved_model, [logdir])
        other.start()
        with manager.prepare_session(
            "", init_op=init, saver=saver, checkpoint_dir=logdir, wait_for_checkpoint=True, max_wait_secs=60
        ) as sess:
            step = int(sess.run(model.global_step))
        other.join()
        return step

    assert assert_same(scenario, tmp_path) == 3


def test_prepare_session_initialises_when_no_checkpoint_comes_in_time(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        saver = v1.train.Saver()
        manager = side.SessionManager(recovery_wait_secs=0.02)
        with manager.prepare_session(
            "",
            init_op=v1.global_variables_initializer(),
            saver=saver,
            checkpoint_dir=logdir,
            wait_for_checkpoint=True,
            max_wait_secs=0.05,
        ) as sess:
            return int(sess.run(model.global_step))

    assert assert_same(scenario, tmp_path) == 0


def test_saved_model_initialisers_of_the_graph_are_run_before_a_restore(tmp_path):
    def scenario(side, logdir):
        saved_model(logdir)
        counting_model()
        saver = v1.train.Saver()
        other = v1.get_variable("other", shape=[], initializer=v1.ones_initializer())
        v1.add_to_collection("saved_model_initializers", other.initializer)
        with side.SessionManager().prepare_session("", saver=saver, checkpoint_dir=logdir) as sess:
            return float(sess.run(other))

    assert assert_same(scenario, tmp_path) == 1.0


def test_the_session_has_the_graph_and_the_config_it_was_made_for(tmp_path):
    def scenario(side, logdir):
        counting_model()
        init = v1.global_variables_initializer()
        config = v1.ConfigProto(inter_op_parallelism_threads=1)
        manager = side.SessionManager(graph=v1.get_default_graph())
        with manager.prepare_session("", init_op=init, config=config) as sess:
            return isinstance(sess, v1.Session), sess.graph is v1.get_default_graph()

    assert assert_same(scenario, tmp_path) == (True, True)
