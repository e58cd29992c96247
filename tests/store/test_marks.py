"""Marks in manifests: what is read of them, and what follows from those of all checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from stores import directory_content, good_of, open_store, put

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError
from stepguard.store import CheckpointStore, Manifest
from stepguard.store.marks import BestRule, Marked, Marks, check_name, standing

RULE = BestRule("loss", "min", 2)


def commit(store: CheckpointStore, step: int, marks: Marks | None = None) -> None:
    name = store.name(step)
    put(store.stage(name), directory_content(name, ""))
    store.commit(name, step, marks=marks)
    store.prune()


def steps(store: CheckpointStore) -> list[int | None]:
    return [one.step for one in store.candidates()]


def loss(value: float) -> Marks:
    return Marks({"loss": value}, best=RULE)


def test_marks_come_back_from_a_manifest_also_numbers_that_json_lacks(tmp_path):
    store = open_store(tmp_path, "directory")
    marks = Marks({"a": 0.5, "b": math.inf, "c": -math.inf}, ("first", "v1.0"), True, RULE)
    commit(store, 1, marks)

    assert good_of(store).manifest.marks == marks
    assert math.isnan(Marks.from_json(Marks({"a": math.nan}).to_json()).metrics["a"])


def test_a_manifest_without_marks_has_none_of_their_fields(tmp_path):
    store = open_store(tmp_path, "directory")
    commit(store, 1)

    assert (
        not {"metrics", "names", "kept", "best"}
        & json.loads((tmp_path / "model.ckpt-1.manifest.json").read_text()).keys()
    )


@pytest.mark.parametrize(
    "found",
    [
        {"metrics": [1], "names": "x", "kept": "yes", "best": "loss"},
        {"metrics": {"a": "low", "b": True}, "names": [1, "../x", ""], "kept": 1, "best": ["loss", "least", 1]},
        {"metrics": {"a": 10**400}},
        {"best": ["loss", "min", 0]},
        {"best": ["loss", "min", 1, 2]},
    ],
)
def test_marks_of_another_kind_are_passed_over_because_no_restore_needs_them(found):
    assert Marks.from_json(found) == Marks()


@pytest.mark.parametrize("name", ["", "12", "best", "a/b", "-x", ".hidden", "a b", "x" * 101, "a\n"])
def test_a_name_that_could_be_taken_for_something_else_is_refused(name):
    with pytest.raises(ValueError, match="name must be a word"):
        check_name(name)


def test_a_name_belongs_to_the_one_that_was_committed_last():
    old, new = Marked("c-9", 9, 1.0, Marks(names=("a", "b"))), Marked("c-3", 3, 2.0, Marks(names=("a",)))
    found = standing([new, old])

    assert found.holders == {"a": "c-3", "b": "c-9"}
    assert (found.names_of("c-9"), found.pinned) == (["b"], {"c-3", "c-9"})


def test_the_best_are_ranked_by_the_newest_rule_and_of_equal_ones_the_older_stays():
    found = [Marked(f"c-{n}", n, n, loss(value)) for n, value in enumerate([3.0, 1.0, math.nan, 1.0, 2.0])]

    assert standing(found).best == ("c-1", "c-3")
    assert standing(found, BestRule("loss", "max", 1)).best == ("c-0",)
    assert standing(found, BestRule("accuracy", "max", 1)).pinned == set()


class TestRetention:
    def test_neither_counts_the_best_nor_removes_them(self, tmp_path):
        store = open_store(tmp_path, "directory", max_to_keep=2, keep_best=RULE)
        store.acquire().release()
        for step, value in enumerate([5.0, 1.0, 2.0, 7.0, 8.0, 9.0]):
            commit(store, step, loss(value))

        assert steps(store) == [5, 4, 2, 1]

    def test_counts_one_again_that_is_best_no_more(self, tmp_path):
        store = open_store(tmp_path, "directory", max_to_keep=1, keep_best=RULE)
        for step, value in enumerate([5.0, 4.0, 3.0, 2.0]):
            commit(store, step, loss(value))

        assert steps(store) == [3, 2, 1]

    def test_of_the_next_run_knows_what_a_kill_has_left(self, tmp_path):
        """Killed after the commit of a better one, and before the removal of the one that it displaces."""
        store = open_store(tmp_path, "directory", max_to_keep=1, keep_best=RULE)
        for step, value in enumerate([5.0, 4.0, 9.0]):
            commit(store, step, loss(value))
        name = store.name(3)
        put(store.stage(name), directory_content(name, ""))
        store.commit(name, 3, marks=loss(1.0))
        assert steps(store) == [3, 2, 1, 0]

        again = open_store(tmp_path, "directory", max_to_keep=1, keep_best=RULE)
        with again.acquire():
            again.adopt_earlier()
            commit(again, 4)

        assert steps(again) == [4, 3, 1]

    def test_without_the_option_leaves_the_best_of_the_run_before(self, tmp_path):
        store = open_store(tmp_path, "directory", max_to_keep=1, keep_best=RULE)
        for step, value in enumerate([5.0, 4.0]):
            commit(store, step, loss(value))
        again = open_store(tmp_path, "directory", max_to_keep=1)
        with again.acquire():
            again.adopt_earlier()
            for step in (2, 3):
                commit(again, step)

        assert steps(again) == [3, 1, 0]

    def test_does_not_count_what_somebody_has_removed(self, tmp_path):
        store = open_store(tmp_path, "directory", max_to_keep=1, keep_best=RULE)
        for step, value in enumerate([1.0, 2.0]):
            commit(store, step, loss(value))
        files.remove(tmp_path / "model.ckpt-0.manifest.json")
        commit(store, 2, loss(3.0))
        commit(store, 3)

        assert steps(store) == [3, 2, 1]


class TestMark:
    def test_replaces_the_marks_and_nothing_else(self, tmp_path):
        store = open_store(tmp_path, "directory", max_to_keep=1)
        commit(store, 1)
        before = good_of(store).manifest
        assert store.mark("model.ckpt-1", Marks(is_kept=True))
        assert not store.mark("model.ckpt-1", Marks(is_kept=True))
        commit(store, 2)
        commit(store, 3)

        assert steps(store) == [3, 1]
        found = store.verify(store.candidates()[-1]).manifest
        assert (found.marks, found.files, found.time) == (Marks(is_kept=True), before.files, before.time)

    def test_takes_one_back_from_those_that_were_to_be_removed(self, tmp_path):
        store = open_store(tmp_path, "directory", max_to_keep=1)
        commit(store, 1)
        name = store.name(2)
        put(store.stage(name), directory_content(name, ""))
        store.commit(name, 2)
        store.mark("model.ckpt-1", Marks(names=("one",)))
        store.prune()

        assert steps(store) == [2, 1]

    def test_of_one_that_is_replaced_are_handed_on_but_for_the_metrics(self, tmp_path):
        store = open_store(tmp_path, "directory")
        commit(store, 1, Marks({"loss": 1.0}, ("one",), True))
        commit(store, 1, Marks({"accuracy": 2.0}, ("two",)))

        assert good_of(store).manifest.marks == Marks({"accuracy": 2.0}, ("one", "two"), True)

    def test_of_none_is_an_error_and_makes_none(self, tmp_path):
        store = open_store(tmp_path, "directory")
        with pytest.raises(FileNotFoundError):
            store.mark("model.ckpt-1", Marks(is_kept=True))

        assert list(tmp_path.iterdir()) == []


def test_a_manifest_with_marks_is_read_by_its_digest(tmp_path: Path):
    store = open_store(tmp_path, "directory")
    commit(store, 1, Marks({"loss": 1.0}))
    path = tmp_path / "model.ckpt-1.manifest.json"
    spoilt = path.read_bytes().replace(b'"loss": 1.0', b'"loss": 0.1')
    with pytest.raises(CheckpointCorruptError, match="expected the digest"):
        Manifest.from_json(spoilt, path)
