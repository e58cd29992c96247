"""How people really use a Supervisor: each way works on both sides, with the same result."""

import _thread
import threading
from pathlib import Path

import pytest
import tensorflow as tf
from harness import (
    OURS,
    assert_same,
    checkpoint_state,
    counting_model,
    events,
    files,
    life,
    outcome,
    run,
    v1,
    wait_for_next_second,
    wait_for_ticks,
    wait_until,
)
from tensorflow.python import debug as tf_debug


def test_the_session_as_a_context_manager_closed_before_stop(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor(logdir=logdir)
        with sv.prepare_or_wait_for_session() as sess:
            is_default = v1.get_default_session() is sess
            wait_for_ticks(sv, logdir)
            for _ in range(3):
                sess.run(model.train_op)
        sv.stop()
        return is_default, outcome(lambda: sess.run(model.train_op)), life(logdir), outcome(sv.coord.join)

    assert_same(scenario, tmp_path)


def test_a_supervisor_that_is_never_stopped_leaves_a_logdir_to_go_on_from(tmp_path):
    def scenario(side, logdir):
        with tf.Graph().as_default():
            model = counting_model()
            sv = side.Supervisor(logdir=logdir, save_summaries_secs=0)
            sess = sv.prepare_or_wait_for_session()
            wait_for_ticks(sv, logdir)
            sess.run(model.train_op)
            sv.saver.save(sess, sv.save_path, global_step=sv.global_step)
            state = checkpoint_state(logdir)
            sv.stop()  # only now, for the sake of the test; tests/process/ has the process that ends without
            sess.close()
        model = counting_model()
        sv = side.Supervisor(logdir=logdir, save_summaries_secs=0)
        with sv.managed_session() as sess:
            return state[0], int(sess.run(model.global_step))

    assert assert_same(scenario, tmp_path) == ("LOGDIR/model.ckpt-1", 1)


def test_several_supervisors_one_after_the_other_on_one_logdir(tmp_path):
    def scenario(side, logdir):
        steps = []
        for _ in range(3):
            with tf.Graph().as_default():
                model = counting_model()
                sv = side.Supervisor(logdir=logdir, save_model_secs=0, save_summaries_secs=0)
                with sv.managed_session() as sess:
                    steps.append(int(sess.run(model.global_step)))
                    for _ in range(2):
                        sess.run(model.train_op)
                    sv.saver.save(sess, sv.save_path, global_step=sv.global_step)
        return steps

    assert assert_same(scenario, tmp_path) == [0, 2, 4]


def test_a_session_for_each_call_of_a_function(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0, save_summaries_secs=0)

        @sv.managed_session()
        def train(steps):
            return steps, sv.should_stop()

        return [train(2), sv.should_stop(), train(steps=3), train.__name__]

    assert assert_same(scenario, tmp_path) == [(2, False), True, (3, False), "train"]


def test_stop_and_save_inside_the_block(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor(logdir=logdir, save_summaries_secs=0)
        with sv.managed_session() as sess:
            wait_for_ticks(sv, logdir)
            for _ in range(2):
                sess.run(model.train_op)
            sv.stop()
            after_stop = int(sess.run(sv.global_step))
            path = sv.saver.save(sess, sv.save_path, global_step=sv.global_step)
        return after_stop, path.replace(logdir, "LOGDIR"), checkpoint_state(logdir)[0]

    with pytest.warns(UserWarning, match="closed FileWriter"):
        record = assert_same(scenario, tmp_path)
    assert record == (2, "LOGDIR/model.ckpt-2", "LOGDIR/model.ckpt-2")


def test_save_and_stop_after_the_block(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0, save_summaries_secs=0)
        with sv.managed_session() as sess:
            sess.run(model.train_op)
        after = outcome(lambda: sv.saver.save(sess, sv.save_path, global_step=1))
        return after, outcome(sv.stop)

    with pytest.warns(UserWarning, match="closed FileWriter"):
        record = assert_same(scenario, tmp_path)
    assert record[0] == ("raised", "RuntimeError")


def test_checkpoints_outside_the_logdir(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        elsewhere = Path(logdir + "-elsewhere")
        elsewhere.mkdir()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0, save_summaries_secs=0)
        with sv.managed_session() as sess:
            sess.run(model.train_op)
            sv.saver.save(sess, str(elsewhere / "best"), global_step=sv.global_step)
        return files(str(elsewhere)), files(logdir), checkpoint_state(str(elsewhere))[0].endswith("elsewhere/best-1")

    assert_same(scenario, tmp_path)


class OldSaver(v1.train.Saver):
    """A Saver of the days when save() had fewer arguments."""

    def __init__(self):
        self.saves = []
        super().__init__()

    def save(self, sess, save_path, global_step=None, latest_filename=None, meta_graph_suffix="meta"):
        self.saves.append(isinstance(sess, v1.Session))
        return super().save(sess, save_path, global_step, latest_filename, meta_graph_suffix)


def test_a_saver_that_knows_the_old_arguments_only(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        saver = OldSaver()
        sv = side.Supervisor(logdir=logdir, saver=saver, save_summaries_secs=0)
        with sv.managed_session() as sess:
            wait_for_ticks(sv, logdir)
            sess.run(model.train_op)
            sv.saver.save(sess, sv.save_path, global_step=sv.global_step)
        return len(saver.saves) >= 2, all(saver.saves), checkpoint_state(logdir)[0]

    assert assert_same(scenario, tmp_path) == (True, True, "LOGDIR/model.ckpt-1")


def test_local_init_op_as_a_list(tmp_path):
    def scenario(side, logdir):
        counting_model()
        local = v1.get_variable("local", initializer=2.0, collections=[v1.GraphKeys.LOCAL_VARIABLES])
        init = [v1.local_variables_initializer(), v1.tables_initializer()]
        sv = side.Supervisor(logdir=logdir, local_init_op=init, save_model_secs=0)
        with sv.managed_session() as sess:
            return float(sess.run(local))

    assert assert_same(scenario, tmp_path) == 2.0


def test_an_evaluator_that_waits_for_the_first_checkpoint(tmp_path):
    def scenario(side, logdir):
        def train():
            with tf.Graph().as_default():
                model = counting_model()
                with v1.Session() as sess:
                    sess.run(v1.global_variables_initializer())
                    sess.run(model.train_op)
                    v1.train.Saver().save(sess, logdir + "/model.ckpt", global_step=1)

        model = counting_model()
        sv = side.Supervisor(logdir=logdir, summary_op=None, save_model_secs=0, recovery_wait_secs=0.05)
        trainer = threading.Timer(0.2, train)
        trainer.start()
        with sv.prepare_or_wait_for_session(wait_for_checkpoint=True, start_standard_services=False) as sess:
            step = int(sess.run(model.global_step))
        sv.stop()
        trainer.join()
        return step

    assert assert_same(scenario, tmp_path) == 1


def test_queue_runners_started_again_while_they_run(tmp_path):
    def scenario(side, logdir):
        queue = v1.FIFOQueue(2, tf.float32)
        v1.train.add_queue_runner(v1.train.QueueRunner(queue, [queue.enqueue([1.0])]))
        get = queue.dequeue()
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)
        with sv.managed_session() as sess:
            again = sv.start_queue_runners(sess)
            values = [float(sess.run(get)) for _ in range(5)]
        return again, values

    assert assert_same(scenario, tmp_path) == ([], [1.0] * 5)


def test_a_loop_that_asks_the_coordinator(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)
        steps = 0
        with sv.managed_session() as sess:
            while not sv.coord.should_stop():
                sess.run(model.train_op)
                steps += 1
                if steps == 5:
                    sv.coord.request_stop()
        return steps, sv.should_stop()

    assert assert_same(scenario, tmp_path) == (5, True)


def test_a_loop_that_asks_nothing_and_ends_with_its_input(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        get = v1.data.make_one_shot_iterator(tf.data.Dataset.range(4)).get_next()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)
        read = []
        with sv.managed_session() as sess:
            while True:
                read.append(int(sess.run([get, model.train_op])[0]))
        return read

    assert assert_same(scenario, tmp_path) == [0, 1, 2, 3]


def test_a_program_with_its_own_except_keyboard_interrupt(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)
        record = []
        with sv.managed_session() as sess:
            try:
                _thread.interrupt_main()
                while not sv.should_stop():
                    sess.run(model.train_op)
            except KeyboardInterrupt:
                record.append("caught")
            record.append(int(sess.run(sv.global_step)) >= 0)
        return record

    assert assert_same(scenario, tmp_path) == ["caught", True]


def test_the_parts_of_a_supervisor_in_fetches(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor(logdir=logdir, summary_op=v1.summary.merge_all(), save_model_secs=0)
        with sv.managed_session(start_standard_services=False) as sess:
            _, step, summary = sess.run([model.train_op, sv.global_step, sv.summary_op])
            sv.summary_computed(sess, summary, step)
            sv.summary_writer.add_summary(summary, step)
            options = v1.RunOptions(trace_level=v1.RunOptions.FULL_TRACE)
            metadata = v1.RunMetadata()
            sess.run(model.train_op, options=options, run_metadata=metadata)
            sv.summary_writer.add_run_metadata(metadata, "second", 2)
        kinds = [record[0] for record in events(logdir)[0]]
        return kinds, len(metadata.step_stats.dev_stats) > 0

    record = assert_same(scenario, tmp_path)
    assert record[0].count("tagged_run_metadata") == 1


def test_a_graph_that_is_opened_again_after_the_session(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor(logdir=logdir)
        with sv.managed_session() as sess:
            wait_for_ticks(sv, logdir)
            v1.get_default_graph()._unsafe_unfinalize()
            twice = model.weights * 2
            sess.run(model.train_op)
            values = sess.run(twice).tolist()
            wait_until(lambda: checkpoint_state(logdir))
        return values

    assert assert_same(scenario, tmp_path) == [2.0, 2.0]


def test_a_session_wrapped_by_a_debugger(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor(logdir=logdir, save_summaries_secs=0)
        with sv.managed_session() as sess:
            wait_for_ticks(sv, logdir)
            wrapped = tf_debug.DumpingDebugWrapperSession(sess, logdir + "-dumps")
            wrapped.run(model.train_op)
            return int(wrapped.run(sv.global_step))

    assert assert_same(scenario, tmp_path) == 1


def test_summaries_by_hand_and_an_extra_service(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        summary_op = v1.summary.merge_all()
        sv = side.Supervisor(logdir=logdir, summary_op=None, save_model_secs=0, save_summaries_secs=0)
        printed = []
        with sv.managed_session() as sess:
            sv.loop(60, lambda sess: printed.append(sess.run(model.weights).tolist()), (sess,))
            wait_until(lambda: printed)
            for step in range(6):
                if sv.should_stop():
                    break
                if step % 3 == 0:
                    sv.summary_computed(sess, sess.run(summary_op))
                else:
                    sess.run(model.train_op)
        return printed[0], life(logdir)

    assert_same(scenario, tmp_path)


def test_retry_on_aborted_error(tmp_path):
    def scenario(side, logdir):
        found = []

        def train():
            with tf.Graph().as_default():
                model = counting_model()
                sv = side.Supervisor(logdir=logdir, save_model_secs=0, save_summaries_secs=0)
                with sv.managed_session() as sess:
                    found.append(int(sess.run(model.global_step)))
                    for _ in range(2):
                        sess.run(model.train_op)
                    sv.saver.save(sess, sv.save_path, global_step=sv.global_step)
                    if len(found) < 3:
                        raise tf.errors.AbortedError(None, None, "preempted")

        while True:
            try:
                train()
                break
            except tf.errors.AbortedError:
                pass
        return found

    assert assert_same(scenario, tmp_path) == [0, 2, 4]


def test_the_same_supervisor_again_after_an_aborted_error(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0, save_summaries_secs=0)
        sessions = []
        for attempt in range(2):
            wait_for_next_second()
            try:
                with sv.managed_session() as sess:
                    sessions.append(sess)
                    sess.run(model.train_op)
                    if attempt == 0:
                        raise tf.errors.AbortedError(None, None, "preempted")
            except tf.errors.AbortedError:
                pass
        return sessions[0] is sessions[1], life(logdir)

    assert assert_same(scenario, tmp_path)[0] is False


def test_tensorflows_own_loop_passes_the_arguments_and_ends_when_the_function_asks(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0, save_summaries_secs=0)
        calls = []

        def train_step(sess, *args, **kwargs):
            sess.run(model.train_op)
            calls.append((args, kwargs))
            if len(calls) == 3:
                sv.request_stop()

        v1.train.basic_train_loop(sv, train_step, args=(1, "a"), kwargs={"b": 2})
        return len(calls), calls[0], sv.should_stop()

    assert assert_same(scenario, tmp_path) == (3, ((1, "a"), {"b": 2}), True)


def test_tensorflows_own_loop_goes_on_after_an_aborted_error(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0, save_summaries_secs=0)
        sessions = []

        def train_step(sess):
            sess.run(model.train_op)
            if sess not in sessions:
                sessions.append(sess)
                if len(sessions) < 3:
                    raise tf.errors.AbortedError(None, None, "preempted")
            sv.request_stop()

        v1.train.basic_train_loop(sv, train_step)
        return len(sessions)

    assert assert_same(scenario, tmp_path) == 3


def test_tensorflows_own_loop_raises_any_other_error(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0, save_summaries_secs=0)

        def train_step(sess):
            raise RuntimeError("the step has failed")

        return outcome(lambda: v1.train.basic_train_loop(sv, train_step)), sv.should_stop()

    assert assert_same(scenario, tmp_path) == (("raised", "RuntimeError"), True)


def test_a_chief_and_a_worker_on_one_server(tmp_path):
    def scenario(side, logdir):
        server = v1.train.Server.create_local_server()
        model = counting_model()
        worker = side.Supervisor(is_chief=False, recovery_wait_secs=0.05)
        chief = side.Supervisor(logdir=logdir, save_summaries_secs=0, save_model_secs=0)
        with chief.managed_session(server.target) as ours, worker.managed_session(server.target) as theirs:
            for sess in (ours, theirs, theirs):
                sess.run(model.train_op)
            return int(ours.run(model.global_step)), files(logdir + "-worker")

    assert assert_same(scenario, tmp_path)[0] == 3


@pytest.mark.skipif(OURS.name == "itself", reason="the reference does not run in plain TensorFlow 2")
@pytest.mark.parametrize("eager_threads", [True, False])
def test_ours_runs_in_plain_tensorflow_2_and_with_v2_behaviour_off(eager_threads, tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor(logdir=logdir)
        seen = []
        with sv.managed_session() as sess:
            sv.loop(60, lambda: seen.append(tf.executing_eagerly()))
            wait_for_ticks(sv, logdir)
            wait_until(lambda: seen)
            sess.run(model.train_op)
        return life(logdir)[0][-1], checkpoint_state(logdir)[0]

    expected = (("session_log", "STOP", 0, "", ""), "LOGDIR/model.ckpt-1")
    assert run(scenario, OURS, tmp_path, eager_threads=eager_threads) == expected
