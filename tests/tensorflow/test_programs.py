"""What programs do that a supervisor must bear: savers, evaluators and steps that are not its own, slow input."""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from graphs import committed, counting_step, wait_until

from stepguard.errors import StopRequested
from stepguard.options import Restoring, Saving
from stepguard.store import CheckpointStore
from stepguard.tensorflow import SessionManager, Supervisor
from stepguard.tensorflow import engine as engine_module

v1 = tf.compat.v1


def train(logdir: Path, steps: int, **options: Any) -> int:
    """A run of so many steps in a graph of its own; the step that it began at."""
    with tf.Graph().as_default():
        step = counting_step()
        supervisor = Supervisor(logdir=str(logdir), save_summaries_secs=0, **{"save_model_secs": 3600, **options})
        with supervisor.managed_session() as session:
            began = int(session.run(v1.train.get_global_step()))
            for _ in range(steps):
                session.run(step)
    return began


class TestLongSteps:
    def test_one_at_the_time_of_a_summary_does_not_end_the_run(self, graph, tmp_path, monkeypatch):
        monkeypatch.setattr(engine_module, "_SUMMARY_PATIENCE_SECS", 0.05)
        step = counting_step()
        queue = v1.FIFOQueue(1, tf.float32, shapes=[()])
        w = v1.global_variables()[0]
        train_on_input, put = w.assign_add(tf.fill([2], queue.dequeue())), queue.enqueue(1.0)
        v1.summary.scalar("w", w[0])
        written = threading.Event()
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0, save_summaries_secs=0.05)
        write = supervisor._tensorflow_events.summary
        supervisor._tensorflow_events.summary = lambda *summary: (write(*summary), written.set())

        with ThreadPoolExecutor(1) as pool, supervisor.managed_session() as session:
            session.run(step)
            training = pool.submit(session.run, train_on_input)
            wait_until(lambda: session.boundary._running, "the step")
            written.clear()
            wait_until(written.is_set, "a summary while the step goes on")
            assert not supervisor.should_stop()
            session.run(put)
            training.result(60)


class TestStepsOfOthers:
    def test_on_a_shared_server_make_a_checkpoint_due(self, graph, tmp_path):
        step = counting_step()
        server = v1.train.Server.create_local_server()
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0.05)
        with supervisor.managed_session(server.target), v1.Session(server.target, graph=graph) as other:
            wait_until(lambda: committed(tmp_path) == [0], "the first checkpoint")
            for _ in range(3):
                other.run(step)
            wait_until(lambda: committed(tmp_path)[-1] == 3, "a checkpoint of the other's steps")

    def test_that_nobody_counts_are_saved_all_the_same(self, graph, tmp_path):
        counting_step()
        w = v1.global_variables()[0]
        uncounted = w.assign_add([1.0, 1.0]).op
        server = v1.train.Server.create_local_server()
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=3600)
        with supervisor.managed_session(server.target), v1.Session(server.target, graph=graph) as other:
            for _ in range(3):
                other.run(uncounted)

        reader = tf.train.load_checkpoint(str(tmp_path / "model.ckpt-0"))
        assert list(reader.get_tensor(w.op.name)) == [3.0, 3.0]


class TestALivingModel:
    def test_that_is_gone_on_with_has_its_old_checkpoints_pruned_as_ever(self, graph, tmp_path):
        step = counting_step()
        saver = v1.train.Saver(max_to_keep=2)
        initializer = v1.global_variables_initializer()
        server = v1.train.Server.create_local_server()
        for _ in range(3):
            supervisor = Supervisor(logdir=str(tmp_path), saver=saver, init_op=initializer, save_model_secs=3600)
            with supervisor.managed_session(server.target) as session:
                session.run(step)
            graph._unsafe_unfinalize()
            # As in another process, which knows nothing of what this one has saved.
            saver.set_last_checkpoints([])

        assert committed(tmp_path) == [2, 3]

    def test_without_a_checkpoint_in_the_logdir_is_gone_on_with_and_said(self, graph, tmp_path, caplog):
        step = counting_step()
        server = v1.train.Server.create_local_server()
        began = []
        for name in ("first", "second"):
            supervisor = Supervisor(logdir=str(tmp_path / name), save_model_secs=0)
            with supervisor.managed_session(server.target) as session:
                began.append(int(session.run(supervisor.global_step)))
                session.run(step)
            graph._unsafe_unfinalize()

        assert began == [0, 1]
        (warning,) = [record.getMessage() for record in caplog.records]
        assert f"{tmp_path / 'second'} holds no checkpoint" in warning


class TestSessionsOfAnotherKind:
    @pytest.mark.parametrize("error", [None, ZeroDivisionError("of the block")])
    def test_that_cannot_be_closed_change_nothing_of_how_a_run_ends(self, graph, tmp_path, caplog, error):
        class Closing(v1.Session):
            def close(self) -> None:
                super().close()
                raise RuntimeError("cannot be closed")

        class Manager:
            def prepare_session(self, *_: Any, init_op: Any, **__: Any) -> Closing:
                session = Closing(graph=graph)
                session.run(init_op)
                return session

        counting_step()
        supervisor = Supervisor(logdir=str(tmp_path), session_manager=Manager(), save_model_secs=0)
        expected = contextlib.nullcontext() if error is None else pytest.raises(ZeroDivisionError, match="of the block")
        with expected, supervisor.managed_session():
            if error is not None:
                raise error

        assert "cannot be closed" in caplog.text


class TestSaversOfTheProgramsOwn:
    @pytest.mark.parametrize("logdir", [".", "./logs", "logs//run/"])
    def test_count_the_same_checkpoints_however_the_logdir_is_spelt(self, logdir, graph, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        step = counting_step()
        saver = v1.train.Saver(max_to_keep=2)
        supervisor = Supervisor(logdir=logdir, saver=saver, save_summaries_secs=0)
        with supervisor.managed_session() as session:
            for _ in range(4):
                session.run(step)
                saver.save(session, supervisor.save_path, global_step=supervisor.global_step)
            session.run(step)

        assert committed(Path(logdir)) == [5]
        assert sorted(path.name for path in Path(logdir).glob("*.index")) == [
            "model.ckpt-4.index",
            "model.ckpt-5.index",
        ]
        assert saver.last_checkpoints == [f"{supervisor.save_path}-4", f"{supervisor.save_path}-5"]

    def test_may_name_their_files_as_they_like(self, graph, tmp_path):
        class Npz:
            saver_def = None

            def __init__(self) -> None:
                self.restored: list[str] = []

            def save(self, session: Any, path: str, global_step: Any = None) -> str:
                prefix = f"{path}-{session.run(global_step)}"
                np.savez(f"{prefix}.tar.npz", w=session.run("w:0"))
                v1.train.update_checkpoint_state(os.path.dirname(path), prefix)
                return prefix

            def restore(self, session: Any, path: str) -> None:
                self.restored.append(path)
                session.run(v1.global_variables_initializer())

        saver, step = Npz(), counting_step()
        initializer = v1.global_variables_initializer()
        saver.restore = lambda session, path: (saver.restored.append(path), session.run(initializer))
        for _ in range(2):
            supervisor = Supervisor(logdir=str(tmp_path), saver=saver, init_op=initializer, save_summaries_secs=0)
            with supervisor.managed_session() as session:
                session.run(step)
            graph._unsafe_unfinalize()

        assert saver.restored == [str(tmp_path / "model.ckpt-1")]

    @pytest.mark.parametrize("failures", [1, 2])
    def test_that_find_the_disk_full_are_asked_again_and_training_goes_on(self, graph, tmp_path, caplog, failures):
        class Own(v1.train.Saver):
            def save(self, *arguments: Any, **named: Any) -> Any:
                if len(tried) < failures:
                    tried.append("full")
                    raise OSError(errno.ENOSPC, "no room for what this saver writes")
                return super().save(*arguments, **named)

        tried: list[str] = []
        step = counting_step()
        supervisor = Supervisor(logdir=str(tmp_path), saver=Own(), save_model_secs=0, saving=Saving(save_model_steps=5))
        with supervisor.managed_session() as session:
            for _ in range(5):
                session.run(step)
            wait_until(lambda: len(tried) == failures or committed(tmp_path), "the first try")
            session.run(step)
            wait_until(lambda: committed(tmp_path), "the checkpoint of a later try")
            session.run(step)

        assert caplog.text.count("no room for what this saver writes") == failures
        assert train(tmp_path, 0) == 7

    def test_that_find_the_disk_full_at_the_end_have_the_time_to_stop_for_it(self, graph, tmp_path):
        class Own(v1.train.Saver):
            def save(self, *arguments: Any, **named: Any) -> Any:
                if not tried:
                    tried.append("full")
                    raise OSError(errno.ENOSPC, "no room for what this saver writes")
                return super().save(*arguments, **named)

        tried: list[str] = []
        step = counting_step()
        supervisor = Supervisor(logdir=str(tmp_path), saver=Own(), save_model_secs=0, saving=Saving(save_at_end=True))
        with supervisor.managed_session() as session:
            for _ in range(3):
                session.run(step)

        assert tried
        assert committed(tmp_path) == [3]

    @pytest.mark.parametrize(("saves", "named"), [(True, "model.ckpt-2"), (False, "")])
    def test_that_do_not_say_what_they_wrote_are_logged_with_what_is_there(self, graph, tmp_path, caplog, saves, named):
        class Silent(v1.train.Saver):
            def save(self, *arguments: Any, **options: Any) -> None:
                if saves:
                    super().save(*arguments, write_meta_graph=False, **options)

        step = counting_step()
        supervisor = Supervisor(
            logdir=str(tmp_path), saver=Silent(), saving=Saving(save_model_secs=0, save_at_end=True)
        )
        with caplog.at_level(logging.INFO, "stepguard"), supervisor.managed_session() as session:
            for _ in range(2):
                session.run(step)

        (line,) = [one.getMessage() for one in caplog.records if one.getMessage().startswith("saved step")]
        assert line.startswith(f"saved step 2 to {tmp_path / named} in "), line
        assert committed(tmp_path) == ([2] if saves else [])

    def test_that_write_over_a_committed_step_leave_a_good_checkpoint(self, graph, tmp_path, caplog):
        step, own = counting_step(), v1.train.Saver()
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0, saving=Saving(save_model_steps=1))
        with supervisor.managed_session() as session:
            session.run(step)
            wait_until(lambda: committed(tmp_path) == [1], "the checkpoint")
            own.save(session, supervisor.save_path, global_step=v1.train.get_global_step())

        assert train(tmp_path, 0) == 1
        assert "damaged" not in caplog.text


class TestWithoutALogdir:
    def test_who_only_reads_is_not_warned_of_a_run_that_a_crash_would_lose(self, graph, caplog):
        counting_step()
        accuracy, update = v1.metrics.mean(v1.global_variables()[0])
        with Supervisor().managed_session() as session:
            for _ in range(3):
                session.run(update)
            session.run(accuracy)

        assert "logdir" not in caplog.text

    def test_who_trains_is_warned_once_at_the_first_step(self, graph, caplog):
        step = counting_step()
        with Supervisor().managed_session() as session:
            assert "logdir" not in caplog.text
            for _ in range(3):
                session.run(step)

        assert caplog.text.count("no logdir was given") == 1


class TestGoingBack:
    def test_to_an_older_step_is_where_the_next_run_goes_on(self, tmp_path):
        train(tmp_path, 5)
        train(tmp_path, 5)
        with tf.Graph().as_default():
            step = counting_step()
            supervisor = Supervisor(logdir=str(tmp_path), save_summaries_secs=0)
            with supervisor.managed_session() as session:
                supervisor.saver.restore(session, str(tmp_path / "model.ckpt-5"))
                session.run(step)

        assert train(tmp_path, 0) == 6


class TestEvaluators:
    def test_move_nothing_while_the_chief_lives(self, tmp_path, caplog):
        train(tmp_path, 1)
        train(tmp_path, 1)
        damaged = tmp_path / "model.ckpt-2.data-00000-of-00001"
        damaged.write_bytes(damaged.read_bytes()[:-1])

        def chief(held: Any, done: Any) -> None:
            with CheckpointStore(tmp_path).acquire():
                held.set()
                done.wait(60)

        context = multiprocessing.get_context("fork")
        hold = context.Event(), context.Event()
        process = context.Process(target=chief, args=hold)
        process.start()
        try:
            assert hold[0].wait(60)
            assert train(tmp_path, 0, save_model_secs=0) == 1
        finally:
            hold[1].set()
            process.join(60)

        assert damaged.exists()
        assert train(tmp_path, 0, save_model_secs=0) == 1
        assert not damaged.exists()
        assert (tmp_path / "quarantine" / "model.ckpt-2").is_dir()

    def test_that_wait_for_the_first_checkpoint_leave_the_logdir_to_who_trains(self, tmp_path):
        holds: list[bool] = []

        def evaluate() -> int:
            with tf.Graph().as_default():
                counting_step()
                supervisor = Supervisor(logdir=str(tmp_path), save_summaries_secs=0)

                def wait_for_stop(secs: float) -> bool:
                    holds.append(supervisor._saving.holds_logdir)
                    return bool(supervisor.coord.wait_for_stop(secs))

                supervisor.session_manager._wait_for_stop = wait_for_stop
                with supervisor.prepare_or_wait_for_session(wait_for_checkpoint=True, max_wait_secs=60) as session:
                    step = int(session.run(supervisor.global_step))
                supervisor.stop()
                return step

        with ThreadPoolExecutor(1) as pool:
            evaluation = pool.submit(evaluate)
            wait_until(lambda: holds, "a check")
            train(tmp_path, 4, save_model_secs=0, saving=Saving(save_at_end=True))
            assert evaluation.result(60) == 4
        assert not any(holds)

    def test_that_wait_in_vain_say_so(self, graph, tmp_path, caplog):
        counting_step()
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0)
        supervisor.prepare_or_wait_for_session(wait_for_checkpoint=True, max_wait_secs=0.1).close()
        supervisor.stop()

        assert f"no checkpoint came to {tmp_path} within max_wait_secs=0.1" in caplog.text

    def test_services_that_are_started_by_hand_make_a_chief(self, graph, tmp_path):
        counting_step()
        supervisor = Supervisor(logdir=str(tmp_path), save_summaries_secs=0)
        with supervisor.managed_session(start_standard_services=False) as session:
            assert not supervisor._saving.holds_logdir
            supervisor.start_standard_services(session)
            assert supervisor._saving.holds_logdir


class TestErrorsOfTheProgram:
    def test_are_no_damage_of_a_checkpoint(self, tmp_path):
        with tf.Graph().as_default():
            step = counting_step()
            with v1.Session() as session:
                session.run(v1.global_variables_initializer())
                session.run(step)
                v1.train.Saver().save(session, str(tmp_path / "model.ckpt"), global_step=1)
        with tf.Graph().as_default(), tf.device("/gpu:7"):
            counting_step()
            supervisor = Supervisor(logdir=str(tmp_path), restoring=Restoring(start_over_when_all_damaged=True))
            with pytest.raises(tf.errors.InvalidArgumentError, match="device"), supervisor.managed_session():
                pass

        assert train(tmp_path, 0) == 1


class TestStopping:
    def test_at_a_boundary_in_a_thread_of_the_programs_own_is_a_clean_end(self, graph, tmp_path):
        step = counting_step()
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=3600)

        def work(session: Any) -> None:
            with contextlib.suppress(StopRequested), supervisor.stop_on_exception():
                while True:
                    session.run(step)

        with supervisor.managed_session() as session:
            thread = threading.Thread(target=work, args=(session,))
            supervisor.coord.register_thread(thread)
            thread.start()
            wait_until(lambda: session.boundary.steps > 3, "some steps")
            supervisor._engine.stop_at_boundary(session, supervisor.coord.main_thread_was_told)
            thread.join(60)

        assert committed(tmp_path)[-1] > 3

    def test_reaches_a_loop_of_the_main_thread_that_only_reads(self, graph, tmp_path):
        counting_step()
        value = v1.global_variables()[0].read_value()
        supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0)
        with supervisor.managed_session() as session:
            supervisor._engine.stop_at_boundary(session, supervisor.coord.main_thread_was_told)
            with pytest.raises(StopRequested):
                session.run(value)

    def test_with_no_grace_at_all_still_saves_the_last_step(self, tmp_path):
        train(tmp_path, 3, stop_grace_secs=0)
        assert committed(tmp_path)[-1] == 3

    def test_may_be_waited_for_without_limit(self, tmp_path):
        train(tmp_path, 3, stop_grace_secs=float("inf"))
        assert committed(tmp_path)[-1] == 3


class TestNames:
    def test_a_session_manager_alone_takes_no_model_that_somebody_has_put_there(self, graph, tmp_path):
        counting_step()
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            v1.train.Saver().save(session, str(tmp_path / "pretrained"), write_state=False)
        manager = SessionManager()
        session, restored = manager.recover_session("", saver=v1.train.Saver(), checkpoint_dir=str(tmp_path))
        session.close()

        assert not restored

    def test_a_string_may_end_in_zero_bytes(self, graph, tmp_path):
        name = v1.get_variable("name", initializer=b"ab\0\0")
        rename = name.assign(b"cd\0\0")
        with Supervisor(logdir=str(tmp_path)).managed_session() as session:
            session.run(rename)

        reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(tmp_path)))
        assert reader.get_tensor("name") == b"cd\0\0"


def test_the_files_of_a_run_that_are_gone_are_missed(tmp_path, caplog):
    train(tmp_path, 2)
    for path in tmp_path.glob("model.ckpt*"):
        path.unlink()
    from stepguard.errors import NoGoodCheckpointError

    with caplog.at_level(logging.WARNING), pytest.raises(NoGoodCheckpointError, match="there is no file of it"):
        train(tmp_path, 0)
