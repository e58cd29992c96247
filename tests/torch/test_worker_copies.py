"""Workers have copies of the data set: what the program changes in its own, and what workers make in theirs."""

from __future__ import annotations

import gc
import io

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from stepguard.errors import CheckpointMismatchError
from stepguard.torch import Supervisor
from stepguard.torch.data.feeds import feed_of
from stepguard.torch.random_states import STREAMS

ITEMS = 24
BATCH = 4
EPOCHS = 3
KINDS = {"no worker": {}, "workers": {"num_workers": 2}, "persistent": {"num_workers": 2, "persistent_workers": True}}


class Changing(Dataset):
    """Items that depend on what the program changes in the course of the run."""

    def __init__(self):
        self.level = 0
        self.weights = [1.0, 2.0]

    def __len__(self):
        return ITEMS

    def __getitem__(self, index):
        return torch.tensor([float(index), float(self.level), self.weights[1]])


class MakesItsGenerator(Changing):
    """It makes its generator when it is first needed, as one does that each worker shall have its own."""

    own = None

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def __getitem__(self, index):
        if self.own is None:
            self.own = np.random.default_rng(self.seed())
        return torch.tensor([float(index), self.own.random()])


class SeededByItsWorker(IterableDataset):
    def __iter__(self):
        info = get_worker_info()
        order = np.random.default_rng(info.seed).permutation(ITEMS // 2)
        return iter(torch.tensor([info.id, int(one)]) for one in order)


def loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(make, options, stops, change=lambda dataset, step: None, kind=DataLoader):
    """The batches of a run that was stopped after so many steps, each time in a new process."""
    batches, state = [], None
    for stop in (*stops, None):
        torch.manual_seed(1)
        np.random.seed(1)
        dataset = make()
        shuffle = not isinstance(dataset, IterableDataset)
        feed = feed_of(kind(dataset, batch_size=BATCH, **({"shuffle": True} if shuffle else {}), **options))
        if state is not None:
            feed.resume(state["position"])
            STREAMS.restore(state["random"])
        while stop is None or len(batches) < stop:
            try:
                batches.append(feed.next(EPOCHS).tolist())
            except StopIteration:
                break
            torch.rand(1)
            change(dataset, len(batches))
            feed.consumed()
        state = loaded({"position": feed.position(), "random": STREAMS.capture()})
        feed.close()
        gc.collect()
    return batches


def in_the_middle_of_an_epoch(dataset, step):
    if step in (3, 8):
        dataset.level += 1
        dataset.weights[1] += 1


def at_the_end_of_an_epoch(dataset, step):
    if step % (ITEMS // BATCH) == 0:
        dataset.level += 1
        dataset.weights[1] *= 2


@pytest.mark.parametrize("change", [in_the_middle_of_an_epoch, at_the_end_of_an_epoch])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_program_changes_reaches_the_same_batches(kind, change):
    expected = run(Changing, KINDS[kind], (), change)
    assert len({batch[0][1] for batch in expected}) == (1 if kind == "persistent" else 3)
    assert run(Changing, KINDS[kind], (4, 6, 9, 15), change) == expected


def test_a_run_may_go_on_with_workers_and_without(tmp_path):
    for before, after in (("no worker", "workers"), ("workers", "no worker")):
        feed = feed_of(DataLoader(Changing(), batch_size=BATCH, **KINDS[before]))
        feed.next(1)
        feed.loader.dataset.level = 3
        feed.consumed()
        position = loaded(feed.position())
        feed.close()
        other = feed_of(DataLoader(Changing(), batch_size=BATCH, **KINDS[after]))
        other.resume(position)
        assert other.next(1)[0][0] == BATCH
        assert other.loader.dataset.level == 3
        other.close()
    gc.collect()


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(lambda: torch.initial_seed() % 2**32, id="initial_seed"),
        pytest.param(lambda: get_worker_info().seed % 2**32, id="the worker's"),
        pytest.param(lambda: np.random.randint(2**31), id="drawn"),
    ],
)
def test_a_generator_that_is_made_in_a_worker_gives_a_batch_the_same_numbers(seed):
    expected = run(lambda: MakesItsGenerator(seed), KINDS["persistent"], ())
    assert run(lambda: MakesItsGenerator(seed), KINDS["persistent"], (3, 6, 13)) == expected


def test_the_seed_of_a_worker_is_that_of_its_epoch():
    expected = run(SeededByItsWorker, KINDS["persistent"], ())
    assert expected[:6] != expected[6:12]
    assert run(SeededByItsWorker, KINDS["persistent"], (4, 6, 13)) == expected


class Counting(Changing):
    def __getitem__(self, index):
        self.level += 1
        return super().__getitem__(index)


class CountingStream(IterableDataset):
    seen = 0

    def __iter__(self):
        for number in range(ITEMS):
            self.seen += 1
            yield torch.tensor([float(number), float(self.seen)])


@pytest.mark.parametrize(
    ("kind", "make", "is_told"),
    [
        ("workers", Changing, False),
        ("workers", Counting, True),
        ("persistent", Counting, True),
        ("workers", CountingStream, False),
        ("persistent", CountingStream, True),
    ],
)
def test_a_data_set_that_counts_in_its_workers_is_told_of_at_the_restart(kind, make, is_told, caplog):
    # A stream goes on counting only from epoch to epoch, and is refused in the middle of a later one.
    stop = 4 * ITEMS // BATCH if make is CountingStream else 11
    try:
        run(make, KINDS[kind], (stop,))
    except CheckpointMismatchError:
        assert (kind, make) == ("persistent", CountingStream)
    assert ("goes on changing numbers in its workers" in caplog.text) == is_told


@pytest.mark.parametrize("kind", ["no worker", "workers"])
def test_a_generator_that_is_made_late_in_this_process_is_named(kind, caplog):
    run(lambda: MakesItsGenerator(lambda: 1), KINDS[kind], (3,))
    assert ("had made a generator of random numbers when it first needed one" in caplog.text) == (kind == "no worker")


class Context:
    """What a program shares between its training and its data set, which draws nothing from it."""

    def __init__(self):
        self.random = np.random.default_rng(1)
        self.optimizer = None


class Reading(Changing):
    def __init__(self, context):
        super().__init__()
        self.context = context


@pytest.mark.parametrize("workers", [0, 1])
def test_a_generator_of_the_training_that_the_data_set_refers_to_goes_on(workers, tmp_path, caplog):
    def draws(logdir, end):
        context = Context()
        model = torch.nn.Linear(1, 1)
        context.optimizer = torch.optim.Adam(model.parameters())
        loader = DataLoader(Reading(context), batch_size=2, num_workers=workers)
        sv = Supervisor({"model": model, "optimizer": context.optimizer}, logdir, save_summaries_secs=0)
        found = []
        with sv.managed_session() as sess:
            for _ in sess.steps(loader, max_steps=end):
                found.append(context.random.random())
                context.optimizer.zero_grad()
                model(torch.ones(1, 1)).sum().backward()
                context.optimizer.step()
        return found

    first = len(DataLoader(Reading(Context()), batch_size=2)) + 1
    drawn = draws(tmp_path / "resumed", first) + draws(tmp_path / "resumed", first + 3)
    assert drawn == draws(tmp_path / "whole", first + 3)
    assert not caplog.text


class KeepsItsPosition(IterableDataset):
    """It makes its generator when its workers have begun, and draws from it for each item, or once."""

    def __init__(self, draws_each):
        self.draws_each = draws_each
        self.at = 0

    def __iter__(self):
        self.own = np.random.default_rng(7)
        self.order = self.own.permutation(ITEMS)
        while self.at < ITEMS:
            self.at += 1
            yield torch.tensor([float(self.order[self.at - 1]), self.own.random() if self.draws_each else 0.0])
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("draws_each", [True, False])
def test_a_generator_that_is_made_late_in_workers_that_go_on_is_named_if_it_matters(draws_each, caplog):
    def torchdatas(dataset, **options):
        return StatefulDataLoader(dataset, num_workers=1, **options)

    whole = run(lambda: KeepsItsPosition(draws_each), {}, (), kind=torchdatas)
    again = run(lambda: KeepsItsPosition(draws_each), {}, (4, 6, 9), kind=torchdatas)
    assert ("had made a generator of random numbers when it first needed one" in caplog.text) == draws_each
    assert (again == whole) == (not draws_each)
