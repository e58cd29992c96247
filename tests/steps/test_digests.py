"""Digests of batches, random states and states: each bit counts, and they are the same in every process."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import enum
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from stepguard.steps.digests import SAMPLED, array_bytes, digest, is_on_host, numbers_at_hand, part_digests


@dataclasses.dataclass
class Sample:
    image: Any
    label: int


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


class Slots:
    __slots__ = ("__hidden", "a")

    def __init__(self, a: Any, hidden: Any) -> None:
        self.a, self.__hidden = a, hidden


class MoreSlots(Slots):
    __slots__ = ("b", "never_set")

    def __init__(self, a: Any, hidden: Any, b: Any) -> None:
        super().__init__(a, hidden)
        self.b = b


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Pair(NamedTuple):
    x: Any
    y: Any


def of(value: Any) -> int:
    return digest(value, array_bytes)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.zeros(3), np.array([0.0, 0.0, -0.0])),
        (np.zeros(4), np.zeros((2, 2))),
        (np.zeros(4, np.float32), np.zeros(4, np.int32)),
        (np.arange(6).reshape(2, 3).T, np.arange(6).reshape(3, 2)),
        (np.array(["a", "b"]), np.array(["a", "c"])),
        (np.array([{"a": 1}], object), np.array([{"a": 2}], object)),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}),
        ({"a": 1}, {"b": 1}),
        ([1, [2]], [1, [3]]),
        ([[1], [2]], [[1, 2]]),
        (list(range(20)), list(range(1, 21))),
        (1, 1.0),
        (1, True),
        ("1", b"1"),
        ("ä", "a"),
        (Sample(np.zeros(2), 1), Sample(np.zeros(2), 2)),
        (Plain([1]), Plain([2])),
        (Pair(1, 2), Pair(2, 1)),
        ({1, 2}, {1, 3}),
        (frozenset("ab"), frozenset("ac")),
        (Slots(1, 2), Slots(1, 3)),
        (Slots([1], None), Slots([2], None)),
        (MoreSlots(1, 2, 3), MoreSlots(1, 2, 4)),
        (np.array([Plain(1)], object), np.array([Plain(2)], object)),
        (np.array([Slots(1, 2)] * 2, object), np.array([Slots(1, 2), Slots(2, 2)], object)),
        (collections.deque([1]), collections.deque([2])),
        (dt.date(2026, 1, 1), dt.date(2026, 1, 2)),
        (Path("a"), Path("b")),
        (Color.RED, Color.BLUE),
        ({(1, 2): 0}, {(1, 3): 0}),
        ({"a" * 100 + "b": 0}, {"a" * 100 + "c": 0}),
        (["a", "b"], ["ab"]),
        (None, 0),
    ],
)
def test_what_differs_has_another_digest(one: Any, other: Any) -> None:
    assert of(one) == of(one)
    assert of(one) != of(other)


def test_a_digest_says_nothing_of_addresses() -> None:
    assert of([object(), Plain(1)]) == of([object(), Plain(1)])
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    assert of(cyclic) == of(cyclic)


def test_a_digest_is_the_same_in_another_process() -> None:
    program = """
        import numpy as np, random
        from stepguard.steps.digests import array_bytes, digest
        random.seed(3)
        print(digest({"x": np.arange(5.0), "state": random.getstate(), "text": "ä", "set": None}, array_bytes))
    """
    told = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=True, text=True)
    random.seed(3)
    assert int(told.stdout) == of({"x": np.arange(5.0), "state": random.getstate(), "text": "ä", "set": None})


def test_the_parts_of_a_batch_are_named_as_the_program_names_them() -> None:
    arrays = np.zeros(2), np.ones(2)
    assert list(part_digests("batch", arrays, array_bytes)) == ["batch[0]", "batch[1]"]
    assert list(part_digests("batch", {"x": 1, 7: 2}, array_bytes)) == ["batch['x']", "batch[7]"]
    assert list(part_digests("batch", Pair(1, 2), array_bytes)) == ["batch[x]", "batch[y]"]
    assert list(part_digests("batch", arrays[0], array_bytes)) == ["batch"]
    assert list(part_digests("batch", [arrays[0]], array_bytes)) == ["batch"]
    many = part_digests("batch", list(range(100)), array_bytes)
    assert (len(many), list(many)[-1]) == (16, "batch[...]")
    assert many != part_digests("batch", [*range(99), -1], array_bytes)


class OnDevice:
    """An array on a device, which counts the values that are read."""

    device = "gpu:0"

    def __init__(self, array: Any) -> None:
        self.array, self.dtype, self.shape = array, array.dtype, array.shape

    def reshape(self, *shape: int) -> OnDevice:
        return OnDevice(self.array.reshape(*shape))

    def __getitem__(self, index: Any) -> OnDevice:
        return OnDevice(self.array[index])

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.array


def test_of_an_array_on_a_device_evenly_spaced_values_are_read() -> None:
    array = np.arange(100 * SAMPLED, dtype=np.int64)
    content = array_bytes(OnDevice(array))
    assert len(content) == 8 * SAMPLED
    assert np.frombuffer(content, np.int64)[1] == 100
    assert of(OnDevice(array)) != of(OnDevice(array + 1))


def test_texts_in_an_array_of_a_framework_count() -> None:
    class Texts:
        dtype, shape = "string", (2,)

        def __init__(self, *texts: str) -> None:
            self.texts = texts

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return np.array(self.texts, object)

    assert of(Texts("a", "b")) == of(Texts("a", "b"))
    assert of(Texts("a", "b")) != of(Texts("a", "c"))


def test_numbers_on_a_device_are_not_waited_for() -> None:
    values = {"a": 1, "b": np.float32(0.5), "c": OnDevice(np.zeros(1)), "d": "no number", "e": np.zeros(3)}
    assert numbers_at_hand(values) == {"a": 1.0, "b": 0.5}
    assert is_on_host(np.zeros(2))
    assert not is_on_host(OnDevice(np.zeros(2)))


def test_the_depth_of_what_is_walked_is_bounded() -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    assert of(deep) == of([deep])


class Node:
    """Knows its neighbours."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.near: list[Node] = []


def graph(values: Any) -> list[Node]:
    nodes = [Node(one) for one in values]
    for one in nodes:
        one.near = [other for other in nodes if other is not one]
    return nodes


def test_objects_that_all_know_each_other_cost_no_more_than_their_number() -> None:
    began = time.process_time()
    assert of(graph(range(60))) == of(graph(range(60)))
    assert time.process_time() - began < 2
    assert of(graph(range(60))) != of(graph([*range(59), -1]))


def test_whether_equal_parts_are_one_object_makes_no_difference() -> None:
    part = [1, {"a": 2.0}]
    assert of([part, part]) == of([[1, {"a": 2.0}], [1, {"a": 2.0}]])
    assert of([part, part]) != of([part, [1, {"a": 3.0}]])


def test_arrays_of_objects_and_sets_are_the_same_in_another_process() -> None:
    program = """
        import numpy as np
        from stepguard.steps.digests import array_bytes, digest
        class Label:
            __slots__ = ("name", "__weight")
            def __init__(self, name):
                self.name, self.__weight = name, {"c", "a", "b"}
        digested = digest([np.array([Label("x"), Label("y")], object), {"c", "b", "a"}, Label, len], array_bytes)
        print(digested)
    """
    told = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(told) == 1
