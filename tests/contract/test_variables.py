"""What a model can be made of: saved by either side and resumed by either side."""

import itertools

import pytest
import tensorflow as tf
from harness import OURS, SIDES, assert_same, counting_model, run, saved_values, v1, wait_for_ticks, wait_until


def reference_variables():
    v1.get_variable("plain", shape=[2], initializer=v1.ones_initializer(), use_resource=False)


def resource_variables():
    v1.get_variable("plain", shape=[2], initializer=v1.ones_initializer(), use_resource=True)
    tf.Variable([1.0, 2.0], name="eager_style")


def partitioned_variables():
    partitioner = v1.fixed_size_partitioner(2)
    for use_resource in (True, False):
        with v1.variable_scope(f"resource_{use_resource}", use_resource=use_resource):
            v1.get_variable("parts", shape=[4, 3], initializer=v1.ones_initializer(), partitioner=partitioner)


def tables():
    initializer = tf.lookup.KeyValueTensorInitializer(tf.constant(["a", "b"]), tf.constant([1, 2], tf.int64))
    table = tf.lookup.StaticHashTable(initializer, -1)
    mutable = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1, name="mutable")
    v1.add_to_collection("lookup", table.lookup(tf.constant(["b", "z"])))
    v1.add_to_collection("step", mutable.insert(["k"], tf.constant([5], tf.int64)))


def local_variables():
    v1.get_variable("local", initializer=3.0, collections=[v1.GraphKeys.LOCAL_VARIABLES])


def saveable_iterators():
    # An initializable one cannot be restored by any Supervisor: a restore runs before its initializer.
    iterator = v1.data.make_one_shot_iterator(tf.data.Dataset.range(100))
    v1.add_to_collection(v1.GraphKeys.SAVEABLE_OBJECTS, tf.data.experimental.make_saveable_from_iterator(iterator))
    v1.add_to_collection("step", tf.group(iterator.get_next()))


def of_many_types():
    for dtype in (tf.float16, tf.bfloat16, tf.float64, tf.int8, tf.uint8, tf.bool, tf.complex64, tf.string):
        value = tf.constant(["x", "y"]) if dtype == tf.string else tf.cast([1, 0], dtype)
        v1.get_variable(f"of_{dtype.name}", initializer=value, trainable=False)
    v1.get_variable("of_no_size", shape=[0, 3])


KINDS = {
    "reference": reference_variables,
    "resource": resource_variables,
    "partitioned": partitioned_variables,
    "tables": tables,
    "local": local_variables,
    "iterators": saveable_iterators,
    "types": of_many_types,
}


# Theirs after theirs is not ours to test.
PAIRS = [pair for pair in itertools.product(SIDES, SIDES) if OURS in pair]


def values(sess):
    """The values of all variables and look-ups, by name."""
    found = {}
    for variable in [*v1.global_variables(), *v1.local_variables()]:
        found[variable.name] = repr(sess.run(variable))
    found["lookup"] = [sess.run(item).tolist() for item in v1.get_collection("lookup")]
    return found


def train(side, logdir, kind, steps):
    """Resume or begin, train, save by hand; the values found at the start and at the end."""
    with tf.Graph().as_default():
        KINDS[kind]()
        model = counting_model(resource=kind != "reference")
        sv = side.Supervisor(logdir=logdir, save_summaries_secs=0)
        with sv.managed_session() as sess:
            # A tick that resumes may have nothing to save: departure "unchanged_state_is_not_saved_again".
            wait_until(lambda: tf.train.latest_checkpoint(logdir))
            found = values(sess)
            for _ in range(steps):
                sess.run([model.train_op, v1.get_collection("step")])
            left = values(sess)
            sv.saver.save(sess, sv.save_path, global_step=sv.global_step)
    return found, left


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_initialised_trained_and_saved(kind, tmp_path):
    def scenario(side, logdir):
        found, left = train(side, logdir, kind, 2)
        saved = saved_values(tf.train.latest_checkpoint(logdir)) if kind not in ("iterators", "types") else None
        return found, left, saved

    assert_same(scenario, tmp_path)


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda side: side.name)
@pytest.mark.parametrize("kind", KINDS)
def test_either_side_resumes_what_the_other_has_saved(kind, first, second, tmp_path):
    logdir = str(tmp_path / "logdir")
    _, left = run(lambda side, _: train(side, logdir, kind, 2), first, tmp_path)
    found, _ = run(lambda side, _: train(side, logdir, kind, 0), second, tmp_path)
    assert found == left


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
@pytest.mark.parametrize("resource", [True, False])
def test_a_global_step_of_either_type(dtype, resource, tmp_path):
    def scenario(side, logdir):
        step = v1.get_variable(
            "global_step",
            shape=[],
            dtype=dtype,
            initializer=v1.zeros_initializer(),
            use_resource=resource,
            collections=[v1.GraphKeys.GLOBAL_VARIABLES, v1.GraphKeys.GLOBAL_STEP],
        )
        add = v1.assign_add(step, 1)
        sv = side.Supervisor(logdir=logdir)
        with sv.managed_session() as sess:
            wait_for_ticks(sv, logdir)
            sess.run([add])
            return int(sess.run(sv.global_step))

    assert assert_same(scenario, tmp_path) == 1


def test_a_restored_iterator_goes_on_where_it_was(tmp_path):
    def scenario(side, logdir):
        read = []
        for _ in range(2):
            with tf.Graph().as_default():
                iterator = v1.data.make_one_shot_iterator(tf.data.Dataset.range(100))
                saveable = tf.data.experimental.make_saveable_from_iterator(iterator)
                v1.add_to_collection(v1.GraphKeys.SAVEABLE_OBJECTS, saveable)
                get = iterator.get_next()
                counting_model()
                sv = side.Supervisor(logdir=logdir, save_summaries_secs=0, save_model_secs=0)
                with sv.managed_session() as sess:
                    read += [int(sess.run(get)) for _ in range(3)]
                    sv.saver.save(sess, sv.save_path, global_step=sv.global_step)
        return read

    assert assert_same(scenario, tmp_path) == [0, 1, 2, 3, 4, 5]
