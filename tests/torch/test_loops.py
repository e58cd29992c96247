"""Loops: what belongs to a step, and that nobody reads the state while none runs."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from loop_programs import BATCHES, LENT, SOON_SECS, Counting, Killed, Tutorial, committed, restored, until
from torch.utils.data import DataLoader, TensorDataset

from stepguard.options import Guarding
from stepguard.torch import Supervisor, Values

# --- resting


@pytest.mark.parametrize("how", ["timer", "interrupt", "end", "stop"])
def test_weights_that_are_lent_between_two_loops_are_never_saved(how, tmp_path):
    run = Counting(tmp_path)
    expected = {"timer": Killed, "interrupt": KeyboardInterrupt}.get(how)
    with pytest.raises(expected) if expected else torch.no_grad(), run.sv.managed_session() as session:
        run.loop(session, epochs=1)
        run.loop(session, epochs=2)
        run.lend()
        if how == "timer":
            run.save()
        if how == "stop":
            run.sv.stop()
        elif expected:
            raise expected

    assert restored(tmp_path) == (2 * BATCHES, 2 * BATCHES)


def test_a_loop_that_is_left_by_break_rests_too(tmp_path):
    run = Counting(tmp_path)
    with run.sv.managed_session() as session:
        for _ in session.steps(run.loader):
            with torch.no_grad():
                run.model.weight += 1.0
            break
        run.lend()

    assert restored(tmp_path) == (1, 1.0)


def test_a_copy_that_is_kept_does_not_change_one_that_is_being_written(tmp_path):
    run = Counting(tmp_path, save_model_steps=BATCHES)
    may_write, write = threading.Event(), run.sv._engine.write

    def slow_write(*arguments):
        assert may_write.wait(SOON_SECS)
        return write(*arguments)

    run.sv._engine.write = slow_write
    with run.sv.managed_session() as session:
        run.loop(session, max_steps=BATCHES + 2)
        run.lend()
        may_write.set()

    for step in (BATCHES, BATCHES + 2):
        saved = torch.load(tmp_path / f"model.ckpt-{step}" / "model.pt", weights_only=True)
        assert saved["weight"].item() == step


def test_memory_is_taken_twice_only_while_two_snapshots_live(tmp_path):
    run = Counting(tmp_path)
    with run.sv.managed_session() as session:
        for end in range(1, 6):
            run.loop(session, max_steps=end)
            run.save()
        assert len(run.sv._engine._memories) == 1


def test_many_short_loops_are_not_copied_each_and_end_with_their_last_step(tmp_path):
    run = Counting(tmp_path)
    taken, snapshot = [], run.sv._engine.snapshot

    def slow_snapshot(session):
        time.sleep(0.02)
        taken.append(session.global_step)
        return snapshot(session)

    run.sv._engine.snapshot = slow_snapshot
    began = time.monotonic()
    with run.sv.managed_session() as session:
        for end in range(1, 201):
            run.loop(session, max_steps=end)
        secs = time.monotonic() - began

    # A burst of 0.2 s, the first, one that goes over it, the last, and a twentieth of the time.
    assert 0.02 * len(taken) <= 0.2 + 3 * 0.02 + secs / 20
    assert restored(tmp_path) == (200, 200.0)


def test_a_stop_between_short_loops_saves_a_step_that_was_copied(tmp_path):
    run = Counting(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.sv.managed_session() as session:
        run.loop(session, max_steps=3)
        for _ in range(20):
            run.sv._saving.checkpointer._budget.spend(3600.0)
        run.loop(session, max_steps=5)
        run.lend()
        raise KeyboardInterrupt

    assert restored(tmp_path) == (3, 3.0)


def test_with_other_processes_a_step_without_a_copy_is_refused_and_not_read(tmp_path, caplog):
    run = Counting(tmp_path)
    # An older copy would not be of the step at which the others are.
    run.sv._engine.is_alone = lambda _: False
    with pytest.raises(KeyboardInterrupt), run.sv.managed_session() as session:
        run.loop(session, max_steps=3)
        run.save()
        for _ in range(20):
            run.sv._saving.checkpointer._budget.spend(3600.0)
        run.loop(session, max_steps=5)
        run.lend()
        run.sv._saving.checkpointer()
        assert "checkpoint skipped" in caplog.text
        raise KeyboardInterrupt

    assert "the last one was too short to be copied at its end" in caplog.text
    assert restored(tmp_path) == (3, 3.0)


def test_a_loop_of_ones_own_is_read_when_it_comes_to_its_next_step(tmp_path):
    """A save that waits for the end of a step also has what the program does after it, which a restart does not do."""
    run = Counting(tmp_path)
    with pytest.raises(Killed), run.sv.managed_session() as session:
        with session.step():
            saving = threading.Thread(target=run.save)
            saving.start()
            until(lambda: session.boundary._turn is not None)
            with torch.no_grad():
                run.model.weight += 1.0
        run.model.weight.data.fill_(7.0)
        with session.step():
            saving.join(SOON_SECS)
        raise Killed

    assert restored(tmp_path) == (1, 7.0)


def test_between_two_steps_of_ones_own_loop_a_save_waits_for_the_next(tmp_path):
    run = Counting(tmp_path)
    with pytest.raises(Killed), run.sv.managed_session() as session:
        with session.step(), torch.no_grad():
            run.model.weight += 1.0
        run.lend()
        saving = threading.Thread(target=run.sv._saving.checkpointer)
        saving.start()
        saving.join(SOON_SECS)
        run.model.weight.data.fill_(1.0)
        with session.step():
            assert run.sv._saving.writer.drain(SOON_SECS)
        raise Killed

    assert restored(tmp_path) == (1, 1.0)


def test_a_return_of_the_nan_guard_waits_until_the_model_is_given_back(tmp_path):
    run = Counting(tmp_path, guarding=Guarding(nan_guard="return"))
    with run.sv.managed_session() as session:
        run.loop(session, max_steps=3)
        run.save()
        run.loop(session, max_steps=5)
        kept = run.model.weight.detach().clone()
        run.lend()
        session.summary({"error": float("nan")})
        with pytest.raises(AssertionError):
            until(lambda: run.model.weight.item() != LENT, 0.3)
        run.model.weight.data.copy_(kept)
        run.loop(session, max_steps=6)
        assert session.global_step == 6
        assert run.model.weight.item() == 6

    assert restored(tmp_path) == (6, 6.0)


# --- loops that train nothing, and epoch loops of the program's own


def test_an_epoch_loop_of_ones_own_is_warned_of_and_does_its_work_once(tmp_path, caplog):
    def train(dies_at=None):
        run = Tutorial(tmp_path / ("whole" if dies_at is None else "killed"))
        rates = {}
        with run.sv.managed_session() as session:
            for epoch in range(4):
                for (batch,) in session.steps(run.loader, epochs=epoch + 1):
                    run.step(batch)
                    rates[session.global_step] = run.optimizer.param_groups[0]["lr"]
                    if session.global_step == dies_at:
                        session.finish_step()
                        run.save_and_die()
                run.scheduler.step()
        return rates

    whole = train()
    assert caplog.text.count("for epoch in sess.epochs(n)") == 1
    with pytest.raises(Killed):
        train(dies_at=2 * BATCHES + 1)
    caplog.clear()
    rest = train(dies_at=-1)

    assert rest == {step: whole[step] for step in range(2 * BATCHES + 2, 4 * BATCHES)}
    assert "trains nothing" not in caplog.text


def test_a_restart_at_the_end_of_an_epoch_of_ones_own_loop_tells_of_it(tmp_path, caplog):
    run = Counting(tmp_path)
    with pytest.raises(Killed), run.sv.managed_session() as session:
        run.loop(session, epochs=session.epoch + 1)
        run.save()
        raise Killed
    assert "sess.epochs" not in caplog.text
    again = Counting(tmp_path)
    with again.sv.managed_session() as session:
        again.loop(session, epochs=session.epoch + 1)
        # It may be the same loop, made longer.
        assert "the checkpoint was taken at the end of epoch 1" not in caplog.text
        again.loop(session, epochs=session.epoch + 1)

    assert "the checkpoint was taken at the end of epoch 1" in caplog.text


class Phases:
    """A program of two loops with work in between that must be done once, as after a search for the learning rate."""

    def __init__(self, logdir, *, first):
        run = self.run = Tutorial(logdir)
        self.rates = {}
        with run.sv.managed_session() as session:
            for number in getattr(self, first)(session):
                self.step(session, number)
            run.optimizer.param_groups[0]["lr"] *= 0.5
            for number in session.steps(max_steps=8):
                self.step(session, number)

    def with_a_loader(self, session):
        return (0 for _ in session.steps(self.run.loader, max_steps=BATCHES))

    def without_a_loader(self, session):
        return session.steps(max_steps=BATCHES)

    def epochs(self, session):
        for _ in session.epochs(1):
            yield from session.steps(self.run.loader)

    def step(self, session, number):
        self.run.step(torch.ones(4, 2))
        self.rates[session.global_step] = self.run.optimizer.param_groups[0]["lr"]
        if self.dies_after == session.global_step + 1:
            session.finish_step()
            self.run.save_and_die()


@pytest.mark.parametrize("dies_after", [3, BATCHES, BATCHES + 1])
@pytest.mark.parametrize("first", ["with_a_loader", "without_a_loader", "epochs"])
def test_work_between_two_loops_counts_once(first, dies_after, tmp_path, monkeypatch):
    monkeypatch.setattr(Phases, "dies_after", dies_after, raising=False)
    with pytest.raises(Killed):
        Phases(tmp_path, first=first)
    monkeypatch.setattr(Phases, "dies_after", None)
    rates = Phases(tmp_path, first=first).rates

    assert rates == {step: 0.1 if step < BATCHES else 0.05 for step in range(dies_after, 8)}


class Pipeline:
    """An iterator that begins anew once it has raised StopIteration."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == 4:
            self.at = 0
            raise StopIteration
        self.at += 1
        return self.at


def test_an_iterator_that_begins_anew_gives_an_epoch_for_each_loop(caplog):
    pipeline = Pipeline()
    with Counting(None).sv.managed_session() as session:
        assert [len(list(session.steps(pipeline))) for _ in range(3)] == [4, 4, 4]
        assert [len(list(session.steps(Pipeline(), epochs=3)))] == [12]
    assert "trains nothing" not in caplog.text


@pytest.mark.parametrize(
    ("options", "counts", "said"),
    [
        ({"epochs": 1}, [BATCHES, 0, 0], r"1 epochs over it are complete"),
        ({"max_steps": 3}, [3, 0, 0], "is already at step 3"),
    ],
)
def test_a_loop_that_trains_nothing_says_so_once(options, counts, said, caplog):
    run = Counting(None)
    with run.sv.managed_session() as session:
        assert [len(list(session.steps(run.loader, **options))) for _ in counts] == counts
    assert caplog.text.count(said) == 1


def test_a_loop_without_a_loader_says_that_it_trains_nothing(tmp_path, caplog):
    for _ in range(2):
        with Counting(tmp_path).sv.managed_session() as session:
            list(session.steps(max_steps=3))
    assert caplog.text.count("steps: trains nothing: max_steps=3") == 1


def test_an_exhausted_iterator_is_named(caplog):
    with Counting(None).sv.managed_session() as session:
        assert len(list(session.steps(iter([1, 2]), epochs=3))) == 2
        iterator = iter([1, 2])
        assert [len(list(session.steps(iterator, max_steps=100))) for _ in range(2)] == [2, 0]
    assert "expected 3 epochs, found 1: it is an iterator" in caplog.text
    assert "trains nothing: it is an iterator" in caplog.text


def test_a_prefetcher_around_the_steps_is_warned_of(caplog):
    with Counting(None).sv.managed_session() as session:
        thread = threading.Thread(target=list, args=(session.steps(max_steps=2),))
        thread.start()
        thread.join(SOON_SECS)
    assert "prefetcher around steps()" in caplog.text


# --- accumulation


def test_an_accumulated_step_takes_four_turns_and_fewer_at_the_end_of_an_epoch(tmp_path):
    loader = DataLoader(range(6))
    with Counting(tmp_path).sv.managed_session() as session:
        batches = session.steps(loader, epochs=2, accumulate=4)
        turns = [(int(batch), session.global_step, session.is_update) for batch in batches]
        assert session.total_steps == session.global_step == 4
        assert session.is_update

    first = [(0, 0, False), (1, 0, False), (2, 0, False), (3, 0, True), (4, 1, False), (5, 1, True)]
    assert turns == first + [(batch, step + 2, is_update) for batch, step, is_update in first]
    assert max(committed(tmp_path)) == 4


class Accumulating:
    """``steps`` plain, with the optimizer in each fourth turn; or as one step."""

    def __init__(self, logdir, *, is_naive):
        torch.manual_seed(0)
        inputs = torch.linspace(-1, 1, 400)[:, None]
        self.loader = DataLoader(TensorDataset(inputs, 3 * inputs + 1), batch_size=16, shuffle=True)
        self.model = torch.nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.is_naive = is_naive
        self.sv = Supervisor({"model": self.model, "optimizer": self.optimizer}, logdir, save_summaries_secs=0)

    def train(self, stop_at=None):
        turn = 0
        with self.sv.managed_session() as session:
            options = {"max_steps": 20} if self.is_naive else {"max_steps": 5, "accumulate": 4}
            for inputs, targets in session.steps(self.loader, **options):
                turn += 1
                (torch.nn.functional.mse_loss(self.model(inputs), targets) / 4).backward()
                if (session.global_step + 1) % 4 == 0 if self.is_naive else session.is_update:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if turn == stop_at:
                    self.sv.request_stop()
        return self.model.weight.item(), self.model.bias.item()


@pytest.mark.parametrize("stop_at", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("is_naive", [True, False], ids=["naive", "accumulate"])
def test_no_gradient_is_lost_where_a_run_is_stopped(stop_at, is_naive, tmp_path):
    whole = Accumulating(None, is_naive=is_naive).train()
    Accumulating(tmp_path, is_naive=is_naive).train(stop_at=stop_at)

    assert Accumulating(tmp_path, is_naive=is_naive).train() == whole
    # Applied gradients are of no use: they cost no room.
    newest = torch.load(tmp_path / f"model.ckpt-{max(committed(tmp_path))}" / "process-0.pt", weights_only=True)
    assert "gradients" not in newest


def fades_gradients(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


CLEARING = {
    "never": lambda _: None,
    "faded": fades_gradients,
    "in place": lambda optimizer: optimizer.zero_grad(set_to_none=False),
    "dropped": lambda optimizer: optimizer.zero_grad(),
}


def train_with_gradients(clear, logdir, stop_at=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sv = Supervisor({"model": model, "optimizer": optimizer}, logdir, save_summaries_secs=0)
    with sv.managed_session() as session:
        for _ in session.steps(max_steps=7):
            clear(optimizer)
            model(torch.ones(4, 1)).square().mean().backward()
            optimizer.step()
            if session.global_step + 1 == stop_at:
                sv.request_stop()
    return [one.tolist() for one in model.parameters()]


@pytest.mark.parametrize("stop_at", [1, 2, 5])
@pytest.mark.parametrize("clearing", CLEARING)
def test_gradients_that_outlive_a_step_go_on_after_a_restart(clearing, stop_at, tmp_path):
    clear = CLEARING[clearing]
    whole = train_with_gradients(clear, None)
    train_with_gradients(clear, tmp_path, stop_at)

    assert train_with_gradients(clear, tmp_path) == whole
    newest = torch.load(tmp_path / "model.ckpt-7" / "process-0.pt", weights_only=True)
    assert ("gradients" in newest) == (clearing != "dropped")


def train_branches(zero_in_front, logdir, stop_at=None):
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    sv = Supervisor({"model": model, "optimizer": optimizer}, logdir, save_summaries_secs=0)
    with sv.managed_session() as session:
        for step in session.steps(max_steps=7):
            if zero_in_front:
                optimizer.zero_grad(set_to_none=False)
            # The first parameter gets its first gradient after others have had theirs.
            model[int(step in (0, 3, 5))](torch.ones(4, 1)).square().mean().backward()
            optimizer.step()
            if not zero_in_front:
                optimizer.zero_grad(set_to_none=False)
            if session.global_step + 1 == stop_at:
                sv.request_stop()
    return [one.tolist() for one in model.parameters()]


@pytest.mark.parametrize("zero_in_front", [True, False])
@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_a_parameter_with_a_gradient_of_zero_is_not_without_one_after_a_restart(zero_in_front, stop_at, tmp_path):
    whole = train_branches(zero_in_front, None)
    train_branches(zero_in_front, tmp_path, stop_at)

    assert train_branches(zero_in_front, tmp_path) == whole
    # They cost no room.
    saved = torch.load(tmp_path / f"model.ckpt-{stop_at}" / "process-0.pt", weights_only=True)["gradients"]
    assert zero_in_front or set(saved["optimizer"].values()) == {None}


def test_both_ways_to_accumulate_train_the_same():
    assert Accumulating(None, is_naive=True).train() == Accumulating(None, is_naive=False).train()


def test_batches_that_made_no_update_are_told_of(caplog):
    with Counting(None).sv.managed_session() as session:
        turns = [session.is_update for _ in session.steps((one for one in range(6)), accumulate=4)]
        assert turns == [False] * 3 + [True] + [False] * 2
        assert session.global_step == 1
    assert "2 of accumulate=4 batches made no update" in caplog.text


# --- evaluation


def test_an_evaluation_draws_nothing_from_the_training():
    values = DataLoader(torch.randn(4, 1), shuffle=True)
    drawn = []
    for evaluates in (False, True):
        torch.manual_seed(1)
        with Counting(None).sv.managed_session() as session:
            for _ in session.steps(max_steps=2):
                if evaluates:
                    with session.evaluating():
                        list(values)
            drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[1]


def test_a_checkpoint_that_comes_due_in_an_evaluation_is_taken_at_the_end_of_its_step(tmp_path, caplog):
    run = Counting(tmp_path)
    with pytest.raises(Killed), run.sv.managed_session() as session:
        for step in session.steps(max_steps=2):
            with torch.no_grad():
                run.model.weight += 1.0
            if step == 0:
                with session.evaluating():
                    run.save()
            else:
                assert run.sv._saving.writer.drain(SOON_SECS)
                raise Killed

    assert restored(tmp_path) == (1, 1.0)
    assert "skipped" not in caplog.text


def test_an_evaluation_that_is_told_of_is_no_hang():
    from stepguard.watching.step_meter import StepMeter

    run = Counting(None)
    with run.sv.managed_session() as session:
        meter = StepMeter(run.sv._engine, run.sv._observer.now)
        meter.follow(session)
        list(session.steps(max_steps=1))
        meter.look()
        seen = meter.moves
        meter.look()
        assert meter.moves == seen
        with session.evaluating():
            meter.look()
            assert meter.moves == seen + 1


def test_values_beside_the_model_are_those_of_the_last_step_too(tmp_path):
    values = Values(steps=0)
    sv = Supervisor({"values": values}, tmp_path, save_summaries_secs=0, save_model_secs=3600)
    with sv.managed_session() as session:
        for _ in session.steps(max_steps=3):
            values.steps += 1
        values.steps = -1
    again = Values(steps=0)
    with Supervisor({"values": again}, tmp_path, save_summaries_secs=0).managed_session():
        assert again.steps == 3


class Evaluating(Tutorial):
    """Its evaluation has workers that persist, and draws an order in each epoch."""

    def __init__(self, logdir):
        super().__init__(logdir)
        values = self.values.dataset
        self.values = DataLoader(values, batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)


@pytest.mark.parametrize("place", ["step", "end"])
def test_persistent_workers_of_an_evaluation_do_not_move_the_training(place, tmp_path):
    whole = Evaluating(tmp_path / "whole").train()
    with pytest.raises(Killed):
        Evaluating(tmp_path / "killed").train(dies=(1, place))
    again = Evaluating(tmp_path / "killed").train()

    assert again.outcome()[0] == whole.outcome()[0]
