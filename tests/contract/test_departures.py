"""Shows each departure on both sides. ``departures.py`` says why."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from coordinators import AwaitedThread
from departures import DEPARTURES
from harness import (
    DEADLINE_SECS,
    OURS,
    THEIRS,
    checkpoint_state,
    counting_model,
    event_files,
    events,
    files,
    operations,
    outcome,
    rates,
    run,
    saved_values,
    v1,
    wait_for_next_second,
    wait_for_ticks,
    wait_until,
)

if OURS.Supervisor is THEIRS.Supervisor:
    pytest.skip("the reference does not depart from itself", allow_module_level=True)


def both(scenario, tmp_path):
    """The records of theirs and of ours."""
    return run(scenario, THEIRS, tmp_path), run(scenario, OURS, tmp_path)


def test_every_departure_has_its_test_and_every_test_its_departure():
    shown = {name.removeprefix("test_") for name in dir(sys.modules[__name__]) if name.startswith("test_")}
    assert shown - {"every_departure_has_its_test_and_every_test_its_departure"} == set(DEPARTURES)


def one_session(sv, steps=0, ticks_in=None):
    """A session of some steps; the value of the global step at its start."""
    with sv.managed_session() as sess:
        if ticks_in:
            wait_for_ticks(sv, ticks_in)
        started_at = int(sess.run(sv.global_step))
        for _ in range(steps):
            sess.run("train")
    return started_at


def test_live_model_is_kept(tmp_path):
    def scenario(side, logdir):
        counting_model()
        server = v1.train.Server.create_local_server()
        sv = side.Supervisor(logdir=logdir, save_summaries_secs=0)
        with sv.prepare_or_wait_for_session(server.target) as sess:
            wait_for_ticks(sv, logdir)
            sv.stop()
            for _ in range(3):  # after the last checkpoint: only the parameter server knows of these
                sess.run("train")
        restarted = side.Supervisor(logdir=logdir, save_summaries_secs=0)
        with restarted.managed_session(server.target) as sess:
            return int(sess.run(restarted.global_step))

    assert both(scenario, tmp_path) == (0, 3)


def test_global_step_of_rank_one(tmp_path):
    def scenario(side, logdir):
        step = v1.get_variable("global_step", shape=[1], dtype=tf.int64, initializer=v1.zeros_initializer())
        v1.add_to_collection(v1.GraphKeys.GLOBAL_STEP, step)
        train = v1.assign_add(step, [1])
        sv = side.Supervisor(logdir=logdir)

        def session():
            with sv.managed_session() as sess:
                wait_for_ticks(sv, logdir)
                sess.run([train])
                sv.summary_computed(sess, b"")
            return checkpoint_state(logdir)[0]

        return outcome(session)

    # Only NumPy 2 refuses to make a number of an array of rank 1; with an older one only the last step is missing.
    needs_numpy_2 = int(np.__version__.partition(".")[0]) >= 2
    theirs = ("raised", "TypeError") if needs_numpy_2 else ("returned", "LOGDIR/model.ckpt-0")
    assert both(scenario, tmp_path) == (theirs, ("returned", "LOGDIR/model.ckpt-1"))


def test_global_step_that_is_a_resource_variable(tmp_path):
    def scenario(side, logdir):
        step = tf.Variable(0, dtype=tf.int64, name="global_step")
        sv = side.Supervisor()
        return sv.global_step is step, sv.global_step is None

    assert both(scenario, tmp_path) == ((False, True), (True, False))


def test_standard_services_without_logdir(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        with sv.managed_session() as sess:
            return outcome(lambda: sv.start_standard_services(sess))

    assert both(scenario, tmp_path) == (("returned", None), ("raised", "ValueError"))


def test_summary_of_a_wrong_type(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir)
        with sv.managed_session(start_standard_services=False) as sess:
            return {outcome(lambda: sv.summary_computed(sess, wrong)) for wrong in (5, None, [1], object())}  # noqa: B023

    assert both(scenario, tmp_path) == ({("raised", "AttributeError")}, {("raised", "TypeError")})


def test_services_in_plain_tensorflow_2(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir)

        def session():
            with sv.managed_session():
                wait_until(lambda: sv.should_stop() or checkpoint_state(logdir))

        return outcome(session)

    assert run(scenario, THEIRS, tmp_path, eager_threads=True)[0] == "raised"
    assert run(scenario, OURS, tmp_path, eager_threads=True) == ("returned", None)


def test_checkpoint_of_one_step(tmp_path):
    def scenario(side, logdir):
        first = v1.get_variable("first", shape=[], initializer=v1.zeros_initializer())
        second = v1.get_variable("second", shape=[], initializer=v1.zeros_initializer())
        v1.train.create_global_step()
        half_way, go_on = threading.Event(), threading.Event()

        def pause():
            half_way.set()
            go_on.wait(60)

        with tf.control_dependencies([v1.assign_add(first, 1.0)]):
            wait = v1.py_func(pause, [], [])
        with tf.control_dependencies([wait]):
            step = tf.group(v1.assign_add(second, 1.0))
        sv = side.Supervisor(logdir=logdir, save_model_secs=0.05, save_summaries_secs=0)
        with sv.managed_session() as sess:
            wait_until(lambda: checkpoint_state(logdir))
            training = threading.Thread(target=sess.run, args=(step,))
            training.start()
            half_way.wait()
            index = Path(logdir, "model.ckpt-0.index")
            before = index.stat().st_mtime_ns

            def torn_now():
                if index.stat().st_mtime_ns == before:
                    return False
                return outcome(lambda: saved_values(str(index.with_suffix("")))["first"]) == ("returned", 1.0)

            # Theirs saves now, on a busy machine somewhat later; ours must not, and gets the time of ten saves.
            deadline = time.monotonic() + (60 if side is THEIRS else 0.5)
            torn = False
            while not torn and time.monotonic() < deadline:
                torn = index.exists() and torn_now()
            go_on.set()
            training.join()
        return torn

    assert both(scenario, tmp_path) == (True, False)


def test_final_checkpoint(tmp_path):
    def scenario(side, logdir):
        counting_model()
        one_session(side.Supervisor(logdir=logdir), steps=3, ticks_in=logdir)
        logs = [record for record in events(logdir)[0] if record[0] == "session_log"]
        return checkpoint_state(logdir)[0], [record[1:4] for record in logs[-2:]]

    theirs, ours = both(scenario, tmp_path)
    assert theirs[0] == "LOGDIR/model.ckpt-0"
    assert ours == ("LOGDIR/model.ckpt-3", [("CHECKPOINT", 3, "LOGDIR/model.ckpt-3"), ("STOP", 0, "")])


def test_no_checkpoint_before_the_first_tick(tmp_path):
    def scenario(side, logdir):
        counting_model()
        # A stop that is asked for before the threads of the services have run: what a very short block comes to.
        sv = side.Supervisor(logdir=logdir, init_fn=lambda _: sv.request_stop())
        with sv.managed_session() as sess:
            sess.run("train")
        return checkpoint_state(logdir)

    theirs, ours = both(scenario, tmp_path)
    assert theirs is None
    assert ours[0] == "LOGDIR/model.ckpt-1"


def two_checkpoints(side, logdir):
    """Leave the checkpoints of step 0 and of step 3 in the logdir."""
    with tf.Graph().as_default():
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_summaries_secs=0)
        with sv.managed_session() as sess:
            wait_for_ticks(sv, logdir)
            for _ in range(3):
                sess.run("train")
            sv.saver.save(sess, sv.save_path, global_step=sv.global_step)
    assert checkpoint_state(logdir)[0] == "LOGDIR/model.ckpt-3"


def resumed_step(side, logdir):
    """The step at which a new run starts."""
    with tf.Graph().as_default():
        counting_model()
        return one_session(side.Supervisor(logdir=logdir, save_summaries_secs=0, save_model_secs=0))


def test_damaged_checkpoint(tmp_path):
    def scenario(side, logdir):
        two_checkpoints(side, logdir)
        newest = Path(logdir, "model.ckpt-3.data-00000-of-00001")
        newest.write_bytes(newest.read_bytes()[:-4])
        return outcome(lambda: resumed_step(side, logdir))

    theirs, ours = both(scenario, tmp_path)
    assert theirs[0] == "raised"
    assert ours == ("returned", 0)


def test_checkpoint_of_another_shape(tmp_path):
    def scenario(side, logdir):
        two_checkpoints(side, logdir)
        v1.get_variable("weights", shape=[5])
        v1.train.create_global_step()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)
        try:
            with sv.managed_session() as sess:
                return sess.run(v1.global_variables()[0]).shape
        except ValueError as error:
            return all(word in str(error) for word in ("weights", "2", "5"))

    assert both(scenario, tmp_path) == ((2,), True)


def test_missing_state_file(tmp_path):
    def scenario(side, logdir):
        two_checkpoints(side, logdir)
        Path(logdir, "checkpoint").unlink()
        return resumed_step(side, logdir)

    assert both(scenario, tmp_path) == (0, 3)


def test_worker_starts_soon(tmp_path):
    def scenario(side, logdir):
        counting_model()
        init = v1.global_variables_initializer()
        server = v1.train.Server.create_local_server()
        graph = v1.get_default_graph()
        has_looked = threading.Event()

        def look(lacking):
            has_looked.set()
            return lacking

        # As by default, and it says when the worker has asked for the first time.
        ready_op = tf.numpy_function(look, [v1.report_uninitialized_variables()], tf.string)
        worker = side.Supervisor(is_chief=False, ready_op=ready_op, recovery_wait_secs=2 if side is THEIRS else 600)

        def initialise():
            assert has_looked.wait(DEADLINE_SECS)
            with v1.Session(server.target, graph=graph) as sess:
                sess.run(init)

        chief = threading.Thread(target=initialise)
        chief.start()
        began = time.monotonic()
        worker.prepare_or_wait_for_session(server.target).close()
        waited = time.monotonic() - began
        chief.join()
        worker.stop()
        return waited

    theirs, ours = both(scenario, tmp_path)
    assert theirs >= 2
    assert ours < 60


def test_error_made_but_not_raised(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        return outcome(lambda: sv.request_stop(ValueError("no"))), sv.should_stop(), outcome(sv.stop)

    assert both(scenario, tmp_path) == (
        (("raised", "TypeError"), False, ("raised", "TypeError")),
        (("returned", None), True, ("raised", "ValueError")),
    )


def test_later_errors(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        with sv.stop_on_exception():
            raise ValueError("the first")
        with sv.stop_on_exception():
            raise KeyError("the second")
        with pytest.raises(ValueError, match="the first") as caught:
            sv.stop()
        return "the second" in str(getattr(caught.value, "__notes__", ""))

    assert both(scenario, tmp_path) == (False, True)


def test_missed_ticks(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        calls = []

        def late_once():
            calls.append(time.monotonic())
            if len(calls) == 1:
                time.sleep(1.2)

        with sv.managed_session():
            looper = sv.loop(0.2, late_once)
            wait_until(lambda: len(calls) > 5)
        return calls[5] - calls[1] if side is THEIRS else looper.skipped_ticks

    # One of three is enough: a machine has pauses of its own.
    assert any(run(scenario, THEIRS, tmp_path) < 0.4 for _ in range(3))
    assert run(scenario, OURS, tmp_path) >= 5


def test_join_of_a_finished_thread(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        thread = AwaitedThread()
        thread.start()
        sv.coord.join([thread])
        return time.monotonic() - thread.found_alive_at

    assert run(scenario, THEIRS, tmp_path) >= 1
    # One of three is enough: a machine has pauses of its own.
    assert any(run(scenario, OURS, tmp_path) < 0.9 for _ in range(3))


def test_error_while_preparing(tmp_path):
    def scenario(side, logdir):
        counting_model()

        def fail(sess):
            raise tf.errors.OutOfRangeError(None, None, "no input at all")

        sv = side.Supervisor(logdir=logdir, init_fn=fail)
        return outcome(lambda: one_session(sv))

    assert both(scenario, tmp_path) == (("raised", "RuntimeError"), ("raised", "OutOfRangeError"))


def test_stop_iteration_in_a_service(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()

        def session():
            with sv.managed_session():
                sv.loop(60, next, (iter([]),))
                wait_until(sv.should_stop)

        return outcome(session)

    assert both(scenario, tmp_path) == (("raised", "RuntimeError"), ("raised", "StopIteration"))


def test_interrupts_go_on(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()

        def block():
            with sv.stop_on_exception():
                raise KeyboardInterrupt

        return outcome(block), sv.should_stop()

    assert both(scenario, tmp_path) == ((("returned", None), True), (("raised", "KeyboardInterrupt"), True))


def test_unchanged_state_is_not_saved_again(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_summaries_secs=0)
        one_session(sv, ticks_in=logdir)
        wait_for_next_second()
        before = Path(logdir, "model.ckpt-0.index").stat().st_mtime_ns
        with sv.managed_session():
            calls = []
            sv.loop(0.05, calls.append, (1,))
            wait_until(lambda: len(calls) > 3)
        return Path(logdir, "model.ckpt-0.index").stat().st_mtime_ns == before

    assert both(scenario, tmp_path) == (False, True)


def test_checkpoint_path(tmp_path):
    def scenario(side, logdir):
        counting_model()
        one_session(side.Supervisor(logdir=logdir), ticks_in=logdir)
        (path,) = {record[3] for record in events(logdir)[0] if record[:2] == ("session_log", "CHECKPOINT")}
        return path, Path(path.replace("LOGDIR", logdir) + ".index").exists()

    assert both(scenario, tmp_path) == (("LOGDIR/model.ckpt", False), ("LOGDIR/model.ckpt-0", True))


def test_two_event_files_in_one_second(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)
        wait_for_next_second()
        for _ in range(2):
            with sv.managed_session(start_standard_services=False):
                pass
        return len(event_files(logdir))

    assert both(scenario, tmp_path) == (1, 2)


def test_event_file_of_a_new_supervisor(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir)
        names = files(logdir)
        sv.stop()
        return names

    assert both(scenario, tmp_path) == ([], ["events.out.tfevents"])


def test_operations_for_iterators(tmp_path):
    def scenario(side, logdir):
        iterator = v1.data.make_one_shot_iterator(tf.data.Dataset.range(3))
        saveable = tf.data.experimental.make_saveable_from_iterator(iterator)
        v1.add_to_collection(v1.GraphKeys.SAVEABLE_OBJECTS, saveable)
        counting_model()
        side.Supervisor(logdir=logdir).stop()
        return [name for name in operations(v1.get_default_graph()) if "SerializeTensor" in name]

    theirs, ours = both(scenario, tmp_path)
    assert (theirs, len(ours)) == ([], 1)


def test_ctrl_c(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir)

        def session():
            with sv.managed_session() as sess:
                wait_for_ticks(sv, logdir)
                sess.run("train")
                os.kill(os.getpid(), signal.SIGINT)
                while not sv.should_stop():
                    sess.run("train")

        result = outcome(session)
        return result, checkpoint_state(logdir)[0] != "LOGDIR/model.ckpt-0"

    interrupted = ("raised", "KeyboardInterrupt")
    assert both(scenario, tmp_path) == ((interrupted, False), (interrupted, True))


WRONG = {
    "ready_op": 1.5,
    "ready_for_local_init_op": 1.5,
    "init_op": 1.5,
    "init_feed_dict": 1.5,
    "local_init_op": 1.5,
    "summary_op": 1.5,
    "global_step": 1.5,
    "save_summaries_secs": "often",
    "save_model_secs": "often",
    "recovery_wait_secs": "long",
    "stop_grace_secs": "long",
    "session_manager": 1.5,
    "summary_writer": 1.5,
    "init_fn": 1.5,
    "local_init_run_options": 1.5,
}


@pytest.mark.parametrize("argument", [*WRONG, "graph", "logdir", "saver", "checkpoint_basename"])
def test_wrong_types(argument, tmp_path):
    def scenario(side, logdir):
        counting_model()
        given = {"logdir": logdir, argument: WRONG.get(argument, 1.5)}
        return outcome(lambda: side.Supervisor(**given).is_chief)

    theirs, ours = both(scenario, tmp_path)
    assert theirs == ("returned", True) or argument not in WRONG
    assert ours in (("raised", "TypeError"), ("raised", "ValueError"))
    if argument in ("ready_op", "ready_for_local_init_op", "summary_op"):
        with tf.Graph().as_default(), pytest.raises(TypeError, match=f"{argument}: expected one tensor, found list"):
            OURS.Supervisor(logdir=str(tmp_path), **{argument: [v1.report_uninitialized_variables()]})


@pytest.mark.parametrize("basename", [".odd", "a*b", "a?", "lr=[0.1]", "a\\b"])
def test_basenames_that_could_not_be_restored(basename, tmp_path):
    def scenario(side, logdir):
        counting_model()
        return outcome(lambda: side.Supervisor(logdir=logdir, checkpoint_basename=basename).is_chief)

    assert both(scenario, tmp_path) == (("returned", True), ("raised", "ValueError"))
    with tf.Graph().as_default(), pytest.raises(ValueError, match="checkpoint_basename: expected a name"):
        OURS.Supervisor(logdir=str(tmp_path), checkpoint_basename=basename)


def test_logdirs_that_look_like_a_pattern(tmp_path):
    def scenario(side, logdir):
        logdir = f"{logdir}/lr=[0.1,0.2]"

        def train():
            counting_model()
            supervisor = side.Supervisor(logdir=logdir, save_model_secs=0)
            with supervisor.managed_session() as session:
                begun = int(session.run(supervisor.global_step))
                session.run("train")
                supervisor.saver.save(session, supervisor.save_path, global_step=supervisor.global_step)
            return begun

        def twice():
            with tf.Graph().as_default():
                train()
            with tf.Graph().as_default():
                return train()

        return outcome(twice)

    assert both(scenario, tmp_path) == (("raised", "ValueError"), ("returned", 1))


def test_summary_op_that_is_an_operation(tmp_path):
    def scenario(side, logdir):
        counting_model()
        operation = v1.summary.merge_all().op

        def train():
            sv = side.Supervisor(logdir=logdir, summary_op=operation, save_model_secs=0)
            with sv.managed_session():
                wait_for_ticks(sv, logdir) if side is OURS else wait_until(sv.should_stop)
            return sv.summary_op is operation

        return outcome(train)

    theirs, ours = both(scenario, tmp_path)
    assert theirs[0] == "raised"
    assert ours == ("returned", True)
    with tf.Graph().as_default():
        model = counting_model()
        with pytest.raises(TypeError, match="summary_op: expected an operation with one output"):
            OURS.Supervisor(logdir=str(tmp_path), summary_op=tf.group(model.weights.initializer))


def test_first_rate(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir)
        with sv.managed_session() as sess:
            wait_for_ticks(sv, logdir)
            for _ in range(3):
                sess.run("train")
        return [(rate > 0, step) for rate, step in rates(logdir)]

    assert both(scenario, tmp_path) == ([(False, 0)], [(True, 3)])


def test_our_files(tmp_path):
    def scenario(side, logdir):
        counting_model()
        one_session(side.Supervisor(logdir=logdir), ticks_in=logdir)
        return sorted(
            path.name for path in Path(logdir).iterdir() if path.name.endswith(".json") or path.name.startswith(".")
        )

    assert both(scenario, tmp_path) == ([], [".stepguard.lock", "model.ckpt-0.manifest.json"])
