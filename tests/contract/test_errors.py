"""Methods in the wrong role or state, and input that cannot be used."""

import gc
from pathlib import Path

import pytest
import tensorflow as tf
from harness import assert_same, counting_model, life, outcome, v1, wait_for_ticks


def test_a_worker_starts_no_standard_services(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, is_chief=False, ready_op=None)
        with sv.prepare_or_wait_for_session() as sess:
            return outcome(lambda: sv.start_standard_services(sess)), outcome(lambda: sv.StartStandardServices(sess))

    assert assert_same(scenario, tmp_path) == (("raised", "RuntimeError"),) * 2


@pytest.mark.parametrize("options", [{"is_chief": False, "ready_op": None}, {}, {"summary_writer": None}], ids=str)
def test_a_summary_needs_a_writer(options, tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(**options)
        with sv.managed_session() as sess:
            return outcome(lambda: sv.summary_computed(sess, b""))

    assert assert_same(scenario, tmp_path) == ("raised", "RuntimeError")


def test_a_worker_gives_up_after_max_wait_secs(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(is_chief=False, recovery_wait_secs=0.02)
        return outcome(lambda: sv.prepare_or_wait_for_session(max_wait_secs=0.1))

    assert assert_same(scenario, tmp_path) == ("raised", "DeadlineExceededError")


def test_a_logdir_that_is_a_file(tmp_path):
    def scenario(side, logdir):
        Path(logdir).write_text("not a folder")
        counting_model()

        def session():
            with side.Supervisor(logdir=logdir).managed_session():
                pass

        return outcome(session)[0], Path(logdir).read_text()

    assert assert_same(scenario, tmp_path) == ("raised", "not a folder")


def test_a_checkpoint_that_lacks_a_variable_is_an_error_and_stays_as_it_is(tmp_path):
    def scenario(side, logdir):
        with tf.Graph().as_default():
            counting_model()
            sv = side.Supervisor(logdir=logdir)
            with sv.managed_session():
                wait_for_ticks(sv, logdir)
        before = {path.name: path.read_bytes() for path in Path(logdir).glob("model.ckpt-0.*")}
        counting_model()
        v1.get_variable("extra", shape=[3])
        sv = side.Supervisor(logdir=logdir)

        def session():
            with sv.managed_session():
                pass

        came_out = outcome(session)[0]
        return came_out, before == {path.name: path.read_bytes() for path in Path(logdir).glob("model.ckpt-0.*")}

    assert assert_same(scenario, tmp_path) == ("raised", True)


def test_an_unknown_master_is_an_error(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir)

        def session():
            with sv.managed_session("nonsense://somewhere"):
                pass

        return outcome(session)[0]

    assert assert_same(scenario, tmp_path) == "raised"


# TensorFlow's Session is left half built, and complains when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_config_of_a_wrong_type_is_an_error(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        result = outcome(lambda: sv.prepare_or_wait_for_session(config="fast"))
        gc.collect()
        return result

    assert assert_same(scenario, tmp_path) == ("raised", "TypeError")


@pytest.mark.filterwarnings("ignore:Attempting to use a closed FileWriter")
def test_methods_after_stop(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)
        with sv.managed_session():
            wait_for_ticks(sv, logdir)
        record = [
            outcome(lambda: sv.summary_computed(None, b"", 1)),
            outcome(sv.request_stop),
            outcome(sv.should_stop),
            outcome(sv.wait_for_stop),
            outcome(sv.stop),
        ]
        return record, life(logdir)

    assert_same(scenario, tmp_path)


def test_an_error_reported_after_the_stop_is_raised_at_once(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        sv.stop()

        def report():
            try:
                raise KeyError
            except KeyError as error:
                sv.request_stop(error)

        return outcome(report)

    assert assert_same(scenario, tmp_path) == ("raised", "KeyError")


def test_queue_runners_that_are_no_list(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor()
        with sv.managed_session() as sess:
            return outcome(lambda: sv.start_queue_runners(sess, 5))

    assert assert_same(scenario, tmp_path) == ("raised", "TypeError")
