"""A run that was stopped and gone on with ends bit by bit where an uninterrupted one ends."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from training import BATCH, ITEMS, Augmented, Training, plain

from stepguard.errors import CheckpointMismatchError

STEPS = 30
BATCHES = -(-ITEMS // BATCH)


class Numbers(IterableDataset):
    """Items one after the other; which ones, the random states of the process decide."""

    def __iter__(self):
        data = Augmented()
        for index in torch.randperm(ITEMS).tolist():
            yield index, data.inputs[index], data.targets[index]


class Batches(BatchSampler):
    """Batches that are not just so many samples in a row."""

    def __init__(self, size):
        super().__init__(RandomSampler(range(ITEMS)), size, drop_last=False)


def with_generator(**options):
    return DataLoader(Augmented(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(9), **options)


LOADERS = {
    "shuffled": lambda: DataLoader(Augmented(), BATCH, shuffle=True),
    "in order": lambda: DataLoader(Augmented(), BATCH),
    "two workers": lambda: DataLoader(Augmented(), BATCH, shuffle=True, num_workers=2),
    "workers that persist": lambda: DataLoader(
        Augmented(), BATCH, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "a generator of its own": with_generator,
    "a generator and workers": lambda: with_generator(num_workers=2),
    "a generator and workers that persist": lambda: with_generator(num_workers=2, persistent_workers=True),
    "drawn with replacement": lambda: DataLoader(
        Augmented(), BATCH, sampler=RandomSampler(range(ITEMS), replacement=True), num_workers=1
    ),
    "weighted": lambda: DataLoader(Augmented(), BATCH, sampler=WeightedRandomSampler(range(1, ITEMS + 1), ITEMS)),
    "a batch sampler": lambda: DataLoader(
        Augmented(), batch_sampler=BatchSampler(RandomSampler(range(ITEMS)), BATCH, drop_last=True), num_workers=1
    ),
    "a batch sampler without batches": lambda: DataLoader(
        plain(), batch_size=None, sampler=BatchSampler(RandomSampler(range(ITEMS)), BATCH, drop_last=False)
    ),
    "torchdata's": lambda: StatefulDataLoader(plain(), BATCH, shuffle=True),
    "torchdata's with workers": lambda: StatefulDataLoader(plain(), BATCH, shuffle=True, num_workers=2),
    "an iterable dataset": lambda: DataLoader(Numbers(), BATCH),
    "an iterable dataset and a worker": lambda: DataLoader(Numbers(), BATCH, num_workers=1),
    "a list of batches": lambda: list(DataLoader(plain(), BATCH)),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("stops", [(1, 12), (BATCHES, 2 * BATCHES, 2 * BATCHES + 1), (29,)], ids=str)
def test_a_stopped_run_ends_where_an_uninterrupted_one_ends(kind, stops, tmp_path):
    whole = Training(tmp_path / "whole", LOADERS[kind]).train(STEPS)
    parts = [Training(tmp_path / "parts", LOADERS[kind]).train(steps) for steps in (*stops, STEPS)]

    assert [part.began_at for part in parts] == [0, *stops]
    assert list(itertools.chain(*(part.batches for part in parts))) == whole.batches
    assert parts[-1].outcome() == whole.outcome()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_supervised_run_ends_where_a_bare_loop_ends(workers, tmp_path):
    def loader():
        return DataLoader(plain(), BATCH, shuffle=True, num_workers=workers)

    supervised = Training(tmp_path, loader, save_model_secs=0.01).train(epochs=3)
    supervised.outcome()
    bare = Training(None, loader)
    for _ in range(3):
        for batch in bare.loader:
            bare.step(batch)

    assert supervised.batches == bare.batches
    assert supervised.outcome() == bare.outcome()


def test_what_was_seen_is_not_loaded_again(tmp_path):
    class Watched(Augmented):
        def __init__(self):
            super().__init__()
            self.loaded = []

        def __getitem__(self, index):
            self.loaded.append(index)
            return super().__getitem__(index)

    def loader():
        return DataLoader(Watched(), BATCH, shuffle=True)

    first = Training(tmp_path, loader).train(5)
    second = Training(tmp_path, loader).train(BATCHES)

    # The list goes on where it was: what a data set keeps belongs to the position.
    assert second.loader.dataset.loaded[: 5 * BATCH] == first.loader.dataset.loaded
    assert sorted(second.loader.dataset.loaded) == list(range(ITEMS))


def test_epochs_of_the_run_before_count(tmp_path):
    first = Training(tmp_path).train(epochs=2)
    second = Training(tmp_path).train(epochs=3)
    third = Training(tmp_path).train(epochs=3)

    assert len(first.batches) == 2 * BATCHES
    assert len(second.batches) == BATCHES
    assert third.batches == []


def test_loaders_used_one_after_the_other_are_each_gone_on_with(tmp_path):
    def run(logdir, *limits):
        training = Training(logdir)
        other = DataLoader(Augmented(), 5, shuffle=True)
        with training.sv.managed_session() as session:
            for batch in session.steps(training.loader, max_steps=limits[0]):
                training.step(batch)
            for batch in session.steps(other, max_steps=limits[1]):
                training.step(batch)
        training.outcome()
        return training

    whole = run(tmp_path / "whole", 10, 20)
    parts = [run(tmp_path / "parts", 4, 4), run(tmp_path / "parts", 10, 13), run(tmp_path / "parts", 10, 20)]

    assert list(itertools.chain(*(part.batches for part in parts))) == whole.batches
    assert parts[-1].outcome() == whole.outcome()


def test_a_loop_for_each_epoch_is_gone_on_with(tmp_path):
    def run(logdir, max_steps):
        training = Training(logdir)
        with training.sv.managed_session() as session:
            for epoch in range(4):
                for batch in session.steps(training.loader, epochs=epoch + 1, max_steps=max_steps):
                    training.step(batch)
        training.outcome()
        return training

    whole = run(tmp_path / "whole", None)
    parts = [run(tmp_path / "parts", steps) for steps in (3, BATCHES, 11, None)]

    assert list(itertools.chain(*(part.batches for part in parts))) == whole.batches
    assert parts[-1].outcome() == whole.outcome()


def test_what_is_drawn_before_the_first_loop_is_drawn_again_by_who_was_killed_there(tmp_path):
    def run(logdir, *, is_killed=False, max_steps=STEPS):
        training = Training(logdir)
        with training.sv.managed_session() as session:
            torch.rand(7)
            session.save(name="prepared")
            if is_killed:
                return None
            torch.rand(7)
            for _ in session.epochs(3):
                torch.rand(7)
                for batch in session.steps(training.loader, max_steps=max_steps):
                    training.step(batch)
        training.outcome()
        return training

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", is_killed=True)
    first = run(tmp_path / "parts", max_steps=BATCHES + 3)
    last = run(tmp_path / "parts")

    assert [*first.batches, *last.batches] == whole.batches
    assert last.outcome() == whole.outcome()


def test_what_is_drawn_before_the_first_step_does_not_change_the_run(tmp_path):
    whole = Training(tmp_path / "whole").train(STEPS)
    Training(tmp_path / "parts").train(10)
    resumed = Training(tmp_path / "parts")
    with resumed.sv.managed_session() as session:
        torch.rand(100)
        for batch in session.steps(resumed.loader, max_steps=STEPS):
            resumed.step(batch)

    assert resumed.outcome() == whole.outcome()


class TestALoaderOfItsOwnState:
    class Counting:
        """It knows itself where it is, as torchdata's StatefulDataLoader does, and is nothing else that we know."""

        def __init__(self):
            self.data = Augmented()
            self.next_index = 0

        def __iter__(self):
            while self.next_index < ITEMS:
                index, self.next_index = self.next_index, self.next_index + 1
                yield torch.tensor(index), self.data.inputs[index].repeat(2, 1), self.data.targets[index].repeat(2, 1)
            self.next_index = 0

        def state_dict(self):
            return {"next_index": self.next_index}

        def load_state_dict(self, state):
            self.next_index = state["next_index"]

    def test_is_gone_on_with_by_that(self, tmp_path):
        whole = Training(tmp_path / "whole", self.Counting).train(ITEMS + 10)
        parts = [Training(tmp_path / "parts", self.Counting).train(steps) for steps in (7, ITEMS, ITEMS + 10)]

        assert list(itertools.chain(*(part.batches for part in parts))) == whole.batches
        assert parts[-1].outcome() == whole.outcome()

    def test_that_cannot_be_saved_is_named_when_it_is_first_used(self, tmp_path):
        class Broken(self.Counting):
            def state_dict(self):
                return {"inner": {"where": object()}}

        with pytest.raises(TypeError, match=r"state_dict\(\)\.inner\.where.*object"):
            Training(tmp_path, Broken).train(1)


class TestAnotherLoader:
    @pytest.fixture
    def logdir(self, tmp_path):
        Training(tmp_path).train(3)
        return tmp_path

    @pytest.mark.parametrize(
        ("loader", "difference"),
        [
            (lambda: DataLoader(Augmented(), batch_sampler=Batches(10)), "batch size: expected 8, found 10"),
            (lambda: DataLoader(range(40), BATCH, shuffle=True), "items in the dataset: expected 50, found 40"),
            (lambda: DataLoader(Augmented(), BATCH, drop_last=True), "batches in an epoch: expected 7, found 6"),
            (lambda: list(DataLoader(Augmented(), BATCH)), "kind"),
        ],
    )
    def test_than_at_the_save_is_refused(self, loader, difference, logdir):
        training = Training(logdir, loader)

        with pytest.raises(CheckpointMismatchError, match=difference):
            training.train(10)

        assert training.batches == []

    def test_is_begun_with_anew_if_that_is_asked_for(self, logdir):
        training = Training(logdir, lambda: DataLoader(Augmented(), 10))
        with training.sv.managed_session() as session:
            for batch in session.steps(training.loader, max_steps=4, resume_data=False):
                training.step(batch)

        assert training.batches == [list(range(10))]


def test_an_iterable_says_that_it_reads_again_what_was_seen(tmp_path, caplog):
    Training(tmp_path, LOADERS["an iterable dataset"]).train(3)
    with caplog.at_level(logging.INFO, "stepguard"):
        Training(tmp_path, LOADERS["an iterable dataset"]).train(4)

    assert "reading 3 batches that were seen before" in caplog.text


def test_a_one_time_iterator_ends_after_its_one_epoch(tmp_path):
    training = Training(tmp_path, lambda: iter(DataLoader(plain(), BATCH))).train()

    assert len(training.batches) == BATCHES


def test_a_loader_without_a_batch_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one batch"):
        Training(tmp_path, list).train(1)
