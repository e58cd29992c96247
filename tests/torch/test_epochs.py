"""Epochs: what belongs to one, where a restart goes on in one, and which batch is the last."""

from __future__ import annotations

import itertools

import pytest
import torch
from loop_programs import BATCHES, Counting, Killed, Tutorial, committed, restored
from torch.utils.data import DataLoader, DistributedSampler

from stepguard.options import Guarding
from stepguard.torch.data.feeds import feed_of


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = Tutorial(tmp_path_factory.mktemp("whole")).train()
    return run.outcome()


@pytest.mark.parametrize(
    ("place", "ends_again"),
    [
        ("step", ["last batch of 1", "end of 1", "last batch of 2", "end of 2", "last batch of 3", "end of 3"]),
        ("end", ["end of 1", "last batch of 2", "end of 2", "last batch of 3", "end of 3"]),
        ("begin", ["last batch of 1", "end of 1", "last batch of 2", "end of 2", "last batch of 3", "end of 3"]),
    ],
)
def test_an_epoch_is_complete_when_its_body_is(place, ends_again, uninterrupted, tmp_path):
    with pytest.raises(Killed):
        Tutorial(tmp_path).train(dies=(1, place))
    again = Tutorial(tmp_path).train()

    assert again.done == ends_again
    assert again.outcome() == uninterrupted


def test_a_run_that_has_ended_does_no_end_of_an_epoch_again(uninterrupted, tmp_path):
    Tutorial(tmp_path).train()
    again = Tutorial(tmp_path).train()

    assert again.done == []
    assert again.scheduler.last_epoch == Tutorial.EPOCHS
    assert again.outcome()[0] == uninterrupted[0]


def test_a_stop_in_the_middle_of_an_epoch_leaves_its_end_to_the_next_start(uninterrupted, tmp_path):
    run = Tutorial(tmp_path)
    with run.sv.managed_session() as session:
        for epoch in session.epochs(run.EPOCHS):
            torch.rand(())
            for (batch,) in session.steps(run.loader):
                run.step(batch)
                if session.global_step == BATCHES + 2:
                    run.sv.request_stop()
            for values in run.values:
                run.model(values)
            run.scheduler.step()
            assert epoch < 2
    assert max(committed(tmp_path)) == BATCHES + 3
    again = Tutorial(tmp_path).train()

    assert again.done[0] == "last batch of 1"
    assert again.outcome() == uninterrupted


def test_sigterm_in_the_middle_of_an_epoch_does_not_do_its_end(tmp_path):
    run = Counting(tmp_path)
    ends = []
    with run.sv.managed_session() as session:
        for epoch in session.epochs(3):
            for step, _ in enumerate(session.steps(run.loader)):
                if epoch == 1 and step == 2:
                    run.sv.request_stop()
                    run.sv._engine.stop_at_boundary(session, lambda: False)
            ends.append(epoch)

    assert ends == [0]
    assert max(committed(tmp_path)) == BATCHES + 3


class Endless:
    """A stream without a length."""

    def __iter__(self):
        return itertools.count()


class TestMaxStepsInEpochs:
    @pytest.mark.parametrize(
        ("max_steps", "complete", "bodies"), [(10, 2, [0, 1]), (8, 1, [0, 1]), (99, 5, [*range(5)])]
    )
    def test_ends_the_epochs_after_its_body(self, max_steps, complete, bodies, tmp_path, caplog):
        run = Counting(tmp_path)
        with run.sv.managed_session() as session:
            seen = []
            for epoch in session.epochs(5):
                run.loop(session, max_steps=max_steps)
                seen.append(epoch)
            assert session.process_state.progress.epochs_done == complete

        assert seen == bodies
        told = f"epochs: ended after {complete} complete epochs of 5, because the loop inside has come to max_steps"
        assert (told in caplog.text) == (max_steps < 99)

    def test_a_larger_one_goes_on_with_the_next_batch_of_the_same_epoch(self, tmp_path):
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        for max_steps in (5, 6, 20):
            Tutorial(parts).train(max_steps=max_steps)
        Tutorial(whole).train(max_steps=20)

        assert Tutorial(parts).outcome() == Tutorial(whole).outcome()

    def test_a_larger_one_after_the_end_of_an_epoch_goes_on_with_the_next_epoch(self, uninterrupted, tmp_path):
        for max_steps in (BATCHES, BATCHES, 2 * BATCHES, 99):
            run = Tutorial(tmp_path).train(max_steps=max_steps)

        assert run.outcome() == uninterrupted

    @pytest.mark.parametrize("loader", [None, Endless()], ids=["none", "endless"])
    def test_is_the_end_of_an_epoch_where_no_length_is(self, loader, tmp_path):
        seen = []
        for _ in range(2):
            with Counting(tmp_path).sv.managed_session() as session:
                for epoch in session.epochs(3):
                    for _ in session.steps(loader, max_steps=(epoch + 1) * 4):
                        pass
                    seen.append((epoch, session.global_step))

        assert seen == [(0, 4), (1, 8), (2, 12)]

    def test_a_start_after_the_end_trains_nothing_and_changes_nothing(self, tmp_path, caplog):
        for bodies in (2, 1):
            run, seen = Counting(tmp_path), []
            with run.sv.managed_session() as session:
                for epoch in session.epochs(5):
                    run.loop(session, max_steps=6)
                    seen.append(epoch)
                assert (session.global_step, session.process_state.progress.epochs_done, len(seen)) == (6, 1, bodies)
        assert "trains nothing: max_steps=6" in caplog.text
        assert restored(tmp_path) == (6, 6.0)


def test_a_run_of_one_loop_goes_on_in_its_epoch_when_the_program_gets_an_epoch_loop(tmp_path):
    run = Counting(tmp_path)
    with run.sv.managed_session() as session:
        run.loop(session, epochs=4, max_steps=2 * BATCHES + 1)
    again, epochs = Counting(tmp_path), []
    with again.sv.managed_session() as session:
        for epoch in session.epochs(4):
            epochs.append(epoch)
            again.loop(session)

    assert epochs == [2, 3]
    assert restored(tmp_path) == (4 * BATCHES, 4.0 * BATCHES)


def test_two_loops_in_the_body_of_an_epoch_are_gone_on_with_each(tmp_path):
    def seen(dies_at=None):
        run, found = Counting(tmp_path), []
        with run.sv.managed_session() as session:
            for epoch in session.epochs(2):
                for part in ("first", "second"):
                    for _ in session.steps(run.loader):
                        found.append((epoch, part))
                        if len(found) == dies_at:
                            session.finish_step()
                            run.save()
                            raise Killed
        return found

    with pytest.raises(Killed):
        seen(dies_at=BATCHES + 2)

    assert seen() == [(0, "second")] * (BATCHES - 2) + [(1, "first")] * BATCHES + [(1, "second")] * BATCHES


@pytest.mark.parametrize("dies_at", [2, 4, 5, 6, 7, 8, 9])
def test_two_loaders_in_the_body_of_an_epoch_are_gone_on_with_each(dies_at, tmp_path):
    def seen(logdir, dies_at=None):
        torch.manual_seed(1)
        run, found = Counting(logdir), []
        first, second = (DataLoader(torch.arange(start, start + 4.0), shuffle=True, batch_size=2) for start in (0, 4))
        with run.sv.managed_session() as session:
            for epoch in session.epochs(3):
                for loader in (first, second):
                    for batch in session.steps(loader):
                        found.append((epoch, batch.tolist()))
                        if session.global_step + 1 == dies_at:
                            session.finish_step()
                            run.save()
                            raise Killed
        return found

    with pytest.raises(Killed):
        seen(tmp_path, dies_at)

    assert seen(tmp_path) == seen(None)[dies_at:]


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda session, loader: session.epochs(1.5), TypeError, "expected number to be a number"),
        (lambda session, loader: session.is_last_batch, RuntimeError, "found none"),
        (lambda session, loader: session.steps(loader, accumulate=0), ValueError, "accumulate >= 1"),
    ],
)
def test_wrong_use_of_loops_is_named(wrong, error, text):
    run = Counting(None)
    with run.sv.managed_session() as session, pytest.raises(error, match=text):
        wrong(session, run.loader)


def test_epochs_inside_epochs_are_refused():
    run = Counting(None)
    with run.sv.managed_session() as session:
        for _ in session.epochs(1):
            with pytest.raises(RuntimeError, match="found one"):
                session.epochs(1)
            with pytest.raises(ValueError, match="leave epochs= out"):
                session.steps(run.loader, epochs=3)


def test_the_last_batch_is_known_after_the_number_of_processes_changed():
    """Two processes had seen two batches of five each; one goes on at the fourth of ten."""

    def loader(processes):
        return DataLoader(range(10), sampler=DistributedSampler(range(10), processes, rank=0, shuffle=False))

    before, feed = feed_of(loader(2)), feed_of(loader(1))
    for _ in range(2):
        before.next(None)
        before.consumed()
    feed.resume({**before.position(), "processes": 2}, processes=1)

    last = []
    for _ in range(6):
        feed.next(None)
        last.append(feed.is_last_batch)
        feed.consumed()
    assert last == [False] * 5 + [True]


def test_the_last_batch_is_known_after_a_return_of_the_nan_guard(tmp_path):
    run = Counting(tmp_path, guarding=Guarding(nan_guard="return"))
    loader, last, returns = DataLoader(range(BATCHES)), [], []
    with run.sv.managed_session() as session:
        for batch in session.steps(loader, max_steps=3 * BATCHES):
            if session.is_last_batch:
                last.append(int(batch))
            if session.global_step == 3 and not returns:
                session.finish_step()
                run.save()
                returns.append(session.global_step)
                session.summary({"loss": float("nan")})
        assert session.global_step == 3 * BATCHES

    assert set(last) == {BATCHES - 1}


def test_the_last_batch_of_a_loader_without_a_length_is_not_guessed():
    run = Counting(None)
    with run.sv.managed_session() as session:
        for _ in session.steps(one for one in range(3)):
            with pytest.raises(TypeError, match=r"sess\.epochs"):
                _ = session.is_last_batch


def test_a_loader_of_another_size_for_each_epoch_goes_on_after_a_complete_one(tmp_path, caplog):
    def sizes():
        run, found = Counting(tmp_path), []
        with run.sv.managed_session() as session:
            for epoch in session.epochs(3):
                loader = DataLoader(torch.ones(2 * (epoch + 2), 1), batch_size=2)
                found.append(len(list(session.steps(loader))))
        return found

    run = Counting(tmp_path)
    with pytest.raises(Killed), run.sv.managed_session() as session:
        for epoch in session.epochs(3):
            if epoch == 1:
                run.save()
                raise Killed
            assert len(list(session.steps(DataLoader(torch.ones(4, 1), batch_size=2)))) == 2

    assert sizes() == [3, 4]
    assert "this one begins with another loader" in caplog.text
