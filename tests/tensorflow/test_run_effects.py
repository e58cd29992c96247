"""Which runs are steps: those that can change what the saver saves. No other run waits for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tensorflow as tf

from stepguard.tensorflow.checkpoint.snapshot import plan
from stepguard.tensorflow.run_effects import RunKinds, describe

v1 = tf.compat.v1


def kinds_of(graph: tf.Graph, saver: Any = None) -> RunKinds:
    """The kinds of runs of a graph whose model is saved by ``saver``, by default one of all variables."""
    saved = plan(v1.train.Saver() if saver is None else saver, graph)
    assert saved is not None
    return RunKinds(graph, saved.fetches)


def variable(use_resource: bool, name: str = "w", **options: Any) -> Any:
    return v1.get_variable(name, [4, 2], tf.float32, v1.zeros_initializer(), use_resource=use_resource, **options)


# name -> what is run on a variable of shape [4, 2]
CHANGES: dict[str, Callable[[Any], Any]] = {
    "assign": lambda w: v1.assign(w, tf.ones([4, 2])),
    "assign_add": lambda w: w.assign_add(tf.ones([4, 2])),
    "the operation of assign_add": lambda w: w.assign_add(tf.ones([4, 2])).op,
    "assign_sub": lambda w: v1.assign_sub(w, tf.ones([4, 2])),
    "scatter_update": lambda w: v1.scatter_update(w, [0], tf.ones([1, 2])),
    "scatter_nd_add": lambda w: v1.scatter_nd_add(w, [[0]], tf.ones([1, 2])),
    "initializer": lambda w: w.initializer,
    "all initializers": lambda w: v1.global_variables_initializer(),
    "gradient descent": lambda w: v1.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_sum(w**2)),
    "adam": lambda w: v1.train.AdamOptimizer(0.1).minimize(tf.reduce_sum(w**2)),
    "a dense update of an embedding": lambda w: v1.train.AdagradOptimizer(0.1).minimize(
        tf.reduce_sum(tf.nn.embedding_lookup(w, [1]))
    ),
    "an optimizer that only moves its slots": lambda w: _slot_update(w, 0.9),
    "a restore": lambda w: v1.train.Saver([w]).saver_def.restore_op_name,
    "a read after an assign": lambda w: _read_after(w.assign_add(tf.ones([4, 2])), w),
    "an assign in an old tf.cond": lambda w: _with_old_control_flow(
        lambda: v1.cond(tf.constant(True), lambda: tf.identity(v1.assign_add(w, tf.ones([4, 2]))), lambda: w + 0)
    ),
    "an assign fetched in a list": lambda w: [tf.constant(1), [w.assign_add(tf.ones([4, 2]))]],
    "an assign fetched in a dictionary": lambda w: {"loss": tf.constant(1), "train": {"op": w.assign(w + 1).op}},
    "an assign fetched by its name": lambda w: w.assign_add(tf.ones([4, 2]), name="by_name").op.name,
    "a tensor fetched by its name": lambda w: tf.identity(w.assign_add(tf.ones([4, 2])), name="after_assign").name,
    "a group": lambda w: tf.group(tf.no_op(), w.assign_add(tf.ones([4, 2]))),
}

READS: dict[str, Callable[[Any], Any]] = {
    "the variable": lambda w: w,
    "its value": lambda w: w.value(),
    "its read_value": lambda w: w.read_value(),
    "its name": lambda w: w.name,
    "a slice": lambda w: w[1:3],
    "a gather": lambda w: tf.gather(w, [1, 2]),
    "a gather of many dimensions": lambda w: tf.gather_nd(w, [[1, 1]]),
    "an embedding": lambda w: tf.nn.embedding_lookup(w, [0, 3]),
    "a loss": lambda w: tf.reduce_sum(tf.matmul(w, w, transpose_b=True)),
    "a gradient": lambda w: v1.gradients(tf.reduce_sum(w**2), [w]),
    "a sparse gradient": lambda w: v1.gradients(tf.reduce_sum(tf.gather(w, [1])), [w]),
    "a summary": lambda w: v1.summary.merge([v1.summary.histogram("w", w), v1.summary.scalar("s", tf.reduce_sum(w))]),
    "whether it is initialised": v1.is_variable_initialized,
    "what is not initialised": lambda w: v1.report_uninitialized_variables(),
    "a save": lambda w: v1.train.Saver([w]).saver_def.save_tensor_name,
    "a tf.cond": lambda w: tf.cond(tf.constant(True), lambda: tf.reduce_sum(w), lambda: tf.constant(0.0)),
    "a tf.while_loop": lambda w: tf.while_loop(
        lambda i, total: i < 2, lambda i, total: (i + 1, total + tf.reduce_sum(w)), [0, 0.0]
    ),
    "a tf.map_fn": lambda w: tf.map_fn(lambda row: tf.reduce_sum(row * w[0]), w),
    "an old tf.cond": lambda w: _with_old_control_flow(
        lambda: v1.cond(tf.constant(True), lambda: tf.reduce_sum(w), lambda: tf.constant(0.0))
    ),
    "an old tf.while_loop": lambda w: _with_old_control_flow(
        lambda: v1.while_loop(lambda i, total: i < 2, lambda i, total: (i + 1, total + tf.reduce_sum(w)), [0, 0.0])
    ),
    "a constant": lambda w: tf.constant(1),
    "nothing": lambda w: [],
    "a tuple of reads": lambda w: (w, {"sum": tf.reduce_sum(w)}),
    "a sparse tensor": tf.sparse.from_dense,
    "a ragged tensor": lambda w: tf.RaggedTensor.from_row_lengths(tf.reshape(w, [-1]), [3, 5]),
    "indexed slices": lambda w: tf.IndexedSlices(tf.gather(w, [1]), tf.constant([1])),
    "a sparse tensor's value in a dictionary": lambda w: {"sparse": tf.sparse.from_dense(w)},
}


def _slot_update(w: Any, momentum: float) -> Any:
    optimizer = v1.train.MomentumOptimizer(0.1, momentum)
    optimizer.minimize(tf.reduce_sum(w**2))
    return optimizer.get_slot(w, "momentum").assign(tf.ones([4, 2]))


def _read_after(changed: Any, w: Any) -> Any:
    with tf.control_dependencies([changed]):
        return tf.reduce_sum(w.read_value())


def _with_old_control_flow(build: Callable[[], Any]) -> Any:
    is_new = v1.control_flow_v2_enabled()
    v1.disable_control_flow_v2()
    try:
        return build()
    finally:
        if is_new:
            v1.enable_control_flow_v2()


@pytest.fixture(params=[True, False], ids=["resource", "reference"])
def w(request, graph) -> Any:
    """A saved variable of both kinds."""
    return variable(request.param)


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_variable_is_a_step(name, w, graph):
    fetches = CHANGES[name](w)

    assert kinds_of(graph).changes_state(fetches)


@pytest.mark.parametrize("name", READS)
def test_what_reads_a_variable_is_no_step(name, w, graph):
    fetches = READS[name](w)

    assert not kinds_of(graph).changes_state(fetches)


def test_what_changes_only_a_variable_that_is_not_saved_is_no_step(w, graph):
    local = v1.get_variable("seen", [], initializer=v1.zeros_initializer(), collections=[v1.GraphKeys.LOCAL_VARIABLES])
    unsaved = v1.get_variable("unsaved", [], initializer=v1.zeros_initializer())
    kinds = kinds_of(graph, v1.train.Saver([w]))

    assert not kinds.changes_state([local.assign_add(1.0), unsaved.assign_add(1.0), tf.reduce_sum(w)])
    assert kinds.changes_state(w.assign(w + 1))


def test_a_metric_of_local_variables_is_no_step(w, graph):
    with v1.variable_scope("metrics"):
        value, update = v1.metrics.mean(tf.reduce_sum(w))

    assert not kinds_of(graph).changes_state([value, update])


@pytest.mark.parametrize("use_resource", [True, False])
def test_every_part_of_a_partitioned_variable_counts(use_resource, graph):
    whole = variable(use_resource, partitioner=v1.fixed_size_partitioner(2))
    parts = list(whole)
    kinds = kinds_of(graph)

    assert not kinds.changes_state(tf.convert_to_tensor(whole))
    assert not kinds.changes_state([part.value() for part in parts])
    assert kinds.changes_state(parts[1].assign(tf.ones([2, 2])))
    assert kinds.changes_state(v1.train.GradientDescentOptimizer(1.0).minimize(tf.reduce_sum(tf.square(whole))))


class TestQueues:
    """A thread that waits in an enqueue or a dequeue is never waited for: it changes nothing that is saved."""

    def test_their_operations_are_no_steps(self, w, graph):
        queue = v1.FIFOQueue(2, tf.float32, shapes=[()])
        kinds = kinds_of(graph)

        for fetches in (queue.enqueue(1.0), queue.dequeue(), queue.size(), queue.close()):
            assert not kinds.changes_state(fetches)

    def test_an_enqueue_of_what_a_model_has_computed_is_no_step(self, w, graph):
        queue = v1.FIFOQueue(2, tf.float32, shapes=[()])

        assert not kinds_of(graph).changes_state(queue.enqueue(tf.reduce_sum(w)))

    def test_a_training_step_on_what_was_dequeued_is_one(self, w, graph):
        queue = v1.FIFOQueue(2, tf.float32, shapes=[()])
        train = w.assign_add(tf.fill([4, 2], queue.dequeue()))

        assert kinds_of(graph).changes_state(train)

    def test_those_of_queue_runners_are_no_steps(self, w, graph):
        names = v1.train.string_input_producer(["a", "b"])
        v1.train.batch([names.dequeue()], 2)
        kinds = kinds_of(graph)

        runners = v1.get_collection(v1.GraphKeys.QUEUE_RUNNERS)
        assert len(runners) == 2
        for runner in runners:
            for operation in [*runner.enqueue_ops, runner.close_op, runner.cancel_op]:
                assert not kinds.changes_state(operation)

    def test_an_epoch_counter_is_a_local_variable_so_counting_is_no_step(self, w, graph):
        v1.train.string_input_producer(["a", "b"], num_epochs=1)
        (runner,) = v1.get_collection(v1.GraphKeys.QUEUE_RUNNERS)

        assert not kinds_of(graph).changes_state(runner.enqueue_ops)


class TestTables:
    @pytest.fixture
    def table(self, graph) -> Any:
        v1.get_variable("w", [], initializer=v1.zeros_initializer())
        return tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)

    def test_an_insert_into_a_saved_one_is_a_step(self, table, graph):
        kinds = kinds_of(graph)

        assert kinds.changes_state(table.insert(["a"], [1]))
        assert kinds.changes_state(table.remove(tf.constant(["a"])))

    def test_a_look_up_is_none(self, table, graph):
        kinds = kinds_of(graph)

        assert not kinds.changes_state([table.lookup(["a"]), table.size(), table.export()])

    def test_an_insert_into_one_that_is_not_saved_is_none(self, table, graph):
        other = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1, experimental_is_anonymous=False)
        saver = v1.train.Saver([*v1.global_variables(), table._Saveable(table, "table", "table")])

        assert not kinds_of(graph, saver).changes_state(other.insert(["a"], [1]))

    def test_a_fixed_one_is_not_saved(self, graph):
        v1.get_variable("w", [], initializer=v1.zeros_initializer())
        entries = tf.lookup.KeyValueTensorInitializer(["a"], [1])
        table = tf.lookup.StaticHashTable(entries, -1)

        assert not kinds_of(graph).changes_state([v1.tables_initializer(), table.lookup(tf.constant(["a"]))])


class TestIterators:
    def saved(self, graph: tf.Graph, iterator: Any) -> RunKinds:
        saveable = tf.data.experimental.make_saveable_from_iterator(iterator)
        return kinds_of(graph, v1.train.Saver([*v1.global_variables(), saveable]))

    @pytest.fixture
    def dataset(self, graph) -> Any:
        v1.get_variable("w", [], initializer=v1.zeros_initializer())
        return tf.data.Dataset.range(9)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_the_next_element_of_a_saved_one_is_a_step(self, dataset, graph):
        iterator = v1.data.make_initializable_iterator(dataset)
        following = iterator.get_next()
        kinds = self.saved(graph, iterator)

        assert kinds.changes_state(following)
        assert kinds.changes_state(iterator.initializer)

    def test_the_next_element_of_one_that_is_not_saved_is_none(self, dataset, graph):
        following = v1.data.make_initializable_iterator(dataset).get_next()

        assert not kinds_of(graph).changes_state(following)

    def test_the_next_element_through_the_handle_of_a_saved_one_is_a_step(self, dataset, graph):
        """A feedable iterator: which one it steps is known only when it is run."""
        iterator = v1.data.make_initializable_iterator(dataset)
        handle = v1.placeholder(tf.string, [])
        feedable = v1.data.Iterator.from_string_handle(
            handle, v1.data.get_output_types(dataset), v1.data.get_output_shapes(dataset)
        )
        following = feedable.get_next()
        kinds = self.saved(graph, iterator)

        assert kinds.changes_state(following)
        assert not kinds.changes_state(iterator.string_handle())
        assert not kinds_of(graph).changes_state(following)


def test_a_second_operation_for_the_same_variable_is_known_as_it(graph):
    """Two handles of one name are one variable: an imported graph, or a function, may bring the second."""
    w = variable(True)
    again = tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[4, 2], shared_name=w.op.get_attr("shared_name"))
    change = tf.raw_ops.AssignVariableOp(resource=again, value=tf.ones([4, 2]))

    assert kinds_of(graph).changes_state(change)


class TestFunctions:
    """Inside them the handle of a variable is an argument; only resource variables can be changed in one."""

    @pytest.mark.parametrize("changes", [True, False])
    def test_a_tf_function(self, changes, graph):
        w = variable(True)

        @tf.function
        def call() -> Any:
            return tf.reduce_sum(w.assign_add(tf.ones([4, 2])) if changes else w)

        assert kinds_of(graph).changes_state(call()) == changes

    @pytest.mark.parametrize("changes", [True, False])
    def test_a_tf_function_inside_a_tf_cond(self, changes, graph):
        w = variable(True)

        @tf.function
        def call() -> Any:
            return tf.reduce_sum(w.assign_add(tf.ones([4, 2])) if changes else w)

        result = tf.cond(tf.constant(True), call, lambda: tf.constant(0.0))

        assert kinds_of(graph).changes_state(result) == changes

    def test_a_change_in_a_tf_cond(self, graph):
        w = variable(True)
        result = tf.cond(
            tf.constant(True), lambda: tf.reduce_sum(w.assign_add(tf.ones([4, 2]))), lambda: tf.constant(0.0)
        )

        assert kinds_of(graph).changes_state(result)

    def test_a_change_in_a_tf_while_loop(self, graph):
        w = variable(True)

        def count_and_raise(count: Any) -> Any:
            with tf.control_dependencies([w.assign_add(tf.ones([4, 2]))]):
                return count + 1

        assert kinds_of(graph).changes_state(tf.while_loop(lambda count: count < 2, count_and_raise, [0]))


def test_what_cannot_be_looked_at_is_taken_for_a_step(w, graph):
    assert kinds_of(graph).changes_state(object())
    assert kinds_of(graph).changes_state("no/such/operation")


def test_an_operation_that_was_added_later_is_looked_at_too(w, graph):
    kinds = kinds_of(graph)
    assert not kinds.changes_state(w)

    assert kinds.changes_state(w.assign(w + 1))


def test_a_list_that_the_program_changes_is_looked_at_again(w, graph):
    fetches = [tf.constant(1)]
    kinds = kinds_of(graph)
    assert not kinds.changes_state(fetches)
    fetches.append(w.assign(w + 1))

    assert kinds.changes_state(fetches)


def test_new_lists_at_each_step_do_not_fill_the_memory(w, graph):
    kinds = kinds_of(graph)
    constants = [tf.constant(number) for number in range(70)]

    for first in constants:
        for second in constants:
            assert not kinds.changes_state([first, second])

    assert len(kinds._known) <= 4096


def test_a_run_is_described_by_the_names_that_it_fetches(graph):
    fetches = {"a": tf.constant(1, name="one"), "b": [tf.no_op("two"), "three:0", tf.constant(4, name="four")]}

    assert describe(fetches) == "[one:0, two, three:0, and 1 more]"
