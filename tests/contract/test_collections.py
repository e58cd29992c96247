"""What a graph's collections hold comes first, on both sides."""

import pytest
import tensorflow as tf
from harness import assert_same, collections, counting_model, operations, properties, shown, v1

KEYS = v1.GraphKeys


def fill(key, count):
    """Put ``count`` items of the program's own into the collection ``key``."""
    made = []
    for index in range(count):
        if key == KEYS.READY_OP:
            item = v1.report_uninitialized_variables(name=f"my_ready_{index}")
        elif key == KEYS.READY_FOR_LOCAL_INIT_OP:
            item = tf.constant([], tf.string, name=f"my_ready_for_local_{index}")
        elif key == KEYS.INIT_OP:
            item = tf.group(v1.global_variables_initializer(), name=f"my_init_{index}")
        elif key == KEYS.LOCAL_INIT_OP:
            item = tf.no_op(name=f"my_local_init_{index}")
        elif key == KEYS.SAVERS:
            item = v1.train.Saver(name=f"my_saver_{index}")
        else:
            item = v1.summary.scalar(f"my_summary_{index}", 1.0)
        v1.add_to_collection(key, item)
        made.append(item)
    return made


KEYS_OF_PROPERTIES = {
    KEYS.READY_OP: "ready_op",
    KEYS.READY_FOR_LOCAL_INIT_OP: "ready_for_local_init_op",
    KEYS.INIT_OP: "init_op",
    KEYS.LOCAL_INIT_OP: None,
    KEYS.SAVERS: "saver",
    KEYS.SUMMARY_OP: "summary_op",
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("key", KEYS_OF_PROPERTIES)
def test_the_first_of_a_collection_is_taken_and_nothing_is_added(key, count, tmp_path):
    def scenario(side, logdir):
        counting_model()
        made = fill(key, count)
        sv = side.Supervisor(logdir=logdir)
        name = KEYS_OF_PROPERTIES[key]
        is_first = name is None or getattr(sv, name) is made[0]
        with sv.managed_session(start_standard_services=False) as sess:
            weights = sess.run(v1.get_collection(KEYS.GLOBAL_VARIABLES)[0]).tolist()
        graph = v1.get_default_graph()
        return is_first, properties(sv, logdir), collections(graph), operations(graph), weights

    assert assert_same(scenario, tmp_path)[0] is True


@pytest.mark.parametrize("key", [key for key, name in KEYS_OF_PROPERTIES.items() if name])
def test_none_wins_over_a_collection(key, tmp_path):
    def scenario(side, logdir):
        counting_model()
        fill(key, 1)
        return properties(side.Supervisor(logdir=logdir, **{KEYS_OF_PROPERTIES[key]: None}), logdir)

    assert assert_same(scenario, tmp_path)[KEYS_OF_PROPERTIES[key]] is None


def test_the_first_global_step_of_the_collection_is_taken(tmp_path):
    def scenario(side, logdir):
        other = v1.get_variable("counter", shape=[], dtype=tf.int32, initializer=v1.zeros_initializer())
        v1.add_to_collection(KEYS.GLOBAL_STEP, other)
        counting_model()
        sv = side.Supervisor(logdir=logdir)
        return sv.global_step is other, shown(v1.get_collection(KEYS.GLOBAL_STEP))

    assert assert_same(scenario, tmp_path)[0] is True


def test_a_worker_reads_and_fills_the_collections_too(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(is_chief=False)
        return properties(sv, logdir), collections(v1.get_default_graph())

    assert_same(scenario, tmp_path)


def test_an_imported_meta_graph_brings_its_operations_and_its_saver(tmp_path):
    path = str(tmp_path / "model.meta")
    with tf.Graph().as_default():
        model = counting_model()
        v1.add_to_collection("train_op", model.train_op)
        v1.add_to_collection(KEYS.READY_OP, v1.report_uninitialized_variables(name="their_ready"))
        v1.add_to_collection(KEYS.INIT_OP, tf.group(v1.global_variables_initializer(), name="their_init"))
        v1.add_to_collection(KEYS.LOCAL_INIT_OP, tf.no_op(name="their_local_init"))
        v1.add_to_collection(KEYS.SUMMARY_OP, v1.summary.merge_all())
        saver = v1.train.Saver(name="their_saver")
        v1.add_to_collection(KEYS.SAVERS, saver)
        v1.train.export_meta_graph(path, saver_def=saver.as_saver_def())

    def scenario(side, logdir):
        v1.train.import_meta_graph(path)
        before = operations(v1.get_default_graph())
        sv = side.Supervisor(logdir=logdir)
        train_op = v1.get_collection("train_op")[0]
        with sv.managed_session(start_standard_services=False) as sess:
            for _ in range(3):
                sess.run(train_op)
            step = int(sess.run(sv.global_step))
        added = operations(v1.get_default_graph())[len(before) :]
        return properties(sv, logdir), added, step

    record = assert_same(scenario, tmp_path)
    assert record[0]["init_op"] == "their_init"
    assert record[2] == 3
