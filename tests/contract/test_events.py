"""What a run leaves behind: event records, checkpoints, graph.pbtxt, and the order in which they are written."""

from pathlib import Path

import pytest
import tensorflow as tf
from google.protobuf import text_format
from harness import (
    RecordingWriter,
    assert_same,
    checkpoint_state,
    counting_model,
    event_files,
    events,
    files,
    life,
    outcome,
    v1,
    wait_for_next_second,
    wait_for_ticks,
)


def train(side, logdir, steps=0, **options):
    """A session that waits for its first ticks."""
    counting_model()
    sv = side.Supervisor(logdir=logdir, **options)
    with sv.managed_session() as sess:
        wait_for_ticks(sv, logdir)
        for _ in range(steps):
            sess.run("train")
    return sv


def test_the_life_of_a_plain_run(tmp_path):
    def scenario(side, logdir):
        train(side, logdir)
        return life(logdir), files(logdir), checkpoint_state(logdir)

    (records,), names, state = assert_same(scenario, tmp_path)
    assert [record[0] for record in records[:4]] == ["file_version", "graph_def", "meta_graph_def", "session_log"]
    assert records[3][1:] == ("START", 0, "", "")
    assert records[4] == {"CHECKPOINT", ("summary", (("loss", 0.0),), 0)}
    assert records[5:] == [("session_log", "STOP", 0, "", "")]
    assert "graph.pbtxt" in names
    assert state[0] == "LOGDIR/model.ckpt-0"


@pytest.mark.parametrize(
    "options",
    [
        {"save_summaries_secs": 0},
        {"save_summaries_secs": None},
        {"save_model_secs": 0},
        {"save_model_secs": None},
        {"save_model_secs": 0, "save_summaries_secs": 0},
        {"summary_op": None},
        {"saver": None},
        {"summary_op": None, "saver": None},
        {"global_step": None},
        {"summary_writer": None},
        {"summary_writer": None, "saver": None},
        {"summary_writer": None, "global_step": None},
        {"save_model_secs": 0, "global_step": None},
        {"checkpoint_basename": "net"},
    ],
    ids=str,
)
def test_each_service_can_be_switched_off(options, tmp_path):
    def scenario(side, logdir):
        train(side, logdir, **options)
        return life(logdir), files(logdir), checkpoint_state(logdir)

    assert_same(scenario, tmp_path)


def test_a_model_without_steps_or_summaries(tmp_path):
    def scenario(side, logdir):
        counting_model(step=False, summary=False)
        sv = side.Supervisor(logdir=logdir)
        with sv.managed_session():
            wait_for_ticks(sv, logdir)
        return life(logdir), files(logdir), checkpoint_state(logdir)

    assert assert_same(scenario, tmp_path)[2][0] == "LOGDIR/model.ckpt"


def test_without_standard_services_only_the_graph_is_written(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)
        with sv.managed_session(start_standard_services=False):
            pass
        return life(logdir), files(logdir)

    (records,), _ = assert_same(scenario, tmp_path)
    assert [record[0] for record in records] == ["file_version", "graph_def", "meta_graph_def", "session_log"]


def test_a_worker_writes_nothing(tmp_path):
    def scenario(side, logdir):
        counting_model()
        writer = v1.summary.FileWriter(logdir + "/given")
        sv = side.Supervisor(logdir=logdir, is_chief=False, summary_writer=writer, ready_op=None)
        with sv.managed_session():
            pass
        writer.close()
        return files(logdir), life(logdir + "/given")

    assert_same(scenario, tmp_path)


def test_without_a_logdir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def scenario(side, logdir):
        model = counting_model()
        sv = side.Supervisor()
        with sv.managed_session() as sess:
            sess.run(model.train_op)
            step = int(sess.run(sv.global_step))
        return step, files(str(tmp_path))

    assert assert_same(scenario, tmp_path) == (1, [])


def test_a_given_writer_is_asked_in_the_same_order(tmp_path):
    def scenario(side, logdir):
        counting_model()
        writer = RecordingWriter(logdir + "/mine")
        sv = side.Supervisor(logdir=logdir, summary_writer=writer)
        with sv.managed_session():
            wait_for_ticks(sv, logdir)
        return writer.order, life(logdir + "/mine"), files(logdir)

    order = assert_same(scenario, tmp_path)[0]
    assert order == [
        "reopen",
        "add_graph True None",
        "add_meta_graph None",
        "add_session_log START 0",
        "add_session_log STOP None",
        "close",
    ]


def test_a_writer_can_be_given_without_a_logdir(tmp_path):
    def scenario(side, logdir):
        counting_model()
        writer = RecordingWriter(logdir)
        sv = side.Supervisor(summary_writer=writer)
        with sv.managed_session() as sess:
            sv.summary_computed(sess, sess.run(sv.summary_op))
        return writer.order, life(logdir), files(logdir)

    assert_same(scenario, tmp_path)


@pytest.mark.parametrize("how", ["managed_session", "stop"])
def test_the_writer_can_be_left_open(how, tmp_path):
    def scenario(side, logdir):
        counting_model()
        writer = RecordingWriter(logdir)
        sv = side.Supervisor(logdir=logdir, summary_writer=writer)
        if how == "managed_session":
            with sv.managed_session(close_summary_writer=False):
                wait_for_ticks(sv, logdir)
        else:
            with sv.prepare_or_wait_for_session():
                wait_for_ticks(sv, logdir)
                sv.stop(close_summary_writer=False)
        writer.flush()
        order, told = writer.order, life(logdir)
        writer.close()
        return order, told

    assert "close" not in assert_same(scenario, tmp_path)[0]


def test_the_graph_of_the_events_is_the_graph_of_the_session(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)
        with sv.managed_session(start_standard_services=False):
            pass
        names = [operation.name for operation in v1.get_default_graph().get_operations()]
        text = text_format.Parse(Path(logdir, "graph.pbtxt").read_text(), v1.GraphDef())
        record = [[node.name for node in text.node] == names, "_output_shapes" in text.node[0].attr]
        for event in v1.train.summary_iterator(event_files(logdir)[0]):
            if event.WhichOneof("what") == "graph_def":
                graph_def = v1.GraphDef.FromString(event.graph_def)
                record += [[node.name for node in graph_def.node] == names, "_output_shapes" in graph_def.node[0].attr]
            elif event.WhichOneof("what") == "meta_graph_def":
                meta = v1.MetaGraphDef.FromString(event.meta_graph_def)
                record += [sorted(meta.collection_def), meta.saver_def.save_tensor_name, len(meta.graph_def.node) > 0]
        return record

    record = assert_same(scenario, tmp_path)
    assert record[:4] == [True, True, True, True]


def test_a_resumed_run_starts_at_its_step(tmp_path):
    def scenario(side, logdir):
        with tf.Graph().as_default():
            sv = train(side, logdir, save_model_secs=0)
            with sv.prepare_or_wait_for_session(start_standard_services=False) as sess:
                for _ in range(4):
                    sess.run("train")
                sv.saver.save(sess, sv.save_path, global_step=sv.global_step)
            sv.stop()
        wait_for_next_second()
        train(side, logdir, save_model_secs=0)
        return life(logdir)[-1]

    told = assert_same(scenario, tmp_path)
    assert ("session_log", "START", 4, "", "") in told
    assert ("summary", (("loss", 8.0),), 4) in told[4]


def test_a_supervisor_that_was_stopped_can_be_used_again(tmp_path):
    def scenario(side, logdir):
        sv = train(side, logdir, save_model_secs=0)
        stopped = sv.should_stop()
        wait_for_next_second()
        with sv.managed_session():
            running = sv.should_stop()
            wait_for_ticks(sv, logdir)
        return life(logdir), stopped, running

    lives, stopped, running = assert_same(scenario, tmp_path)
    assert len(lives) == 2
    assert lives[0] == lives[1]
    assert (stopped, running) == (True, False)


def test_services_tick_again(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_summaries_secs=0.05, save_model_secs=0.05)
        with sv.managed_session() as sess:
            for _ in range(3):
                wait_for_ticks(sv, logdir)
                before = len(events(logdir)[0])
                while len(events(logdir)[0]) < before + 6:
                    sess.run("train")
                    sv.summary_writer.flush()
        told = events(logdir)[0]
        losses = [(record[1][0][1], record[2]) for record in told if record[0] == "summary" and "loss" in str(record)]
        # Theirs is computed while a step runs, and may read the loss after it and the step before it.
        is_of_one_step = side.name != "stepguard" or all(value == 2 * step for value, step in losses)
        return is_of_one_step, len(losses) > 2

    assert assert_same(scenario, tmp_path) == (True, True)


SUMMARY = v1.Summary(value=[v1.Summary.Value(tag="mine", simple_value=2.5)])


@pytest.mark.parametrize("step", [None, 7])
@pytest.mark.parametrize("summary", [SUMMARY, SUMMARY.SerializeToString(), b"", v1.Summary()], ids=repr)
def test_a_summary_of_the_program(summary, step, tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, save_model_secs=0)
        with sv.managed_session(start_standard_services=False) as sess:
            sess.run("train")
            value = type(summary)() if isinstance(summary, v1.Summary) else summary
            if isinstance(summary, v1.Summary):
                value.CopyFrom(summary)
            sv.SummaryComputed(sess, value, step)
        return life(logdir)

    told = assert_same(scenario, tmp_path)[0]
    (record,) = next(item for item in told if isinstance(item, frozenset))
    assert record[2] == (1 if step is None else 7)


def test_a_summary_without_a_global_step(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, global_step=None, save_model_secs=0)
        with sv.managed_session(start_standard_services=False) as sess:
            sv.summary_computed(sess, sess.run(sv.summary_op))
        return life(logdir)

    assert_same(scenario, tmp_path)


def test_bytes_that_are_no_summary_are_refused(tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir)
        with sv.managed_session(start_standard_services=False) as sess:
            return outcome(lambda: sv.summary_computed(sess, b"\xff\xff"))[0]

    assert assert_same(scenario, tmp_path) == "raised"
