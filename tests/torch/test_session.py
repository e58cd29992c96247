"""Steps: what counts as one, when the loop ends, and what is said when it is used in a wrong way."""

from __future__ import annotations

import contextlib
import operator
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn
from training import BATCH, ITEMS, Training

from stepguard.errors import LogdirInUseError, NoBoundaryError, StopRequested
from stepguard.options import Restoring, Saving, Watching
from stepguard.steps.boundary import Boundary
from stepguard.steps.interrupts import InterruptHold
from stepguard.store import CheckpointStore
from stepguard.torch import Supervisor
from stepguard.watching import ledger


def supervisor(logdir=None, **options):
    return Supervisor({"model": nn.Linear(1, 1)}, logdir, **{"save_summaries_secs": 0, **options})


def committed(logdir):
    return sorted(one.step for one in CheckpointStore(logdir).candidates())


HOLD = """
import sys
from pathlib import Path
from stepguard.store import lock
with lock.acquire(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(("world", "is_told"), [("2", True), ("1", False), (None, False)])
def test_one_of_several_processes_without_a_process_group_is_told_what_it_lacks(world, is_told, tmp_path, monkeypatch):
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    other = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LogdirInUseError) as refused:
            supervisor(tmp_path).prepare_or_wait_for_session()
        holder.stdin.close()
    assert refused.value.pid == holder.pid
    said = "one of 2 processes that a launcher has started (WORLD_SIZE), call torch.distributed.init_process_group()"
    assert (said in str(refused.value)) == is_told


def test_without_a_loader_the_numbers_of_the_steps_are_given(tmp_path):
    for begin, end in ((0, 4), (4, 6)):
        with supervisor(tmp_path).managed_session() as session:
            assert list(session.steps(max_steps=end)) == list(range(begin, end))
            assert session.global_step == end


def test_inside_a_step_the_global_step_is_the_number_of_those_done():
    with supervisor().managed_session() as session:
        assert [(step, session.global_step) for step in session.steps(max_steps=3)] == [(0, 0), (1, 1), (2, 2)]


def test_a_step_that_is_left_by_break_is_done(tmp_path):
    with supervisor(tmp_path).managed_session() as session:
        for step in session.steps():
            if step == 2:
                break
        assert session.global_step == 3

    assert max(committed(tmp_path)) == 3


def test_a_step_that_is_left_by_an_error_is_not_saved_where_a_save_was_due(tmp_path):
    sv = supervisor(tmp_path, save_model_secs=0, save_model_steps=2)
    with pytest.raises(ZeroDivisionError), sv.managed_session() as session:
        for step in session.steps():
            if step == 1:
                raise ZeroDivisionError

    assert committed(tmp_path) == []


def test_a_step_that_is_left_by_an_error_is_not_done(tmp_path, caplog):
    """The checkpoint of step 10 is the last complete one: the ledger says so, and nothing is done again."""
    sv = supervisor(tmp_path, save_model_secs=0, save_model_steps=10)
    with pytest.raises(ZeroDivisionError), sv.managed_session() as session:
        for step in session.steps():
            if step == 10:
                raise ZeroDivisionError
    assert committed(tmp_path) == [10]
    with supervisor(tmp_path).managed_session() as session:
        assert session.global_step == 10

    events = {line["event"]: line for line in ledger.read(tmp_path)[:-1]}
    assert [line["step"] for line in ledger.read(tmp_path) if line["event"] == "stop"] == [10, 10]
    assert events["restore"]["previous_step"] == 10
    assert events["restore"]["lost_steps"] == 0
    assert "done again" not in caplog.text


@pytest.mark.parametrize("way", ["steps", "step"])
def test_a_step_that_ends_the_program_is_done(way, tmp_path):
    with pytest.raises(SystemExit), supervisor(tmp_path, save_model_secs=3600).managed_session() as session:
        if way == "steps":
            for step in session.steps():
                if step == 2:
                    sys.exit(3)
        for step in range(3):
            with session.step():
                if step == 2:
                    sys.exit(3)

    assert max(committed(tmp_path)) == 3


def test_a_step_that_a_second_interrupt_cuts_in_two_is_not_done(tmp_path):
    with pytest.raises(KeyboardInterrupt), supervisor(tmp_path).managed_session() as session:
        for step in session.steps():
            if step == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    assert [line["step"] for line in ledger.read(tmp_path) if line["event"] == "stop"] == [2]


@pytest.mark.parametrize("way", ["acquire", "release"])
def test_an_interrupt_that_comes_with_the_lock_loses_no_step(way, tmp_path):
    class Lock:
        """Interrupts the main thread when it has just taken its third lock, or given it back."""

        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.times = {"acquire": 0, "release": 0}

        def acquire(self, **options: float) -> bool:
            return self.lock.acquire(**options) and self.interrupt("acquire")

        def release(self) -> None:
            self.lock.release()
            self.interrupt("release")

        def interrupt(self, done: str) -> bool:
            if threading.current_thread() is threading.main_thread():
                self.times[done] += 1
                if done == way and self.times[done] == 3:
                    signal.raise_signal(signal.SIGINT)
            return True

    sv = supervisor(tmp_path, save_model_secs=0, saving=Saving(save_at_end=True))
    with pytest.raises(KeyboardInterrupt), sv.managed_session() as session:
        session.boundary._lock = Lock()
        for _ in session.steps():
            pass

    assert max(committed(tmp_path)) == 3


def test_an_interrupt_in_the_step_that_is_left_by_break_leaves_the_block(tmp_path):
    with pytest.raises(KeyboardInterrupt), supervisor(tmp_path).managed_session() as session:
        for _ in session.steps():
            signal.raise_signal(signal.SIGINT)
            break

    assert max(committed(tmp_path)) == 1


def test_after_the_second_interrupt_none_is_held_any_more():
    stops = []
    hold = InterruptHold(Boundary(), lambda: stops.append("asked"))
    hold.start()
    try:
        signal.raise_signal(signal.SIGINT)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        hold.finish()

    assert stops == ["asked"]


def test_what_was_due_after_a_break_is_saved_before_the_next_step(tmp_path):
    sv = supervisor(tmp_path, save_model_secs=0, save_model_steps=2, saving=Saving(save_at_end=False))
    with sv.managed_session() as session:
        for step in session.steps():
            if step == 1:
                break
        for _ in session.steps(max_steps=3):
            pass

    assert committed(tmp_path) == [2]


def test_a_stop_that_was_requested_ends_the_loop_after_the_step():
    sv = supervisor()
    with sv.managed_session() as session:
        for step in session.steps():
            if step == 2:
                sv.request_stop()
        assert session.global_step == 3


def test_a_loop_that_follows_one_that_sigterm_has_ended_does_not_begin(tmp_path):
    sv = supervisor(tmp_path)
    with sv.managed_session() as session:
        assert len(list(session.steps(max_steps=3))) == 3
        sv._engine.stop_at_boundary(session, sv.coord.main_thread_was_told)
        with pytest.raises(StopRequested):
            session.steps(max_steps=5)


def test_a_program_that_knows_of_the_stop_ends_in_its_own_way(tmp_path):
    sv = supervisor(tmp_path)
    with sv.managed_session() as session:
        sv.request_stop()
        sv._engine.stop_at_boundary(session, sv.coord.main_thread_was_told)
        assert sv.should_stop()
        with session.step():
            pass
        assert list(session.steps(max_steps=3)) == []

    assert max(committed(tmp_path)) == 1


def test_stop_inside_a_step_saves_that_step(tmp_path):
    sv = supervisor(tmp_path, save_model_secs=3600)
    with sv.managed_session() as session:
        for step in session.steps():
            if step == 2:
                sv.stop()

    assert max(committed(tmp_path)) == 3


def test_an_error_inside_a_step_of_ones_own_loop_saves_nothing_of_it(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt), supervisor(tmp_path).managed_session() as session:
        with session.step():
            pass
        with session.step():
            raise KeyboardInterrupt

    assert set(committed(tmp_path)) <= {0, 1}
    assert "a step was left half-way" in caplog.text


def test_the_end_of_the_input_in_a_loop_of_ones_own_is_a_clean_end(tmp_path):
    batches = iter(range(3))
    with supervisor(tmp_path).managed_session() as session:
        while True:
            with session.step():
                next(batches)

    assert max(committed(tmp_path)) == 3


def test_a_step_inside_a_step_is_refused():
    with supervisor().managed_session() as session, session.step(), pytest.raises(RuntimeError, match="inside a step"):
        session.step().__enter__()


def test_a_second_session_at_once_is_refused(tmp_path):
    sv = supervisor(tmp_path)
    with sv.managed_session(), pytest.raises(RuntimeError, match="still runs"):
        sv.prepare_or_wait_for_session()
    with sv.managed_session():
        pass


def test_a_closed_session_is_refused():
    with supervisor().managed_session() as session:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        session.steps()
    with pytest.raises(RuntimeError, match="closed"), session.step():
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"max_steps": -1}, ValueError, "max_steps >= 0"),
        ({"max_steps": 1.5}, TypeError, "max_steps"),
        ({"epochs": 1}, ValueError, "none was given"),
        ({"loader": 5}, TypeError, "expected a loader"),
    ],
)
def test_wrong_arguments_of_steps_are_named(arguments, error, text):
    with supervisor().managed_session() as session, pytest.raises(error, match=text):
        session.steps(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"save_model_secs": -1}, ValueError, "save_model_secs"),
        ({"save_model_steps": 0}, ValueError, "save_model_steps"),
        ({"summaries": {"loss": 1}}, TypeError, "summaries"),
        ({"summary_writer": 3}, TypeError, "summary_writer"),
        ({"logdir": 3}, TypeError, "logdir"),
        ({"max_to_keep": -1}, ValueError, "max_to_keep"),
        ({"save_model_secs": float("inf")}, ValueError, "save_model_secs must be a finite number of seconds"),
        ({"watching": Watching(peer_timeout_secs=5)}, ValueError, r"Watching\(peer_timeout_secs=5\): it is for"),
        ({"is_chief": "no"}, TypeError, "is_chief must be True, False or None, got str: 'no'"),
        ({"progress": 3}, TypeError, "progress must be True or False, got int: 3"),
    ],
)
def test_wrong_arguments_of_the_supervisor_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        supervisor(**arguments)


def test_starting_over_is_not_asked_for_by_just_any_word(tmp_path):
    with pytest.raises(TypeError, match="start_over_when_all_damaged must be True or False, got str: 'no'"):
        supervisor(logdir=tmp_path, restoring=Restoring(start_over_when_all_damaged="no"))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_waits_for_the_step_and_the_step_for_the_copy(tmp_path):
    training = Training(tmp_path, save_model_secs=0.002)
    with training.sv.managed_session() as session:
        for batch in session.steps(training.loader, epochs=6):
            training.step(batch)
            time.sleep(0.003)
    steps = -(-ITEMS // BATCH) * 6

    for step in committed(tmp_path):
        saved = torch.load(tmp_path / f"model.ckpt-{step}" / "scheduler.pt", weights_only=True)
        counted = torch.load(tmp_path / f"model.ckpt-{step}" / "model.pt", weights_only=True)["1.num_batches_tracked"]
        assert saved["last_epoch"] == step
        assert int(counted) == step
    assert max(committed(tmp_path)) == steps


def test_a_step_that_does_not_end_is_named():
    from stepguard.steps import boundary

    one = boundary.Boundary()
    one.enter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boundary, "_PATIENCE_SECS", 0.05)
        errors = []

        def hold():
            try:
                with one.hold("a checkpoint"):
                    pass
            except NoBoundaryError as error:
                errors.append(error)

        thread = threading.Thread(target=hold)
        thread.start()
        thread.join()
    one.leave()
    assert "no step boundary for a checkpoint: step 1 of this session" in str(errors[0])
    # Steps go on after it.
    one.enter()
    one.leave()


def test_a_failed_save_draws_nothing_from_the_program(tmp_path):
    """The waiting times between retries are random, too."""
    import errno

    whole = Training(tmp_path / "whole").train(20)
    training = Training(tmp_path / "failing", save_model_secs=0.01)
    original, failures = training.sv._engine.write, [OSError(errno.EIO, "broken")]

    def write(*arguments):
        if failures:
            raise failures.pop()
        return original(*arguments)

    training.sv._engine.write = write
    assert training.train(20).outcome() == whole.outcome()
    assert failures == []


def test_a_program_may_change_its_directory(tmp_path, monkeypatch):
    """All that a run leaves lies where the logdir was when the Supervisor was built."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    sv = Supervisor({"model": torch.nn.Linear(1, 1)}, "run", save_model_secs=0, save_model_steps=2)
    monkeypatch.chdir(elsewhere)
    with sv.managed_session() as session:
        for step in session.steps(max_steps=4):
            if step == 2:
                monkeypatch.chdir(tmp_path)
            session.summary({"loss": step})
    monkeypatch.chdir(elsewhere)

    assert list(elsewhere.iterdir()) == []
    assert sv.save_path == str(tmp_path / "run" / "model.ckpt")
    assert {one.step for one in CheckpointStore(tmp_path / "run").candidates()} >= {4}
    assert len(list((tmp_path / "run").glob("events.*"))) == 1


def test_another_session_that_saves_to_the_same_logdir_is_refused(tmp_path):
    with supervisor(tmp_path).managed_session() as session:
        with (
            pytest.raises(LogdirInUseError, match="another Supervisor in this process"),
            supervisor(tmp_path).managed_session(),
        ):
            pass
        # One that only looks, and one that follows, are not.
        with supervisor(tmp_path, save_model_secs=0).managed_session():
            pass
        list(session.steps(max_steps=2))
    with supervisor(tmp_path).managed_session() as session:
        assert session.global_step == 2


def left(logdir, how):
    """A run whose loop is left in its third step, before or after the training with the batch."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sv = Supervisor({"model": model, "optimizer": optimizer}, logdir, save_summaries_secs=0)

    def train(batch):
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()

    with sv.managed_session() as session:
        steps = session.steps([torch.ones(1, 1)] * 9)
        for batch in map(operator.itemgetter(0), zip(steps, range(2), strict=False)) if how == "zip" else steps:
            if session.global_step == 2 and how == "break before":
                break
            if session.global_step == 2 and how == "an error":
                raise ValueError("in the step")
            train(batch)
            if session.global_step == 2 and how == "break after":
                break
        del steps
    return session.global_step


@pytest.mark.parametrize("how", ["zip", "break before"])
def test_a_loop_that_is_left_before_it_trains_with_its_batch_is_told_of(how, tmp_path, caplog):
    assert left(tmp_path / "run", how) == 3
    assert "steps: the loop was left in step 2 before an optimizer was called" in caplog.text


@pytest.mark.parametrize("how", ["break after", "an error"])
def test_a_loop_that_is_left_by_an_error_or_after_the_training_is_not(how, tmp_path, caplog):
    with contextlib.suppress(ValueError):
        left(tmp_path / "run", how)
    assert "the loop was left" not in caplog.text
