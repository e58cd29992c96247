"""The NaN guard on TensorFlow: what it looks at, what it puts back, and that it costs nothing where it is off."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from graphs import committed, counting_step, wait_until
from tensorflow.core.protobuf.config_pb2 import CallableOptions

from stepguard import NonFiniteError
from stepguard.options import Guarding, Saving
from stepguard.store import CheckpointStore, tensorflow_files
from stepguard.tensorflow import Supervisor
from stepguard.tensorflow.checkpoint import snapshot as snapshots
from stepguard.tensorflow.scalars import is_finite, of_run, of_summary

v1 = tf.compat.v1
NAN = math.nan


class Fed:
    """A step that returns the loss it is fed."""

    def __init__(self, logdir: Path | None, **options: Any) -> None:
        self.train = counting_step()
        self.given = v1.placeholder(tf.float32, [], name="given")
        with tf.control_dependencies([self.train]):
            self.loss = tf.identity(self.given, name="loss")
        options = {"save_summaries_secs": 0, "save_model_secs": 0, "saving": Saving(save_model_steps=5), **options}
        self.sv = Supervisor(logdir=logdir, **options)
        self.logdir = logdir

    def steps(self, session: Any, count: int, loss: float = 0.0) -> None:
        for _ in range(count):
            session.run([self.train, self.loss], {self.given: loss})

    def steps_until_saved(self, session: Any, step: int) -> None:
        self.steps(session, step - int(session.run(self.sv.global_step)))
        wait_until(lambda: step in committed(self.logdir) and not self.sv._saving.writer.busy, f"checkpoint {step}")


def fetches(fed: Fed) -> dict[str, Any]:
    return {
        "tensor": fed.loss,
        "list": [fed.train, fed.loss],
        "dictionary": {"train": fed.train, "all": {"loss": fed.loss}},
        "name": "loss:0",
    }


@pytest.mark.parametrize("kind", ["tensor", "list", "dictionary", "name"])
def test_a_loss_that_a_step_returns_stops_the_run(graph, kind, tmp_path):
    fed = Fed(tmp_path, guarding=Guarding(nan_guard="stop"))
    with pytest.raises(NonFiniteError, match=r"loss:0 is nan at step 2") as caught, fed.sv.managed_session() as session:
        fed.steps(session, 1)
        session.run(fetches(fed)[kind], {fed.given: NAN})
        while True:
            fed.steps(session, 1)

    assert caught.value.names == ("loss:0",)
    assert committed(tmp_path) == []


@pytest.mark.parametrize("way", ["without feeds", "with feeds", "as Keras does"])
def test_so_does_one_that_a_callable_returns(graph, way, tmp_path):
    count = counting_step()
    given = v1.placeholder_with_default(tf.constant(NAN), [], name="given")
    with tf.control_dependencies([count]):
        loss = tf.identity(given, name="loss")
    sv = Supervisor(logdir=tmp_path, guarding=Guarding(nan_guard="stop"), save_model_secs=0)
    with pytest.raises(NonFiniteError, match="loss:0 is nan at step 1"), sv.managed_session() as session:
        if way == "with feeds":
            session.make_callable([loss], [given])(NAN)
        elif way == "as Keras does":
            session._make_callable_from_options(CallableOptions(fetch=["loss:0"], target=[count.name]))()
        else:
            session.make_callable([loss])()
        while True:
            session.run(count)


def test_a_number_of_a_run_that_is_no_step_is_the_programs_own_affair(graph, tmp_path):
    fed = Fed(tmp_path, guarding=Guarding(nan_guard="stop"))
    with fed.sv.managed_session() as session:
        assert math.isnan(session.run(fed.given, {fed.given: NAN}))
        fed.steps(session, 1)

    assert committed(tmp_path) == [1]


def test_what_the_summary_service_computes_is_looked_at(graph, tmp_path):
    v1.summary.scalar("accuracy", tf.constant(NAN))
    fed = Fed(tmp_path, guarding=Guarding(nan_guard="stop"), save_summaries_secs=0.01)
    with pytest.raises(NonFiniteError, match="accuracy is nan"), fed.sv.managed_session() as session:
        while True:
            fed.steps(session, 1)


def test_the_next_step_after_a_loss_that_is_not_finite_is_one_of_the_model_put_back(graph, tmp_path):
    fed = Fed(tmp_path, guarding=Guarding(nan_guard="return"))
    with fed.sv.managed_session() as session:
        fed.steps_until_saved(session, 5)
        fed.steps(session, 2)
        done = session.boundary.steps
        fed.steps(session, 1, loss=NAN)
        # What restores is no step: nothing that is due after so many steps may come in between.
        assert session.boundary.steps == done + 1
        assert session.run(fed.sv.global_step) == 5
        assert session.run(v1.global_variables("w")[0]).tolist() == [5.0, 5.0]
        fed.steps_until_saved(session, 10)

    # TensorBoard drops the steps behind a START.
    starts = [
        event.step
        for path in sorted(tmp_path.glob("events.*"))
        for event in v1.train.summary_iterator(str(path))
        if event.HasField("session_log") and event.session_log.status == v1.SessionLog.START
    ]
    assert starts == [0, 5]


def test_what_the_program_has_saved_by_its_saver_is_not_returned_to(graph, tmp_path):
    fed = Fed(tmp_path, guarding=Guarding(nan_guard="return"))
    with fed.sv.managed_session() as session:
        fed.steps_until_saved(session, 5)
        fed.steps(session, 2)
        fed.sv.saver.save(session, fed.sv.save_path, fed.sv.global_step)
        assert tf.train.latest_checkpoint(tmp_path).endswith("-7")
        fed.steps(session, 1, loss=NAN)
        assert session.run(fed.sv.global_step) == 5
        fed.steps(session, 1)


def test_local_variables_and_the_program_s_feeds_go_on(graph, tmp_path):
    seen = v1.get_local_variable("seen", [], tf.int32, v1.zeros_initializer())
    count = seen.assign_add(1).op
    fed = Fed(tmp_path, guarding=Guarding(nan_guard="return"))
    with fed.sv.managed_session() as session:
        session.run(count)
        fed.steps_until_saved(session, 5)
        session.run(count)
        fed.steps(session, 1, loss=NAN)
        assert session.run([seen, fed.sv.global_step]) == [2, 5]
        fed.steps(session, 1)


def test_a_session_without_the_guard_is_as_it_was(graph, tmp_path):
    fed = Fed(tmp_path)
    with fed.sv.managed_session() as session:
        assert not {"run", "partial_run", "make_callable"} & set(vars(session))


def test_a_closed_session_is_watched_no_longer(graph, tmp_path):
    fed = Fed(tmp_path, guarding=Guarding(nan_guard="stop"))
    with fed.sv.managed_session() as session:
        assert "run" in vars(session)
        session.close()
        assert "run" not in vars(session)


def test_a_model_that_is_shared_is_not_put_back(graph, tmp_path):
    fed = Fed(tmp_path, guarding=Guarding(nan_guard="return"))
    with pytest.raises(RuntimeError, match="the master is 'local'"):
        fed.sv.prepare_or_wait_for_session("local")
    fed.sv.summary_writer.close()


def test_a_worker_can_stop_and_not_return(graph):
    with tf.device("/cpu:0"):
        counting_step()
    with pytest.raises(ValueError, match="a chief with a logdir"):
        Supervisor(is_chief=False, guarding=Guarding(nan_guard="return"))


def test_a_saver_that_writes_by_means_of_its_own_is_refused(graph, tmp_path):
    class OwnSaver(v1.train.Saver):
        def save(self, *args: Any, **kwargs: Any) -> Any:
            return super().save(*args, **kwargs)

    counting_step()
    with pytest.raises(ValueError, match="this saver writes by means of its own"):
        Supervisor(logdir=tmp_path, saver=OwnSaver(), guarding=Guarding(nan_guard="stop"))


def test_what_the_saver_has_to_write_itself_is_put_into_quarantine(graph, tmp_path, monkeypatch):
    # As if the tensors did not fit into one message.
    monkeypatch.setattr(snapshots, "_LARGEST_MESSAGE_BYTES", 0)
    fed = Fed(tmp_path, guarding=Guarding(nan_guard="stop"))
    graph._unsafe_unfinalize()
    spoil = v1.global_variables("w")[0].assign([NAN, 0.0])
    graph.finalize()
    with pytest.raises(NonFiniteError, match="not finite at step 10: w"), fed.sv.managed_session("local") as session:
        fed.steps_until_saved(session, 5)
        session.run(spoil)
        fed.steps(session, 5)
        wait_until(fed.sv.should_stop, "the stop")

    assert committed(tmp_path) == [5]
    assert not list(tmp_path.glob("model.ckpt-10*"))
    assert "not finite" in (tmp_path / "quarantine" / "model.ckpt-10" / "reason.txt").read_text()
    assert tf.train.latest_checkpoint(tmp_path) == str(tmp_path / "model.ckpt-5")
    assert CheckpointStore(tmp_path, saver_files=tensorflow_files).newest_good().checkpoint.step == 5


class TestNumbers:
    def test_of_a_run_are_its_scalar_floats(self):
        half = tf.bfloat16.as_numpy_dtype(NAN)
        result = {"a": np.float32(1), "b": [np.float64(2), (np.array(3.0), half)], "c": 4, "d": b"5", "e": np.ones(2)}
        found = of_run({"a": "A", "b": ["B", ("C", "D")], "c": "E", "d": "F", "e": "G"}, result)
        assert math.isnan(found.pop("D"))
        assert found == {"A": 1.0, "B": 2.0, "C": 3.0}

    def test_of_a_summary_are_its_scalars(self):
        summary = v1.Summary()
        summary.value.add(tag="old", simple_value=1.5)
        summary.value.add(tag="new").tensor.CopyFrom(tf.make_tensor_proto(2.5))
        summary.value.add(tag="wide").tensor.CopyFrom(tf.make_tensor_proto([1.0, NAN]))
        summary.value.add(tag="text").tensor.CopyFrom(tf.make_tensor_proto("x"))
        summary.value.add(tag="bars").histo.min = 1.0
        assert of_summary(summary) == of_summary(summary.SerializeToString()) == {"old": 1.5, "new": 2.5}

    @pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.complex64])
    @pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
    def test_of_every_type_of_floats_are_told_apart(self, dtype, bad):
        array = np.zeros([3, 2], dtype.as_numpy_dtype)
        assert is_finite(array)
        array[1, 1] = bad
        assert not is_finite(array)

    def test_there_may_be_none(self):
        assert is_finite(np.zeros([0], np.float32))
