"""Preparing, running, stopping: order, threads, and which errors come out where."""

import threading

import pytest
import tensorflow as tf
from harness import assert_same, counting_model, life, outcome, v1, wait_for_next_second, wait_for_ticks, wait_until


def test_a_session_is_a_real_one_and_closed_at_the_end(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir)
        with sv.managed_session() as sess:
            record = [isinstance(sess, v1.Session), sess.graph is v1.get_default_graph(), sv.should_stop()]
            record.append(v1.get_default_session() is sess)
        return [*record, outcome(lambda: sess.run("train")), sv.should_stop(), sv.coord.joined]

    assert_same(scenario, tmp_path)


def test_init_op_then_init_fn_then_local_init_then_ready(tmp_path):
    def scenario(side, logdir):
        order = []

        def note(word):
            with tf.control_dependencies([v1.py_func(lambda: order.append(word), [], [], stateful=True)]):
                return tf.no_op()

        model = counting_model()
        with tf.control_dependencies([note("init_op")]):
            init_op = v1.global_variables_initializer()
        sv = side.Supervisor(
            logdir=logdir,
            init_op=tf.group(init_op, model.weights.initializer, model.global_step.initializer, note("init_op")),
            init_fn=lambda sess: order.append(("init_fn", isinstance(sess, v1.Session))),
            local_init_op=note("local_init_op"),
            ready_op=None,
            save_model_secs=0,
        )
        with sv.managed_session(start_standard_services=False):
            order.append("block")
        return [word for index, word in enumerate(order) if word not in order[:index]]

    assert assert_same(scenario, tmp_path) == ["init_op", ("init_fn", True), "local_init_op", "block"]


def test_the_init_feed_reaches_the_init_op_and_not_a_restore(tmp_path):
    def scenario(side, logdir):
        feed = v1.placeholder(tf.float32, [2])
        v1.get_variable("weights", initializer=feed)
        sv = side.Supervisor(logdir=logdir, init_feed_dict={feed: [3.0, 4.0]}, save_model_secs=0)
        with sv.managed_session() as sess:
            return sess.run(v1.get_collection("variables")[0]).tolist()

    assert assert_same(scenario, tmp_path) == [3.0, 4.0]


def test_a_model_without_an_init_op_can_be_initialised_by_init_fn(tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        init = v1.global_variables_initializer()
        sv = side.Supervisor(logdir=logdir, init_op=None, init_fn=lambda sess: sess.run(init))
        with sv.managed_session(start_standard_services=False) as sess:
            return sess.run(model.weights).tolist()

    assert assert_same(scenario, tmp_path) == [0.0, 0.0]


@pytest.mark.parametrize(
    "options", [{"init_op": None}, {"init_op": None, "local_init_op": None}, {"init_op": None, "ready_op": None}]
)
def test_a_model_that_nothing_initialises(options, tmp_path):
    def scenario(side, logdir):
        counting_model(step=False)
        sv = side.Supervisor(save_model_secs=0, **options)

        def enter():
            with sv.managed_session():
                return "in the block"

        return outcome(enter)

    assert_same(scenario, tmp_path)


ERRORS = {
    "OutOfRangeError": lambda: tf.errors.OutOfRangeError(None, None, "end of input"),
    "StopIteration": StopIteration,
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": lambda: SystemExit(3),
    "GeneratorExit": GeneratorExit,
    "AbortedError": lambda: tf.errors.AbortedError(None, None, "preempted"),
    "CancelledError": lambda: tf.errors.CancelledError(None, None, "cancelled"),
    "UnavailableError": lambda: tf.errors.UnavailableError(None, None, "gone"),
    "ValueError": lambda: ValueError("no"),
    "RuntimeError": lambda: RuntimeError("no"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_what_the_block_raises(error, tmp_path):
    def scenario(side, logdir):
        raised = ERRORS[error]()
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)
        came_out = None
        try:
            with sv.managed_session() as sess:
                wait_for_ticks(sv, logdir)
                raise raised
        except BaseException as caught:  # noqa: BLE001 - the error under test may be any
            came_out = caught is raised, type(caught).__name__
        return came_out, sv.should_stop(), outcome(lambda: sess.run("train")), life(logdir)

    came_out = assert_same(scenario, tmp_path)[0]
    assert came_out == (None if error == "OutOfRangeError" else (True, error))


# Departure "interrupts_go_on": in ours, what is no Exception ends its thread too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", sorted(set(ERRORS) - {"StopIteration"}))  # departure "stop_iteration_in_a_service"
def test_what_a_service_raises(error, tmp_path):
    def scenario(side, logdir):
        raised = ERRORS[error]()

        def fail():
            raise raised

        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0, save_summaries_secs=0)
        came_out = None
        try:
            with sv.managed_session() as sess:
                sv.loop(60, fail)
                wait_until(sv.should_stop)
        except BaseException as caught:  # noqa: BLE001 - the error under test may be any
            came_out = caught is raised, type(caught).__name__
        return came_out, outcome(lambda: sess.run("train")), life(logdir)

    came_out = assert_same(scenario, tmp_path)[0]
    assert came_out == (None if error == "OutOfRangeError" else (True, error))


def test_the_error_of_a_service_comes_before_the_later_one_of_the_block(tmp_path):
    def scenario(side, logdir):
        def fail():
            raise ValueError("of the service")

        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)

        def session():
            with sv.managed_session():
                sv.loop(60, fail)
                wait_until(sv.should_stop)
                raise KeyError("of the block")

        return outcome(session)

    assert assert_same(scenario, tmp_path) == ("raised", "ValueError")


def test_an_error_of_the_summary_operation_ends_the_run(tmp_path):
    def scenario(side, logdir):
        counting_model(summary=False)
        check = v1.debugging.Assert(tf.constant(False), ["bad"])
        with tf.control_dependencies([check]):
            v1.summary.scalar("never", tf.constant(1.0))
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)

        def session():
            with sv.managed_session():
                wait_until(sv.should_stop)

        return outcome(session)

    assert assert_same(scenario, tmp_path) == ("raised", "InvalidArgumentError")


def test_an_error_while_preparing_is_raised_and_the_run_has_stopped(tmp_path):
    def scenario(side, logdir):
        mistake = ValueError("in init_fn")

        def fail(sess):
            raise mistake

        counting_model()
        sv = side.Supervisor(logdir=logdir, init_fn=fail)
        came_out = None
        try:
            with sv.managed_session():
                came_out = "no error"
        except ValueError as caught:
            came_out = caught is mistake
        return came_out, sv.should_stop()

    assert assert_same(scenario, tmp_path) == (True, True)


def test_an_error_given_to_request_stop_is_raised_at_the_end(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)

        def session():
            with sv.managed_session():
                try:
                    raise KeyError("handled here")
                except KeyError as error:
                    sv.RequestStop(error)
                assert sv.ShouldStop()

        return outcome(session)

    assert assert_same(scenario, tmp_path) == ("raised", "KeyError")


def test_stop_on_exception(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        record = []
        for error in (ValueError, lambda: tf.errors.OutOfRangeError(None, None, "")):
            sv.coord.clear_stop()
            with sv.StopOnException():
                raise error()
            record.append((sv.should_stop(), outcome(sv.stop)))
        return record

    assert assert_same(scenario, tmp_path) == [(True, ("raised", "ValueError")), (True, ("returned", None))]


@pytest.mark.filterwarnings("ignore:Attempting to use a closed FileWriter")  # theirs, when it is stopped twice
@pytest.mark.parametrize(
    "order", ["stop", "stop stop", "prepare stop stop", "prepare stop prepare stop", "request stop"]
)
def test_stop_in_every_state(order, tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0, save_summaries_secs=0)
        record = []
        sessions = []
        for word in order.split():
            if word == "prepare":
                if sessions:
                    wait_for_next_second()
                sessions.append(sv.prepare_or_wait_for_session())
            elif word == "request":
                sv.request_stop()
            else:
                record.append(sv.stop())
            record.append((sv.should_stop(), sv.coord.joined))
        for sess in sessions:
            record.append(int(sess.run(sv.global_step)))  # stop() does not close the session
            sess.close()
        return record, life(logdir)

    assert_same(scenario, tmp_path)


def test_an_error_is_raised_by_every_stop_until_the_next_session(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        with sv.stop_on_exception():
            raise ValueError
        record = [outcome(sv.stop), outcome(sv.stop)]
        sv.prepare_or_wait_for_session().close()
        return [*record, outcome(sv.stop)]

    assert assert_same(scenario, tmp_path) == [("raised", "ValueError")] * 2 + [("returned", None)]


def test_the_session_of_a_second_prepare_is_a_new_one(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(save_model_secs=0)
        first, second = sv.prepare_or_wait_for_session(), sv.prepare_or_wait_for_session()
        with first, second:
            second.run("train")
            record = first is second, int(first.run(sv.global_step)), int(second.run(sv.global_step))
        sv.stop()
        return record

    assert assert_same(scenario, tmp_path) == (False, 0, 1)


def test_threads_of_the_program_are_joined(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        done = []

        def work():
            sv.coord.wait_for_stop()
            done.append(True)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
        sv.coord.register_thread(threads[1])
        with sv.prepare_or_wait_for_session():
            for thread in threads:
                thread.start()
            sv.stop(threads[:1])
        return done

    assert assert_same(scenario, tmp_path) == [True, True]


@pytest.mark.parametrize("ignore", [True, False])
def test_a_thread_that_does_not_stop_in_its_grace_period(ignore, tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, stop_grace_secs=0.1, save_model_secs=0, save_summaries_secs=0)
        release, running = threading.Event(), threading.Event()

        def hang():
            running.set()
            release.wait()

        with sv.prepare_or_wait_for_session():
            thread = sv.loop(60, hang)
            running.wait()
            stopped = outcome(lambda: sv.Stop(ignore_live_threads=ignore))
            told = life(logdir)
            release.set()
            thread.join()
        return stopped, told

    assert assert_same(scenario, tmp_path)[0] == (("returned", None) if ignore else ("raised", "RuntimeError"))


def test_loop_calls_with_its_arguments_at_once_and_again(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        calls = []
        with sv.managed_session():
            thread = sv.Loop(0.01, lambda *args, **kwargs: calls.append((args, kwargs)), (1, 2), {"three": 3})
            record = [isinstance(thread, threading.Thread), thread.daemon]
            wait_until(lambda: len(calls) > 2)
        return [*record, thread.is_alive(), calls[:3]]

    assert assert_same(scenario, tmp_path) == [True, True, False, [((1, 2), {"three": 3})] * 3]


def test_loop_without_an_interval_calls_back_to_back(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        calls = []
        with sv.managed_session():
            thread = sv.loop(None, lambda: (calls.append(1), len(calls) > 9 and sv.request_stop()))
            wait_until(sv.should_stop)
            thread.join()
        return len(calls)

    assert assert_same(scenario, tmp_path) == 10


def test_loop_without_a_target(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        with sv.managed_session():
            return outcome(lambda: sv.loop(1, None, args=(1,))), outcome(lambda: sv.loop(1, None, kwargs={"a": 1}))

    assert assert_same(scenario, tmp_path) == (("raised", "ValueError"),) * 2


def test_loop_after_stop_calls_nothing(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        sv.stop()
        calls = []
        sv.loop(0.01, calls.append, (1,)).join()
        return calls

    assert assert_same(scenario, tmp_path) == []


def test_wait_for_stop(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        timer = threading.Timer(0.05, sv.request_stop)
        timer.start()
        return sv.WaitForStop(), sv.should_stop()

    assert assert_same(scenario, tmp_path) == (None, True)


def test_the_services_that_are_started(tmp_path):
    def scenario(side, logdir):
        counting_model()
        record = []
        for options in ({}, {"save_model_secs": 0}, {"save_summaries_secs": 0}, {"summary_op": None}, {"saver": None}):
            sv = side.Supervisor(logdir=logdir, global_step=None, **options)
            with sv.prepare_or_wait_for_session(start_standard_services=False) as sess:
                threads = sv.StartStandardServices(sess)
                record.append([len(threads), all(isinstance(thread, threading.Thread) for thread in threads)])
                wait_for_ticks(sv, logdir)
                sv.stop()
                sv.coord.join(threads)
        return record

    assert_same(scenario, tmp_path)


def queue_of_three():
    """A queue that is filled with three numbers and closed, and the runner that does it."""
    numbers = v1.train.limit_epochs(tf.constant([1, 2, 3]), num_epochs=1)
    queue = v1.FIFOQueue(10, tf.int32)
    runner = v1.train.QueueRunner(queue, [queue.enqueue_many([numbers])])
    return queue, runner


@pytest.mark.parametrize("collected", [True, False])
def test_queue_runners(collected, tmp_path):
    def scenario(side, logdir):
        queue, runner = queue_of_three()
        if collected:
            v1.train.add_queue_runner(runner)
        get = queue.dequeue()
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)
        read, threads = [], []
        with sv.managed_session() as sess:
            if not collected:
                threads = sv.StartQueueRunners(sess, [runner])
            read = [int(sess.run(get)) for _ in range(3)]
            none = [sv.start_queue_runners(sess, []), sv.start_queue_runners(sess, ())]
            while not sv.should_stop():
                sess.run(get)
        kinds = [(isinstance(thread, threading.Thread), thread.daemon) for thread in threads]
        return read, kinds, none

    record = assert_same(scenario, tmp_path)
    assert record[0] == [1, 2, 3]


def test_queue_runners_are_not_started_without_standard_services(tmp_path):
    def scenario(side, logdir):
        _, runner = queue_of_three()
        v1.train.add_queue_runner(runner)
        counting_model()
        sv = side.Supervisor()
        with sv.managed_session(start_standard_services=False) as sess:
            return len(sv.start_queue_runners(sess)) > 0

    assert assert_same(scenario, tmp_path) is True


def test_the_coordinator_is_taken_by_tensorflow(tmp_path):
    def scenario(side, logdir):
        queue, runner = queue_of_three()
        get = queue.dequeue()
        counting_model()
        sv = side.Supervisor()
        calls = []
        with sv.managed_session() as sess:
            threads = runner.create_threads(sess, sv.coord, daemon=True, start=True)
            looper = v1.train.LooperThread(sv.coord, 60, target=calls.append, args=(1,))
            looper.start()
            wait_until(lambda: calls)
            first = int(sess.run(get))
            started = v1.train.start_queue_runners(sess, sv.coord)
        return isinstance(sv.coord, tf.train.Coordinator), first, started, [thread.is_alive() for thread in threads]

    assert assert_same(scenario, tmp_path)[:2] == (True, 1)
