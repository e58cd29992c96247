"""A snapshot holds what the graph's own save operation would write, and is written as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from graphs import committed, counting_step, wait_until

from stepguard.options import Saving
from stepguard.tensorflow import Supervisor
from stepguard.tensorflow.checkpoint.files import write_bundle
from stepguard.tensorflow.checkpoint.snapshot import TensorSnapshot, as_step, plan

v1 = tf.compat.v1


def snapshot_and_write(session: Any, saver: Any, prefix: Path) -> TensorSnapshot:
    """Take what ``saver`` saves out of the session, and write it to ``prefix``."""
    save_plan = plan(saver, session.graph)
    assert save_plan is not None
    snapshot = save_plan.take(session.run, None)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    write_bundle(prefix, save_plan.sharded(snapshot))
    return snapshot


def content(prefix: Path) -> dict[str, Any]:
    reader = tf.train.load_checkpoint(str(prefix))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def assert_same_content(ours: Path, theirs: Path) -> None:
    ours_by_name, theirs_by_name = content(ours), content(theirs)
    assert ours_by_name.keys() == theirs_by_name.keys()
    for name, value in theirs_by_name.items():
        found = ours_by_name[name]
        assert np.asarray(found).dtype == np.asarray(value).dtype
        np.testing.assert_array_equal(found, value)


TYPES = [
    tf.float16,
    tf.bfloat16,
    tf.float32,
    tf.float64,
    tf.int8,
    tf.int16,
    tf.int32,
    tf.int64,
    tf.uint8,
    tf.uint16,
    tf.uint32,
    tf.uint64,
    tf.bool,
    tf.complex64,
    tf.complex128,
    tf.string,
]


def example(dtype: Any, shape: tuple[int, ...]) -> Any:
    count = int(np.prod(shape))
    if dtype == tf.string:
        texts = [f"text {number} \0 ü".encode() * (number + 1) for number in range(count)]
        return np.array(texts, dtype=object).reshape(shape)
    numbers = np.arange(1, count + 1).reshape(shape)
    if dtype.is_complex:
        return (numbers + 2j * numbers).astype(dtype.as_numpy_dtype)
    if dtype == tf.bool:
        return numbers % 2 == 1
    return numbers.astype(dtype.as_numpy_dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.name)
def test_every_type_and_shape_is_written_as_the_saver_writes_it(dtype, graph, tmp_path):
    for index, shape in enumerate([(), (3,), (2, 3), (0,), (2, 0, 3)]):
        # Not through an initial value: that is a constant, and the graph would hold the bytes.
        v1.get_variable(f"v{index}", initializer=tf.constant(example(dtype, shape), dtype, shape), use_resource=True)
    saver = v1.train.Saver()

    with v1.Session(graph=graph) as session:
        session.run(v1.global_variables_initializer())
        saver.save(session, str(tmp_path / "theirs"), write_meta_graph=False)
        snapshot_and_write(session, saver, tmp_path / "ours" / "model.ckpt")

    assert_same_content(tmp_path / "ours" / "model.ckpt", tmp_path / "theirs")


def test_a_reference_variable_that_changes_later_does_not_change_the_snapshot(graph, tmp_path):
    w = v1.get_variable("w", [1000], initializer=v1.zeros_initializer(), use_resource=False)
    saver = v1.train.Saver()
    save_plan = plan(saver, graph)
    assert save_plan is not None
    with v1.Session(graph=graph) as session:
        session.run(w.initializer)
        snapshot = save_plan.take(session.run, None)
        session.run(v1.assign_add(w, np.ones(1000)))

    assert np.all(snapshot.tensors[0] == 0)


def test_the_size_of_a_snapshot_is_that_of_its_tensors(graph):
    v1.get_variable("a", [10, 3], tf.float32, v1.zeros_initializer())
    v1.get_variable("b", [5], tf.int64, v1.zeros_initializer())
    with v1.Session(graph=graph) as session:
        session.run(v1.global_variables_initializer())
        snapshot = plan(v1.train.Saver(), graph).take(session.run, None)

    assert snapshot.nbytes == 10 * 3 * 4 + 5 * 8


@pytest.mark.parametrize("value", [7, np.int32(7), np.array([7]), np.array(7, np.int64)])
def test_a_global_step_is_a_number_whatever_its_rank(value):
    assert as_step(value) == 7


class TestSavers:
    """Whatever a Saver was configured with: its own checkpoint and ours hold the same."""

    def compare(self, graph: tf.Graph, saver: Any, tmp_path: Path, **feeds: Any) -> dict[str, Any]:
        with v1.Session(graph=graph) as session:
            session.run([v1.global_variables_initializer(), v1.tables_initializer()])
            for operation in feeds.get("after", ()):
                session.run(operation)
            saver.save(session, str(tmp_path / "theirs"), write_meta_graph=False)
            snapshot_and_write(session, saver, tmp_path / "ours" / "model.ckpt")
        assert_same_content(tmp_path / "ours" / "model.ckpt", tmp_path / "theirs")
        return content(tmp_path / "ours" / "model.ckpt")

    def test_of_some_variables(self, graph, tmp_path):
        a = v1.get_variable("a", initializer=1.0)
        v1.get_variable("b", initializer=2.0)

        assert self.compare(graph, v1.train.Saver([a]), tmp_path) == {"a": 1.0}

    def test_with_names_of_its_own(self, graph, tmp_path):
        a = v1.get_variable("a", initializer=1.0)

        assert self.compare(graph, v1.train.Saver({"other/name": a}), tmp_path) == {"other/name": 1.0}

    @pytest.mark.parametrize("use_resource", [True, False])
    def test_of_partitioned_variables(self, use_resource, graph, tmp_path):
        rows = np.arange(14.0).reshape(7, 2)
        v1.get_variable(
            "rows",
            initializer=tf.constant(rows),
            partitioner=v1.fixed_size_partitioner(3),
            use_resource=use_resource,
        )

        found = self.compare(graph, v1.train.Saver(), tmp_path)

        np.testing.assert_array_equal(found["rows"], rows)

    def test_that_shard(self, graph, tmp_path):
        for index in range(4):
            with tf.device(f"/cpu:{index % 2}"):
                v1.get_variable(f"v{index}", initializer=float(index))
        saver = v1.train.Saver(sharded=True)
        config = v1.ConfigProto(device_count={"CPU": 2})
        with v1.Session(graph=graph, config=config) as session:
            session.run(v1.global_variables_initializer())
            saver.save(session, str(tmp_path / "theirs"), write_meta_graph=False)
            snapshot_and_write(session, saver, tmp_path / "ours" / "model.ckpt")

        assert_same_content(tmp_path / "ours" / "model.ckpt", tmp_path / "theirs")
        shards = sorted(path.name for path in (tmp_path / "ours").glob("*.data-*"))
        assert shards == ["model.ckpt.data-00000-of-00002", "model.ckpt.data-00001-of-00002"]

    def test_of_tables(self, graph, tmp_path):
        table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1, name="table", checkpoint=False)
        v1.get_variable("a", initializer=1.0)
        saver = v1.train.Saver([*v1.global_variables(), table._Saveable(table, "table", "table")])

        found = self.compare(graph, saver, tmp_path, after=[table.insert(["x", "y"], [1, 2])])

        assert dict(zip(found["table-keys"], found["table-values"], strict=True)) == {b"x": 1, b"y": 2}

    def test_that_save_in_their_own_way_are_left_to_do_so(self, graph):
        v1.get_variable("a", initializer=1.0)

        class OwnWay(v1.train.Saver):
            def save(self, *arguments: Any, **options: Any) -> Any:
                return super().save(*arguments, **options)

        class NoSaver:
            def save(self, sess: Any, save_path: str, global_step: Any = None) -> str:
                return save_path

        assert plan(OwnWay(), graph) is None
        assert plan(NoSaver(), graph) is None
        assert plan(v1.train.Saver(write_version=v1.train.SaverDef.V1), graph) is None


def test_a_saved_iterator_goes_on_where_it_was(graph, tmp_path):
    iterator = v1.data.make_initializable_iterator(tf.data.Dataset.range(100).map(lambda x: 2 * x))
    following = iterator.get_next()
    saveable = tf.data.experimental.make_saveable_from_iterator(iterator)
    saver = v1.train.Saver([saveable])
    prefix = tmp_path / "ours" / "model.ckpt"

    with v1.Session(graph=graph) as session:
        session.run(iterator.initializer)
        assert [session.run(following) for _ in range(3)] == [0, 2, 4]
        snapshot_and_write(session, saver, prefix)
        assert session.run(following) == 6
    with v1.Session(graph=graph) as session:
        session.run(iterator.initializer)
        saver.restore(session, str(prefix))

        assert session.run(following) == 6


def test_many_tensors_are_written_in_one_checkpoint(graph, tmp_path):
    for index in range(300):
        v1.get_variable(f"v{index}", initializer=tf.fill([index % 5], float(index)))
    saver = v1.train.Saver()
    with v1.Session(graph=graph) as session:
        session.run(v1.global_variables_initializer())
        saver.save(session, str(tmp_path / "theirs"), write_meta_graph=False)
        snapshot_and_write(session, saver, tmp_path / "ours" / "model.ckpt")

    assert_same_content(tmp_path / "ours" / "model.ckpt", tmp_path / "theirs")


class TestOurCheckpointsAreOrdinaryOnes:
    @pytest.fixture
    def logdir(self, tmp_path) -> Path:
        """Five steps of a run of ours."""
        with tf.Graph().as_default():
            step = counting_step()
            with Supervisor(logdir=str(tmp_path)).managed_session() as session:
                wait_until(lambda: committed(tmp_path) == [0], "the first checkpoint")
                for _ in range(5):
                    session.run(step)
        return tmp_path

    def test_the_latest_is_found(self, logdir):
        assert tf.train.latest_checkpoint(str(logdir)) == str(logdir / "model.ckpt-5")
        state = v1.train.get_checkpoint_state(str(logdir))
        assert list(state.all_model_checkpoint_paths) == [str(logdir / f"model.ckpt-{step}") for step in (0, 5)]

    def test_load_checkpoint_and_list_variables_read_it(self, logdir):
        reader = tf.train.load_checkpoint(str(logdir))

        assert reader.get_tensor("global_step") == 5
        assert tf.train.list_variables(str(logdir)) == [("global_step", []), ("w", [2])]

    def test_a_saver_restores_it(self, logdir, graph):
        counting_step()
        with v1.Session(graph=graph) as session:
            v1.train.Saver().restore(session, str(logdir / "model.ckpt-5"))

            assert session.run(v1.global_variables()[0]).tolist() == [5, 5]

    def test_its_meta_graph_brings_the_model_and_its_saver(self, logdir, graph):
        saver = v1.train.import_meta_graph(str(logdir / "model.ckpt-5.meta"))
        with v1.Session(graph=graph) as session:
            saver.restore(session, str(logdir / "model.ckpt-5"))

            assert session.run(v1.train.get_global_step()) == 5

    def test_tensorflows_own_supervisor_goes_on_from_it(self, logdir, graph):
        step = counting_step()
        supervisor = v1.train.Supervisor(logdir=str(logdir), save_model_secs=0, save_summaries_secs=0)
        with supervisor.managed_session() as session:
            session.run(step)
            assert session.run(v1.train.get_global_step()) == 6
            supervisor.saver.save(session, supervisor.save_path, global_step=6)

        with tf.Graph().as_default():
            step = counting_step()
            with Supervisor(logdir=str(logdir)).managed_session() as session:
                assert session.run(v1.train.get_global_step()) == 6

    def test_the_program_may_save_by_itself_as_well(self, tmp_path, graph):
        step = counting_step()
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=3600)
        with supervisor.managed_session() as session:
            wait_until(lambda: committed(tmp_path) == [0], "the first checkpoint")
            for number in range(1, 8):
                session.run(step)
                supervisor.saver.save(session, supervisor.save_path, global_step=number)

        kept = sorted(int(path.name[len("model.ckpt-") : -len(".index")]) for path in tmp_path.glob("*.index"))
        assert kept == [3, 4, 5, 6, 7]
        assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "model.ckpt-7")
        with tf.Graph().as_default():
            counting_step()
            with Supervisor(logdir=str(tmp_path)).managed_session() as session:
                assert session.run(v1.train.get_global_step()) == 7

    @pytest.mark.parametrize("last_save", ["a commit follows", "none follows"])
    def test_what_the_programs_saver_removes_goes_with_its_manifest(self, last_save, tmp_path, graph):
        step = counting_step()
        saver = v1.train.Saver(max_to_keep=2)
        supervisor = Supervisor(logdir=str(tmp_path), saver=saver, save_model_secs=0, saving=Saving(save_model_steps=1))
        with supervisor.managed_session() as session:
            for number in (1, 2):
                session.run(step)
                wait_until(
                    lambda due=number: committed(tmp_path)[-1:] == [due] and not supervisor._saving.writer.busy,
                    "a checkpoint",
                )
            # Its saver keeps two, and removes model.ckpt-1.
            saver.save(session, str(tmp_path / "by_hand"))
            assert not (tmp_path / "model.ckpt-1.index").exists()
            if last_save == "a commit follows":
                session.run(step)
                wait_until(lambda: committed(tmp_path)[-1:] == [3], "a checkpoint")
                wait_until(lambda: not (tmp_path / "model.ckpt-1.manifest.json").exists(), "the manifest's end")

        assert not (tmp_path / "model.ckpt-1.manifest.json").exists()
        assert committed(tmp_path) == ([2, 3] if last_save == "a commit follows" else [2])

    def test_the_options_of_the_saver_hold(self, tmp_path, graph):
        step = counting_step()
        saver = v1.train.Saver(max_to_keep=2, save_relative_paths=True, pad_step_number=True)
        supervisor = Supervisor(logdir=str(tmp_path), saver=saver, save_model_secs=0, saving=Saving(save_model_steps=1))
        with supervisor.managed_session() as session:
            for number in range(1, 5):
                session.run(step)
                wait_until(
                    lambda due=number: committed(tmp_path)[-1:] == [due] and not supervisor._saving.writer.busy,
                    "a checkpoint",
                )

        assert sorted(path.name for path in tmp_path.glob("*.index")) == [
            "model.ckpt-00000003.index",
            "model.ckpt-00000004.index",
        ]
        text = (tmp_path / "checkpoint").read_text()
        assert 'model_checkpoint_path: "model.ckpt-00000004"' in text
        assert str(tmp_path) not in text
        with tf.Graph().as_default():
            counting_step()
            with Supervisor(logdir=str(tmp_path)).managed_session() as session:
                assert session.run(v1.train.get_global_step()) == 4
