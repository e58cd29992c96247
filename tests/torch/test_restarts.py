"""What a program does again before it comes to where it was interrupted: it counts once, and draws the same."""

from __future__ import annotations

import random
import time
from functools import partial

import pytest
import torch
from loop_programs import SOON_SECS, Killed, until
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

from stepguard.options import Restoring, Saving
from stepguard.steps import boundary
from stepguard.torch import Supervisor, Values

BATCHES = 4
INPUTS = torch.linspace(-1, 1, 4 * BATCHES)[:, None]


class Program:
    """A process: a model with dropout that trains; ``kill_at`` is the step after whose checkpoint it dies.

    With ``at_end`` it dies at the first point after that step where the program has called :meth:`passes`.
    """

    def __init__(self, logdir, kill_at=None, *, at_end=False, **options):
        torch.manual_seed(1)
        random.seed(1)
        self.model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.noise = torch.Generator().manual_seed(2)
        self.values = Values(level=0)
        self.kill_at, self.at_end = kill_at, at_end
        state = {"model": self.model, "optimizer": self.optimizer, "noise": self.noise, "values": self.values}
        saving = Saving(save_model_secs=0, save_at_end=True)
        self.sv = Supervisor(state, logdir, saving=saving, save_summaries_secs=0, **options)

    def loader(self):
        return DataLoader(TensorDataset(INPUTS), batch_size=4, shuffle=True)

    def train(self, sess, x, factor=1.0):
        self.optimizer.zero_grad()
        (self.model(x) * factor - x - self.values.level).square().mean().backward()
        self.optimizer.step()
        if sess.global_step + 1 == self.kill_at and not self.at_end:
            sess.finish_step()
            self.save_and_die()

    def passes(self, sess):
        if self.at_end and sess.global_step == self.kill_at:
            self.save_and_die()

    def save_and_die(self):
        self.sv._saving.checkpointer()
        assert self.sv._saving.writer.drain(SOON_SECS)
        raise Killed

    def works(self):
        """Changes what is saved, and draws, as at the beginning of an epoch or between two phases."""
        self.values.level += 1
        self.optimizer.param_groups[0]["lr"] *= 0.7
        self.optimizer.state.clear()
        torch.nn.init.normal_(self.model[2].weight.data)
        torch.rand(3, generator=self.noise)
        return torch.randperm(len(INPUTS))


def work_before_the_loop(run, sess):
    order = run.works()
    for x in sess.steps(DataLoader(INPUTS[order], batch_size=4), epochs=3):
        run.train(sess, x)
    run.passes(sess)


def work_at_the_beginning_of_an_epoch(run, sess):
    loader = run.loader()
    for _ in sess.epochs(3):
        run.works()
        for (x,) in sess.steps(loader):
            run.train(sess, x)
        run.passes(sess)
        torch.rand(1)


def order_of_an_epoch(run, sess):
    for epoch in sess.epochs(3):
        order = torch.randperm(len(INPUTS))
        for step in sess.steps(max_steps=(epoch + 1) * BATCHES):
            run.train(sess, INPUTS[order][step % BATCHES * 4 :][:4])
        run.passes(sess)


def work_between_two_loops_of_an_epoch(run, sess):
    one, other = run.loader(), run.loader()
    for _ in sess.epochs(2):
        run.works()
        for (x,) in sess.steps(one):
            run.train(sess, x)
        run.passes(sess)
        factor = float(run.works()[0])
        for (x,) in sess.steps(other):
            run.train(sess, x, factor)
        run.passes(sess)
        run.works()


def work_between_loops(run, sess):
    one, other = run.loader(), run.loader()
    for (x,) in sess.steps(one, epochs=1):
        run.train(sess, x)
    run.passes(sess)
    factor = float(run.works()[0])
    for (x,) in sess.steps(other, epochs=1):
        run.train(sess, x, factor)
    run.passes(sess)
    run.works()
    for step in sess.steps(max_steps=3 * BATCHES):
        run.train(sess, INPUTS[step : step + 1])
    run.passes(sess)


def work_between_loops_over_epochs(run, sess):
    loader = run.loader()
    for (x,) in sess.steps(loader, max_steps=2):
        run.train(sess, x)
    run.works()
    for _ in sess.epochs(2):
        for (x,) in sess.steps(loader):
            run.train(sess, x)
        run.passes(sess)
    run.works()
    for _ in sess.epochs(3):
        for (x,) in sess.steps(loader):
            run.train(sess, x)
        run.passes(sess)


def draws_before_each_step_of_its_own_loop(run, sess):
    while sess.global_step < 3 * BATCHES:
        rows = torch.randint(len(INPUTS), (4,))
        with sess.step():
            run.train(sess, INPUTS[rows])


def weights(run):
    # Also what the next draws would be.
    return [one.tolist() for one in run.model.parameters()], run.values.level, torch.rand(1).item(), random.random()


def outcome(program, logdir, kill_at=None, **how):
    run = Program(logdir, kill_at, **how)
    with run.sv.managed_session() as sess:
        program(run, sess)
    return weights(run)


PROGRAMS = [
    work_before_the_loop,
    work_at_the_beginning_of_an_epoch,
    order_of_an_epoch,
    work_between_two_loops_of_an_epoch,
    work_between_loops,
    work_between_loops_over_epochs,
    draws_before_each_step_of_its_own_loop,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: one.__name__)
def test_what_is_done_again_counts_once_and_draws_the_same(program, tmp_path, caplog):
    whole = outcome(program, None)
    caplog.clear()
    # Only the second step of a loop of its own shows whether it draws between its steps.
    for step in range(2 if program is draws_before_each_step_of_its_own_loop else 1, 3 * BATCHES):
        logdir = tmp_path / str(step)
        # Each is killed twice, and the second time after one step more.
        for kill_at in (step, step + 1):
            with pytest.raises(Killed):
                outcome(program, logdir, kill_at)
        assert outcome(program, logdir) == whole, f"killed after step {step}"
    assert "trains nothing" not in caplog.text
    assert "the program has changed" not in caplog.text


@pytest.mark.parametrize(
    "program", [one for one in PROGRAMS if "before" not in one.__name__], ids=lambda one: one.__name__
)
def test_work_after_the_last_step_of_a_loop_is_done(program, tmp_path):
    whole = outcome(program, None)
    for step in (BATCHES, 2 * BATCHES):
        logdir = tmp_path / str(step)
        try:
            outcome(program, logdir, step, at_end=True)
        except Killed:
            assert outcome(program, logdir) == whole, f"killed between two loops, after step {step}"


def test_rates_that_a_start_sets_before_its_loop_are_put_back_with_a_warning_or_win(tmp_path, caplog):
    def train(rate, kill_at, **options):
        run = Program(tmp_path, kill_at, **options)
        with pytest.raises(Killed), run.sv.managed_session() as sess:
            run.optimizer.param_groups[0]["lr"] = rate
            for step in sess.steps():
                run.train(sess, INPUTS[step : step + 1])
        return run.optimizer.param_groups[0]["lr"]

    assert train(0.5, 2) == 0.5
    assert train(0.5, 4) == 0.5
    assert "the program has changed" not in caplog.text
    assert train(0.25, 6) == 0.5
    assert "the program has changed optimizer.lr after the restore and before its first loop" in caplog.text
    assert "this is undone: optimizer.lr is 0.5 again, not 0.25" in caplog.text
    assert train(0.25, 8, restoring=Restoring(hyperparameters="program")) == 0.25


def test_an_unchanged_state_is_not_read_twice(tmp_path, monkeypatch):
    outcome(order_of_an_epoch, tmp_path, kill_at=None)
    read = []
    run = Program(tmp_path)
    returned = run.sv._engine._restorer.return_to
    monkeypatch.setattr(
        run.sv._engine._restorer, "return_to", lambda *of, **how: (read.append(of), returned(*of, **how))
    )
    with run.sv.managed_session() as sess:
        for step in sess.steps(max_steps=sess.global_step + 2):
            run.train(sess, INPUTS[step % 4 : step % 4 + 1])
    assert read == []


def test_a_second_loop_over_as_many_epochs_says_that_it_trains_nothing(caplog):
    run = Program(None)
    loader = run.loader()
    with run.sv.managed_session() as sess:
        for number in (1, 1):
            for _ in sess.epochs(number):
                for (x,) in sess.steps(loader):
                    run.train(sess, x)
    assert caplog.text.count("epochs: trains nothing: 1 epochs are done") == 1


def test_an_epoch_whose_own_loop_has_no_step_left_is_told_of(tmp_path, caplog):
    def program(run, sess):
        for epoch in sess.epochs(2):
            while sess.global_step < (epoch + 1) * BATCHES:
                with sess.step():
                    run.train(sess, INPUTS[:4])
            run.works()

    with pytest.raises(Killed):
        outcome(program, tmp_path, BATCHES)
    assert "sess.step() does not say where" not in caplog.text
    outcome(program, tmp_path)
    assert "the last step in the body of epoch 1, and sess.step() does not say where a loop ends" in caplog.text


def test_a_longer_loop_is_not_warned_of(tmp_path, caplog):
    for epochs in (1, 3):
        run = Program(tmp_path)
        with run.sv.managed_session() as sess:
            for (x,) in sess.steps(run.loader(), epochs=epochs):
                run.train(sess, x)
    assert "sess.epochs" not in caplog.text


def test_a_start_that_trains_nothing_at_all_says_so(tmp_path, caplog):
    for count in (0, 1):
        outcome(work_between_loops, tmp_path)
        assert caplog.text.count("trains nothing") == count


def test_the_end_of_ones_own_loop_waits_for_no_save(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(boundary, "_PATIENCE_SECS", 600.0)
    run = Program(tmp_path)
    with run.sv.managed_session() as sess:
        with sess.step():
            run.train(sess, INPUTS[:4])
            run.sv.loop(None, run.sv._saving.checkpointer)
            until(lambda: sess.boundary._turn is not None)  # it waits for the step, and then for the next one
        began = time.monotonic()
    assert time.monotonic() - began < SOON_SECS
    assert "no step boundary" not in caplog.text


@pytest.mark.parametrize("is_in_steps", [True, False])
def test_a_loop_that_is_not_of_the_session_is_told_of_at_its_end(is_in_steps, tmp_path, caplog):
    run = Program(tmp_path)
    with run.sv.managed_session() as sess:
        for x in sess.steps(max_steps=3) if is_in_steps else range(3):
            run.train(sess, INPUTS[x : x + 1])
    assert ("ends at step 0, where it began, and the program has trained in it" in caplog.text) != is_in_steps


def test_any_seed_of_the_process_can_be_restored(tmp_path):
    for end in (2, 4):
        run = Program(tmp_path)
        torch.manual_seed(2**64 - 1)  # a program that sets none may have this one
        with run.sv.managed_session() as sess:
            for (x,) in sess.steps(run.loader(), max_steps=end):
                run.train(sess, x)
    assert sess.global_step == 4


class Levels(Dataset):
    def __init__(self):
        self.level = 0

    def __len__(self):
        return len(INPUTS)

    def __getitem__(self, index):
        return (INPUTS[index] * (1 + self.level),)


class LevelsInOrder(IterableDataset):
    def __init__(self):
        self.data = Levels()

    def __iter__(self):
        return (self.data[index] for index in range(len(INPUTS)))


def seeds():
    generator = torch.Generator()
    return DataLoader(TensorDataset(INPUTS), 4, shuffle=True, generator=generator), generator.manual_seed


def weights_of_a_sampler():
    sampler = WeightedRandomSampler(torch.ones(len(INPUTS)), len(INPUTS))

    def set_up(epoch):
        sampler.weights = torch.arange(1, len(INPUTS) + 1).double() ** epoch

    return DataLoader(TensorDataset(INPUTS), 4, sampler=sampler), set_up


def levels(workers=0):
    data = Levels()
    return DataLoader(data, 4, shuffle=True, num_workers=workers), lambda epoch: setattr(data, "level", epoch)


def levels_of_a_stream():
    stream = LevelsInOrder()
    return DataLoader(stream, 4), lambda epoch: setattr(stream.data, "level", epoch)


def levels_of_two():
    (one, set_up), (other, _) = levels(), seeds()
    return {"one": one, "other": other}, set_up


def indices():
    part = Subset(TensorDataset(INPUTS), list(range(4 * BATCHES)))

    def set_up(epoch):
        part.indices = random.Random(epoch).sample(range(len(INPUTS)), len(INPUTS))

    return DataLoader(part, 4, shuffle=True), set_up


SET_UPS = [seeds, weights_of_a_sampler, levels, partial(levels, workers=1), levels_of_a_stream, levels_of_two, indices]


@pytest.mark.parametrize("make", SET_UPS, ids=lambda one: getattr(one, "__name__", "levels in a worker"))
def test_what_the_program_sets_in_its_data_for_an_epoch_is_not_replaced(make, tmp_path):
    def program(run, sess):
        loader, set_up = make()
        for epoch in sess.epochs(5):
            set_up(epoch)
            for batch in sess.steps(loader):
                (x,) = batch["one"] if isinstance(batch, dict) else batch
                run.train(sess, x)
            run.passes(sess)

    whole = outcome(program, None)
    # The first set-up between two epochs is that of the second.
    for epochs in (2, 3):
        logdir = tmp_path / str(epochs)
        with pytest.raises(Killed):
            outcome(program, logdir, epochs * BATCHES, at_end=True)
        assert outcome(program, logdir) == whole
    with pytest.raises(Killed):
        outcome(program, tmp_path / "inside", 2 * BATCHES + 1)
    assert outcome(program, tmp_path / "inside") == whole
