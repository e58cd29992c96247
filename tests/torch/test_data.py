"""The position in the data: who is told the epoch, what another number of processes finds, and what is kept of it."""

from __future__ import annotations

import gc
import itertools
import random
import sys

import pytest
import torch
from loader_kinds import BATCHES, KINDS, OwnEpochs, StatefulStream, Stream, Wrapper, loader, shuffled
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler
from torchdata import nodes
from torchdata.stateful_dataloader import StatefulDataLoader

from stepguard.errors import CheckpointMismatchError
from stepguard.options import Saving
from stepguard.store import CheckpointStore
from stepguard.torch import Supervisor, Values, load
from stepguard.torch.checkpoint.files import read_file
from stepguard.torch.data.feeds import feed_of

NUMBERS = list(range(64))


def divided(processes, size, rank=0, kind=DataLoader, **options):
    sampler = DistributedSampler(NUMBERS, processes, rank, **options)
    return kind(NUMBERS, batch_size=size, sampler=sampler)


def flat(batches):
    return list(itertools.chain(*batches))


def take(feed, number, epochs=None):
    """The next batches, as lists."""
    batches = []
    for _ in range(number):
        batch = feed.next(epochs)
        batches.append(batch.tolist() if isinstance(batch, torch.Tensor) else batch)
        feed.consumed()
    return batches


def moved(before, after, was=1, now=1, **options):
    """The feed of ``after`` at the position of ``before``, with another number of processes."""
    feed = feed_of(after)
    feed.resume({**before.position(), "processes": was}, processes=now, **options)
    return feed


def session(state, logdir, **options):
    options = {"save_model_secs": 0, "save_summaries_secs": 0, "saving": Saving(save_at_end=True), **options}
    return Supervisor(state, logdir, **options).managed_session()


class TestTheEpoch:
    @pytest.mark.parametrize("wrap", [lambda one: one, Wrapper, lambda one: Wrapper(Wrapper(one))])
    @pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
    def test_is_told_to_a_sampler_inside_whatever_is_around_it(self, wrap, kind):
        feed = feed_of(wrap(divided(2, 8, kind=kind)))
        epochs = [take(feed, 4) for _ in range(2)]

        for number, epoch in enumerate(epochs):
            sampler = divided(2, 8).sampler
            sampler.set_epoch(number)
            assert flat(epoch) == list(sampler)

    def test_is_told_to_persistent_workers_over_an_iterable_data_set(self):
        feed = feed_of(loader(Stream(), 2, True))
        epochs = [{row[-1] for batch in take(feed, BATCHES) for row in batch} for _ in range(3)]
        feed.close()

        assert epochs == [{0.0}, {1.0}, {2.0}]

    def test_is_told_to_persistent_workers_over_a_map_style_data_set(self):
        class Epochs(list):
            epoch = -1

            def set_epoch(self, epoch):
                self.epoch = epoch

            def __getitem__(self, index):
                return self.epoch

        feed = feed_of(DataLoader(Epochs(range(4)), batch_size=2, num_workers=1, persistent_workers=True))
        batches = take(feed, 4)
        feed.close()

        assert batches == [[0, 0], [0, 0], [1, 1], [1, 1]]


class TestAnotherNumberOfProcesses:
    @pytest.mark.parametrize(("size", "now", "then"), [(8, 1, 16), (16, 1, 16), (8, 4, 4), (8, 2, 8)])
    def test_goes_on_at_the_same_sample(self, size, now, then):
        before = [feed_of(divided(2, size, rank, shuffle=False)) for rank in range(2)]
        seen = [one for feed in before for batch in take(feed, 1) for one in batch]
        after = [moved(before[rank % 2], divided(now, then, rank, shuffle=False), 2, now) for rank in range(now)]
        rest = [feed.next(None).tolist() for feed in after]

        assert sorted(seen) == NUMBERS[: 2 * size]
        assert sorted(flat(rest)) == NUMBERS[2 * size : 2 * size + now * then]

    def test_sees_each_item_of_the_epoch_once(self):
        before = [feed_of(divided(2, 8, rank)) for rank in range(2)]
        seen = [one for feed in before for batch in take(feed, 2) for one in batch]
        after = moved(before[0], divided(1, 16), 2, 1)
        last = []
        for _ in range(2):
            seen += after.next(None).tolist()
            last.append(after.is_last_batch)
            after.consumed()

        assert sorted(seen) == NUMBERS
        assert last == [False, True]

    def test_and_its_next_checkpoint_is_of_the_new_number(self):
        before = feed_of(divided(2, 8, shuffle=False))
        take(before, 2)
        after = moved(before, divided(1, 16, shuffle=False), 2, 1)
        take(after, 1)
        again = moved(after, divided(1, 16, shuffle=False))

        assert take(again, 1, epochs=1) == [NUMBERS[48:]]
        with pytest.raises(StopIteration):
            again.next(1)

    @pytest.mark.parametrize(
        "kind",
        [
            OwnEpochs,
            lambda: loader(StatefulStream(), 0, False),
            lambda: loader(StatefulStream(), 0, False, StatefulDataLoader),
            lambda: loader(Stream(), 0, False),
            lambda: shuffled(0, False),
            lambda: {"a": loader(Stream(), 0, False)},
        ],
    )
    def test_is_refused_where_the_shares_cannot_be_known(self, kind):
        before = feed_of(kind())
        take(before, 2)
        with pytest.raises(CheckpointMismatchError, match=r"of 2 processes .*there are 4 now.*DistributedSampler"):
            moved(before, kind(), 2, 4)

    def test_is_a_warning_if_that_is_asked_for(self, caplog):
        before = feed_of(loader(Stream(), 0, False))
        take(before, 2)
        after = moved(before, loader(Stream(), 0, False), 2, 1, is_checked=False)

        assert after.batches == 4
        assert "going on unchecked" in caplog.text

    def test_is_no_difference_between_two_epochs(self):
        before = feed_of(loader(Stream(), 0, False))
        take(before, BATCHES)
        with pytest.raises(StopIteration):
            before.next(1)
        assert moved(before, loader(Stream(), 0, False), 2, 4).epoch == 1


def test_another_batch_size_goes_on_where_batches_are_read_at_once(caplog):
    def read_at_once(size):
        return DataLoader(torch.arange(64), batch_size=None, sampler=BatchSampler(range(64), size, drop_last=False))

    before = feed_of(read_at_once(8))
    take(before, 4)
    with caplog.at_level("WARNING"):
        after = moved(before, read_at_once(16))
    assert flat(take(after, 2, epochs=1)) == NUMBERS[32:]
    assert "going on at sample 32 of epoch 0" in caplog.text


def test_another_batch_size_goes_on_at_the_same_sample_and_says_so(caplog):
    before = feed_of(DataLoader(NUMBERS, batch_size=8))
    take(before, 3)
    after = moved(before, DataLoader(NUMBERS, batch_size=10))
    batches = take(after, 4)

    assert flat(batches) == NUMBERS[24:]
    assert after.is_last_batch
    assert "batches of 8 in 1 process, the loader has batches of 10 in 1 process: going on at sample 24" in caplog.text
    assert "of epoch 0" in caplog.text


class TestReadingAgain:
    def stopped(self, kind, steps=3):
        feed = feed_of(KINDS[kind](0, False))
        take(feed, steps)
        return feed

    def test_counts_as_progress_and_can_be_stopped(self):
        feed = moved(self.stopped("a stream"), KINDS["a stream"](0, False))
        counts = []

        assert not feed.catch_up(lambda: counts.append(feed.read_again) or len(counts) <= 2)
        assert counts == [0, 1, 2, 2]
        assert feed.position()["batches"] == 3
        assert feed.catch_up(lambda: True)

    def test_that_is_slow_says_its_rate_and_its_end(self, caplog, monkeypatch):
        monkeypatch.setattr("stepguard.steps.reading_again._SLOW_SECS", 0)
        feed = moved(self.stopped("a stream"), KINDS["a stream"](0, False))
        feed.catch_up(lambda: True)

        assert "1 of 3 batches" in caplog.text
        assert " a second, 0 s left" in caplog.text

    def test_is_avoided_where_the_data_set_has_a_state(self):
        feed = moved(self.stopped("a stream with a state"), KINDS["a stream with a state"](0, False))
        take(feed, 1)

        assert feed.read_again == 0

    def test_that_finds_other_batches_is_refused_with_both_values(self):
        before = feed_of(Wrapper([[1], [2], [3]]))
        take(before, 2)
        feed = moved(before, Wrapper([[1], [4], [3]]))
        with pytest.raises(CheckpointMismatchError, match=r"batch 2 of epoch 0 is not what it was .*expected .*found"):
            feed.next(None)

    def test_of_a_list_that_has_changed_is_refused_at_once(self):
        before = feed_of([1, 2, 3])
        take(before, 2)
        with pytest.raises(CheckpointMismatchError, match="batch 2 of epoch 0"):
            moved(before, [1, 4, 3])

    def test_that_finds_too_little_is_refused(self):
        before = feed_of(Wrapper([[1], [2], [3]]))
        take(before, 3)
        feed = feed_of(iter([[1], [2]]))
        feed.resume({**before.position(), "loader": feed.description()})
        with pytest.raises(CheckpointMismatchError, match=r"expected the 3 batches .*found 2.*a function that makes"):
            feed.next(None)


def test_an_iterator_over_workers_is_warned_of_with_the_way(caplog):
    feed = feed_of(zip(shuffled(1, False), strict=True))
    feed.close()
    gc.collect()

    assert 'several loaders as {"a": a, "b": b}, or a function that makes the iterable' in caplog.text


class TestAGroup:
    def test_ends_with_the_shortest_and_has_a_batch_of_each(self, tmp_path):
        one, other = DataLoader(range(6), batch_size=2), DataLoader(range(5), batch_size=1)
        with session({"v": Values(x=0)}, tmp_path) as sess:
            batches = [
                (batch["one"].tolist(), batch["other"].tolist(), sess.is_last_batch)
                for _ in sess.epochs(2)
                for batch in sess.steps({"one": one, "other": other})
            ]
        assert batches == 2 * [([0, 1], [0], False), ([2, 3], [1], False), ([4, 5], [2], True)]

    def test_may_be_a_sequence(self):
        feed = feed_of((DataLoader([1, 2]), DataLoader([3, 4])))
        assert [[int(one) for one in feed.next(1)] for _ in range(2)] == [[1, 3], [2, 4]]

    def test_of_another_form_is_refused(self):
        before = feed_of({"a": DataLoader([1, 2]), "b": DataLoader([3, 4])})
        with pytest.raises(CheckpointMismatchError, match=r"members: expected .*found"):
            moved(before, {"a": DataLoader([1, 2]), "c": DataLoader([3, 4])})


def trained(logdir, loader, stop=None):
    """The batches of a program that makes a loader for each epoch; it is stopped after ``stop`` steps."""
    torch.manual_seed(1)
    random.seed(1)
    seen = []
    saving = Saving(save_at_end=True)
    sv = Supervisor({"v": Values(x=0)}, logdir, save_model_secs=0, save_summaries_secs=0, saving=saving)
    with sv.managed_session() as sess:
        for _ in sess.epochs(4):
            for batch in sess.steps(loader()):
                seen.append(batch.tolist())
                torch.rand(2)
                if sess.global_step + 1 == stop:
                    sv.request_stop()
    return seen


class TestALoaderForEachEpoch:
    @staticmethod
    def divided():
        return divided(2, 8)

    @staticmethod
    def seeded():
        return DataLoader(NUMBERS, 16, shuffle=True, generator=torch.Generator().manual_seed(7))

    @pytest.mark.parametrize("loaders", ["divided", "seeded"])
    @pytest.mark.parametrize("stops", [(2, 4, 9), (8, 12, 15)])
    def test_is_gone_on_with(self, loaders, stops, tmp_path):
        make = getattr(self, loaders)
        whole = trained(tmp_path / "whole", make)
        parts = [batch for stop in (*stops, None) for batch in trained(tmp_path / "parts", make, stop)]

        assert len(whole) == 16
        assert parts == whole

    def test_leaves_a_position_and_nothing_else(self, tmp_path):
        def workers():
            return DataLoader(range(2), batch_size=2, num_workers=1, persistent_workers=True)

        def counted(sess):
            gc.collect()
            return len(sess.process_state._places.feeds), len(torch.multiprocessing.active_children())

        with session({"v": Values(x=0)}, tmp_path) as sess:
            found = []
            for _ in range(4):
                for _ in sess.steps(workers(), epochs=1):
                    pass
                found.append(counted(sess))
        assert found[1:] == [found[1]] * 3
        assert found[1][0] <= 2

        saved = read_file(tmp_path / CheckpointStore(tmp_path).candidates()[0].name / "process-0.pt")["loaders"]
        assert len(saved) <= 2
        assert sum(one.get("times", 1) for one in saved) == 4

    def test_outside_of_epochs_is_the_one_of_the_same_number(self, tmp_path):
        def run(steps):
            seen = []
            with session({"v": Values(x=0)}, tmp_path) as sess:
                for _ in range(4):
                    seen += [int(batch) for batch in sess.steps(DataLoader(range(4)), epochs=1, max_steps=steps)]
            return seen

        assert [run(6), run(11), run(99)] == [[0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 2], [3, 0, 1, 2, 3]]


def test_workers_rest_when_other_loaders_are_used(tmp_path):
    loaders = [DataLoader(range(2), batch_size=2, num_workers=1, persistent_workers=True) for _ in range(7)]
    with session({"v": Values(x=0)}, tmp_path) as sess:
        for one in loaders:
            for _ in sess.steps(one, epochs=1):
                pass
        gc.collect()
        assert len(torch.multiprocessing.active_children()) <= 4
        assert len(list(sess.steps(loaders[0], epochs=2))) == 1


class TestResumeDataFalse:
    def run(self, logdir, size, steps, **options):
        seen = []
        sampler = DistributedSampler(range(32), 1, 0)
        one = DataLoader(range(32), batch_sampler=torch.utils.data.BatchSampler(sampler, size, drop_last=size == 4))
        with session({"v": Values(x=0)}, logdir) as sess:
            seen += [(sess.epoch, batch.tolist()) for batch in sess.steps(one, max_steps=steps, **options)]
        return seen

    def test_keeps_the_count_of_epochs_and_counts_once(self, tmp_path):
        self.run(tmp_path, 8, 6)
        anew = self.run(tmp_path, 4, 9, resume_data=False)
        later = self.run(tmp_path, 4, 15, resume_data=False)

        order = DistributedSampler(range(32), 1, 0)
        order.set_epoch(1)
        assert {epoch for epoch, _ in anew} == {1}
        assert flat(batch for _, batch in anew + later)[:32] == list(order)
        assert [epoch for epoch, _ in later] == [1] * 5 + [2]

    def test_is_one_of_three(self, tmp_path):
        with session({"v": Values(x=0)}, None) as sess, pytest.raises(ValueError, match="resume_data"):
            sess.steps([1], resume_data="no")


class TestValuesOfEachProcess:
    def test_come_back(self, tmp_path):
        for number in range(3):
            mine = Values(per_process=True, buffer=[], count=0)
            with session({"mine": mine, "all": Values(x=1)}, tmp_path) as sess:
                assert mine.count == number
                for _ in sess.steps(max_steps=number + 1):
                    mine.count += 1
                    mine.buffer.append(torch.tensor(number))
        assert [int(one) for one in mine.buffer] == [0, 1, 2]
        assert "mine" not in load(tmp_path)

    def test_are_those_of_the_program_where_the_checkpoint_has_none(self, tmp_path, caplog):
        with session({"all": Values(x=1)}, tmp_path) as sess:
            list(sess.steps(max_steps=1))
        mine = Values(per_process=True, count=7)
        with session({"all": Values(x=1), "mine": mine}, tmp_path):
            assert mine.count == 7
        assert "mine: the checkpoint has none of this process" in caplog.text

    def test_is_yes_or_no(self):
        with pytest.raises(TypeError, match="per_process"):
            Values(per_process=3)
        assert repr(Values(per_process=True, a=1)) == "Values(per_process=True, a=1)"


def test_a_feed_knows_whether_its_loader_is_held():
    held = DataLoader([1])
    feeds = [feed_of(held), feed_of(DataLoader([1])), feed_of([[1], [2]]), feed_of({"a": DataLoader([1])})]
    group = feed_of({"a": held})

    assert [feed.is_held for feed in feeds] == [True, False, False, False]
    assert group.is_held
    assert sys.getrefcount(held) > 1


def test_a_function_that_is_defined_again_is_the_same_loader(tmp_path):
    one = DataLoader(range(3))
    with session({"v": Values(x=0)}, tmp_path) as sess:
        found = [[number for number, _ in sess.steps(lambda: enumerate(one))] for _ in sess.epochs(3)]
        assert len(sess.process_state._places.feeds) == 1
    assert found == 3 * [[0, 1, 2]]


def test_batches_out_of_order_are_put_in_order(caplog):
    feed = feed_of(DataLoader(range(4), num_workers=2, in_order=False))
    batches = take(feed, 4)
    feed.close()

    assert batches == [[0], [1], [2], [3]]
    assert "in_order=False is left out" in caplog.text


class Growing(Dataset):
    """A curriculum: more in each epoch."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 4 + 2 * self.epoch

    def __getitem__(self, index):
        return index


def test_a_data_set_whose_length_depends_on_the_epoch_goes_on():
    before, after = (feed_of(DataLoader(Growing(), batch_size=2, shuffle=True)) for _ in range(2))
    for _ in range(2 + 3 + 1):
        last = before.next(None)
        before.consumed()
    assert (before.epoch, before.batches) == (2, 1)
    after.resume(before.position())

    assert [after.next(None).tolist() for _ in range(3)] == [before.next(None).tolist() for _ in range(3)]
    assert last.tolist()


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}], ids=str)
def test_a_generator_that_an_evaluation_draws_from_too_goes_on(workers):
    def run(*stops):
        batches, position = [], None
        for stop in (*stops, 3 * BATCHES):
            ours = torch.Generator().manual_seed(0)
            feed = feed_of(DataLoader(range(4 * BATCHES), 4, shuffle=True, generator=ours, **workers))
            if position is not None:
                feed.resume(position)
            while len(batches) < stop:
                batches += take(feed, 1, epochs=3)
                torch.rand(1, generator=ours)  # As the loader of an evaluation draws the seed of its workers.
            position = feed.position()
            feed.close()
            gc.collect()
        return batches

    # In the first epoch, at its last batch, and where workers have got the whole order.
    assert run(2, BATCHES, BATCHES + 3, 2 * BATCHES - 1, 2 * BATCHES + 1) == run()


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["no generator", "a generator"])
def test_persistent_workers_that_the_program_uses_itself_draw_as_new_ones(generator, tmp_path):
    loader = DataLoader(range(24), 4, shuffle=True, num_workers=1, persistent_workers=True, generator=generator)
    found = []
    with session({"values": Values(steps=0)}, tmp_path) as sess:
        for _ in sess.steps(loader, epochs=1):
            pass
        for _ in range(2):  # With new workers, and with those.
            for one in filter(None, (torch.default_generator, generator)):
                one.manual_seed(1)
            found.append((flat(loader), flat(loader), float(torch.rand(1))))
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_a_loader_of_nodes_whose_state_cannot_be_saved_is_refused_with_its_first_batch():
    class Counting(Sampler):
        def __iter__(self):
            return iter(range(4))

        def state_dict(self):
            return {"at": object()}

        def load_state_dict(self, state):
            pass

    feed = feed_of(nodes.Loader(nodes.SamplerWrapper(Counting())))
    with pytest.raises(TypeError, match="the loader's state_dict"):
        feed.next(1)


@pytest.mark.parametrize("together", [False, True], ids=["one after the other", "in one step"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_generator_of_two_loaders_is_put_back_once(workers, together, tmp_path):
    def run(logdir, *stops):
        for stop in (*stops, None):
            seen, ours = Values(batches=[]), torch.Generator().manual_seed(0)
            one, other = (DataLoader(range(24), n, shuffle=True, generator=ours, num_workers=workers) for n in (4, 6))
            sv = Supervisor({"seen": seen}, logdir, save_model_secs=0, saving=Saving(save_at_end=True))
            with sv.managed_session() as sess:
                for _ in sess.epochs(3):
                    for loader in [{"one": one, "other": other}] if together else [one, other]:
                        for batch in sess.steps(loader):
                            seen.batches.append(str(batch))
                            if len(seen.batches) == stop:
                                sv.request_stop()
            gc.collect()
        return seen.batches

    stops = (2, 4, 6, 9) if together else (4, 12, 15, 18)
    assert run(tmp_path / "stopped", *stops) == run(tmp_path / "whole")
