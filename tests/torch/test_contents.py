"""What samplers and data sets keep in lists and arrays is saved, and compared with what a restarted program makes."""

from __future__ import annotations

import copy
import logging
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Sampler, Subset, TensorDataset, random_split

from stepguard.torch.data.contents import Contents
from stepguard.torch.data.feeds import feed_of


def kept():
    return SimpleNamespace(
        order=np.arange(6),
        weights=torch.ones(6, dtype=torch.float64),
        buckets={"short": [1, 2], "long": [3, 4]},
        pairs=[(1, "a"), (2, "b")],
        recent=deque([1], maxlen=3),
        paths=np.array(["a.png", "b.png", "c.png"]),
        untouched=list(range(4)),
    )


def test_what_has_changed_comes_back_into_the_same_objects():
    one, other = kept(), kept()
    contents, restored = Contents([one]), Contents([other])
    held = other.buckets["long"], other.order, other.weights
    one.order[:] = one.order[::-1]
    one.weights[2] = 5
    one.buckets["long"].append(9)
    one.pairs.reverse()
    one.recent.append(7)
    one.paths[:] = one.paths[::-1].copy()
    saved = contents.state()
    restored.put(saved)

    assert "0.SimpleNamespace.untouched" not in saved
    assert other.order.tolist() == [5, 4, 3, 2, 1, 0]
    assert other.weights.tolist() == [1, 1, 5, 1, 1, 1]
    assert other.buckets == {"short": [1, 2], "long": [3, 4, 9]}
    assert other.pairs == [(2, "b"), (1, "a")]
    assert other.recent == deque([1, 7])
    assert other.paths.tolist() == ["c.png", "b.png", "a.png"]
    assert other.recent.maxlen == 3
    assert held[0] is other.buckets["long"]
    assert held[1] is other.order
    assert held[2] is other.weights


@pytest.mark.parametrize(
    "values",
    [
        [(f"{number}.png", number % 3) for number in range(2000)],
        [*range(2000)],
        [1.5, None, "\udcff", float("inf"), True] * 300,
        [b"1", b"2"] * 600,
        [[number] for number in range(1500)],
        [(1, b"2"), (3, "4")] * 600,
    ],
    ids=lambda values: repr(values[0]),
)
def test_a_long_list_comes_back(values, tmp_path):
    one, other = (SimpleNamespace(values=copy.deepcopy(values)) for _ in range(2))
    contents = Contents([one])
    one.values.reverse()
    torch.save(contents.state(), tmp_path / "saved.pt")
    Contents([other]).put(torch.load(tmp_path / "saved.pt", weights_only=True))

    assert other.values == one.values
    assert [*map(type, other.values)] == [*map(type, one.values)]


def test_an_earlier_moment_comes_back_whole():
    one = kept()
    contents = Contents([one])
    contents.put({"0.SimpleNamespace.order": {"array": torch.arange(6).flip(0)}})
    contents.go_back({})

    assert one.order.tolist() == list(range(6))


def test_what_is_too_large_is_named_at_the_restart(caplog, monkeypatch):
    monkeypatch.setattr("stepguard.torch.data.contents._MOST_BYTES", 40)
    one = kept()
    contents = Contents([one])
    one.weights[0] = 2
    contents.put(contents.state())

    assert (
        "has changed SimpleNamespace.weights when the checkpoint was made, which are too large for a file"
        in caplog.text
    )


def split_anew():
    return random_split(TensorDataset(torch.arange(40.0)), [30, 10])[0]


def drawn_anew():
    return TensorDataset(torch.randn(30))


def of_a_set():
    return Subset(TensorDataset(torch.arange(40.0)), torch.randperm(40)[:30].tolist())


@pytest.mark.parametrize(
    ("make", "named"),
    [(split_anew, "Subset.indices"), (drawn_anew, "TensorDataset.tensors"), (of_a_set, "Subset.indices")],
)
def test_data_that_is_drawn_anew_at_the_restart_is_named(make, named, caplog):
    before, after = (feed_of(DataLoader(make(), batch_size=5)) for _ in range(2))
    before.next(None)
    before.consumed()
    after.resume(before.position())

    assert f"the program has made {named} otherwise than in the run that is resumed" in caplog.text


def items_drawn_anew():
    items = TensorDataset(torch.arange(100.0))
    items.samples = [(torch.randn(2), number) for number in range(100)]
    return items


def test_items_that_are_drawn_anew_are_named(caplog):
    before, after = (feed_of(DataLoader(items_drawn_anew(), batch_size=5)) for _ in range(2))
    after.resume(before.position())

    assert "the program has made TensorDataset.samples otherwise" in caplog.text


def test_a_list_of_other_objects_that_was_shuffled_is_named(caplog):
    one = SimpleNamespace(samples=[(torch.ones(2), number) for number in range(5)], cache=[object() for _ in range(3)])
    contents = Contents([one])
    one.cache[1] = object()
    assert contents.state() == {}
    one.samples.reverse()
    contents.put(contents.state())

    assert "has changed SimpleNamespace.samples when the checkpoint was made" in caplog.text


def test_batches_of_numbers_that_the_program_shuffles_come_back():
    def feed():
        batches = [[0, 1], [2, 3], [4, 5], [6, 7]]
        return batches, feed_of(DataLoader(TensorDataset(torch.arange(8.0)), batch_sampler=batches))

    batches, before = feed()
    for _ in batches:
        before.next(1)
    before.consumed()
    before.end_epoch()
    batches.reverse()
    restored, after = feed()
    after.resume(before.position())

    assert restored == batches
    assert after.next(2)[0].tolist() == [6, 7]


def test_a_list_of_batches_comes_back_or_is_named(caplog):
    for batches in ([1, 2, 3], [torch.ones(1), torch.zeros(1)]):
        before, again = feed_of(batches), feed_of(list(batches))
        before.next(1)
        before.consumed()
        before.end_epoch()
        batches.reverse()
        again.resume(before.position())
        assert again.loader == batches or "has changed Lists.batches" in caplog.text


def test_data_that_lies_in_another_folder_is_the_same(caplog):
    class Files(TensorDataset):
        def __init__(self, folder):
            super().__init__(torch.arange(10))
            self.paths = [f"{folder}/{number}.png" for number in range(10)]

    before, after = (feed_of(DataLoader(Files(folder), batch_size=5)) for folder in ("/scratch/1", "/scratch/2"))
    with caplog.at_level(logging.WARNING):
        after.resume(before.position())

    assert not caplog.text


def test_no_data_is_odd_enough_to_end_a_run():
    with torch.inference_mode():
        features = torch.ones(3)
    one = SimpleNamespace(
        features=features,
        expanded=torch.zeros(1).expand(4),
        meta=torch.ones(2, device="meta"),
        small=torch.zeros(2).to(torch.float8_e4m3fn),
        conjugate=torch.zeros(2, dtype=torch.complex64).conj(),
        foreign=np.arange(3, dtype=">f4"),
        wide=np.zeros(2, dtype=np.longdouble),
        empty=np.zeros((0, 3)),
        cache=[None] * 4,
        images=[np.zeros(2), None],
        labels=[-1, -1],
        counted={"a": 1, "b": [2, 3]},
        scalars=[np.float64(1), 2.0],
    )
    contents = Contents([one])
    one.expanded = torch.ones(1).expand(4)
    one.cache[2] = object()
    one.images[1] = np.ones(2)
    one.labels[1] = -2
    one.counted["b"].append(4)
    saved = contents.state()

    contents.put(saved)
    contents.marks()
    assert saved["0.SimpleNamespace.labels"] == {"list": [-1, -2]}
    assert saved["0.SimpleNamespace.counted"] == {"dict": [("a", 1), ("b", [2, 3, 4])]}
    assert not {"0.SimpleNamespace.cache", "0.SimpleNamespace.images"} & {*saved}


def test_contents_of_another_object_are_not_put_anywhere(caplog):
    one, other = kept(), SimpleNamespace(**vars(kept()))
    contents = Contents([one])
    one.pairs.reverse()
    saved = {key.replace("SimpleNamespace", "Crop"): value for key, value in contents.state().items()}
    Contents([other]).put(saved)

    assert other.pairs == [(1, "a"), (2, "b")]
    assert "the checkpoint has contents of Crop.pairs" in caplog.text


class MadeInEachEpoch(Sampler):
    def __len__(self):
        return 6

    def __iter__(self):
        self.order = torch.randperm(6).tolist()
        return iter(self.order)


def test_an_order_that_the_sampler_makes_in_each_epoch_is_none_to_warn_of(caplog):
    feed, again = (feed_of(DataLoader(range(6), batch_size=2, sampler=MadeInEachEpoch())) for _ in range(2))
    order = feed.next(1).tolist()
    feed.consumed()
    order += feed.next(1).tolist()
    again.resume(feed.position())

    assert [again.loader.sampler.order[:4], again.next(1).tolist()] == [order, order[2:]]
    assert not caplog.text


def test_what_was_not_there_at_an_earlier_moment_is_gone():
    one = SimpleNamespace(named=None, name="a")
    contents = Contents([one])
    contents.put({f"0.SimpleNamespace.{name}": {"list": [1]} for name in ("named", "made", "name")})
    assert vars(one) == {"named": [1], "made": [1], "name": [1]}
    contents.go_back({})
    assert vars(one) == {"named": None, "name": "a"}
