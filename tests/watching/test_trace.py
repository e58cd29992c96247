"""The trace's files: what is written is read again, and what is damaged, foreign or hostile is passed over."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from stepguard.watching import trace
from stepguard.watching.trace import Fork, Item, Moment, Record, Start, Step


def encoded(*items: Item) -> bytes:
    content = trace.MAGIC
    for number, item in enumerate(items):
        if isinstance(item, Start):
            content += trace.encoded_start(item)
        elif isinstance(item, Fork):
            content += trace.encoded_fork(item)
        else:
            kind = next(kind for kind, name in trace.VALUES.items() if name == item.kind)
            content += trace.encoded_shape(number, list(item.values))
            pack = trace.packing(kind, len(item.values))
            content += trace.with_checksum(
                pack(kind, not item.is_inside, number, item.epochs, item.step, *item.values.values())
            )
    return content


def written(logdir: Path, *items: Item, name: str = "chief.trace") -> Path:
    path = logdir / "traces" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(encoded(*items))
    return path


def loss(step: int, value: float, epochs: int = 0, **others: float) -> Record:
    return Record("numbers", step, epochs, {"loss": value, **others})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    items: list[Item] = [
        Start(0, processes=2, pid=7, time=5.5),
        loss(0, 0.1),
        Record("digests", 0, 0, {"batch[0]": 2**64 - 1, "random": 3}),
        Record("settings", 0, 0, {"optimizer.lr": 0.001}),
        loss(1, math.inf, epochs=1),
        Record("numbers", 2, 1, {"loss": 0.5}, is_inside=False),
        Fork(1, 0),
        Start(2**40, 7, is_resumed=True),
    ]
    written(tmp_path, *items)
    assert trace.read(tmp_path, "chief") == items


def test_both_files_are_one_trace(tmp_path: Path) -> None:
    written(tmp_path, Start(0), loss(0, 1.0), name="chief.before.trace")
    written(tmp_path, loss(1, 2.0))
    assert trace.read(tmp_path) == [Start(0), loss(0, 1.0), loss(1, 2.0)]


def test_the_roles_are_those_of_the_files(tmp_path: Path) -> None:
    assert trace.roles(tmp_path) == []
    written(tmp_path, name="worker-1.trace")
    written(tmp_path, name="chief.before.trace")
    written(tmp_path, name="notes.txt")
    assert trace.roles(tmp_path) == ["chief", "worker-1"]


@pytest.mark.parametrize("lost", [1, 4, 20, 35])
def test_a_torn_last_record_is_left_out(tmp_path: Path, lost: int) -> None:
    path = written(tmp_path, Start(0), loss(0, 1.0), loss(1, 2.0))
    path.write_bytes(path.read_bytes()[:-lost])
    assert trace.read(tmp_path) == [Start(0), loss(0, 1.0)]


def test_a_flipped_bit_ends_the_reading_and_no_value_is_wrong(tmp_path: Path) -> None:
    whole = encoded(Start(0), loss(0, 1.0), loss(1, 2.0))
    items = trace.parse(whole).items
    for at in range(len(whole)):
        content = bytearray(whole)
        content[at] ^= 4
        found = trace.parse(bytes(content)).items
        assert found == items[: len(found)]
        assert len(found) < len(items)


def test_the_end_of_what_is_good_is_where_the_next_record_belongs() -> None:
    content = encoded(Start(0), loss(0, 1.0))
    assert trace.parse(content).end == len(content)
    assert trace.parse(content + b"\x01\x00").end == len(content)
    assert trace.parse(trace.MAGIC).end == len(trace.MAGIC)
    assert trace.parse(b"something else").end == 0


def test_of_a_long_trace_only_the_steps_that_matter_are_read() -> None:
    rate = Record("settings", 1, 0, {"lr": 0.1})
    parsed = trace.parse(encoded(Start(0), loss(0, 1.0), rate, loss(5, 2.0), loss(6, 3.0), Fork(9, 0)), 5, 6)
    assert parsed.items == [Start(0), rate, loss(5, 2.0), Fork(9, 0)]
    assert parsed.earlier == 1


def test_nothing_but_a_regular_file_of_a_bounded_size_is_read(tmp_path: Path) -> None:
    told: list[tuple[Path, OSError]] = []

    def read() -> list[Item]:
        return trace.read(tmp_path, on_unreadable=lambda path, error: told.append((path, error)))

    assert read() == []
    path = written(tmp_path, Start(0))
    outside = path.rename(tmp_path / "outside")
    path.symlink_to(outside)
    assert read() == []
    path.unlink()
    os.mkfifo(path)
    assert read() == []
    path.unlink()
    path.write_bytes(trace.MAGIC + bytes(trace.MOST_BYTES * 2))
    assert read() == []
    assert [one for one, _ in told] == [path] * 3


def test_a_link_in_the_place_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    written(elsewhere, Start(0))
    logdir = tmp_path / "logdir"
    logdir.mkdir()
    (logdir / "traces").symlink_to(elsewhere / "traces")
    told: list[Path] = []
    assert trace.read(logdir, on_unreadable=lambda path, _: told.append(path)) == []
    assert trace.roles(logdir) == []
    assert told == [logdir / "traces"]


@pytest.mark.parametrize(
    "document",
    [b"[]", b"{}", b'["a", "a"]', b"[1]", b'["' + b"x" * 500 + b'"]', b"[" * 5000, b"\xff", b'["a"'],
)
def test_a_shape_that_is_none_ends_the_reading(document: bytes) -> None:
    head = trace._HEAD.pack(trace.SHAPE, 0, 0, len(document), 0)
    content = encoded(Start(0)) + trace.with_checksum(head + document) + encoded(loss(0, 1.0))[len(trace.MAGIC) :]
    assert trace.parse(content).items == [Start(0)]


# --- what the steps were ---


def numbers(values: Mapping[Moment, Step]) -> dict[tuple[int, int], dict[str, list[float]]]:
    return {moment[:2]: one.numbers for moment, one in values.items()}


def test_a_step_is_what_it_was_the_last_time() -> None:
    items = [Start(0), loss(0, 1.0), loss(1, 2.0), loss(2, 3.0), Start(1, is_resumed=True), loss(1, 5.0), loss(1, 6.0)]
    assert numbers(trace.steps(items)) == {
        (0, 0): {"loss": [1.0]},
        (1, 0): {"loss": [5.0, 6.0]},
        (2, 0): {"loss": [3.0]},
    }


def test_a_new_run_in_an_old_logdir_has_nothing_before_it() -> None:
    assert numbers(trace.steps([Start(0), loss(0, 1.0), Start(0), loss(1, 2.0)])) == {(1, 0): {"loss": [2.0]}}


def test_what_a_fork_gives_up_is_left_out() -> None:
    items = [Start(0), loss(0, 1.0), loss(1, 2.0), loss(1, 2.5, epochs=1), Fork(1, 0), loss(1, 4.0)]
    assert numbers(trace.steps(items)) == {(0, 0): {"loss": [1.0]}, (1, 0): {"loss": [4.0]}}


def test_the_steps_come_in_their_order() -> None:
    before = Record("numbers", 2, 1, {"accuracy": 0.5}, is_inside=False)
    found = trace.steps([loss(3, 1.0, epochs=1), loss(2, 1.0, epochs=1), before, loss(1, 1.0)])
    assert list(found) == [(1, 0, True), (2, 1, False), (2, 1, True), (3, 1, True)]


def test_what_was_recorded_before_a_step_is_kept_when_only_the_step_is_done_again() -> None:
    before = Record("numbers", 1, 0, {"accuracy": 0.5}, is_inside=False)
    found = trace.steps([Start(0), before, loss(1, 1.0), Start(1, is_resumed=True), loss(1, 2.0)])
    assert {moment: one.numbers for moment, one in found.items()} == {
        (1, 0, False): {"accuracy": [0.5]},
        (1, 0, True): {"loss": [2.0]},
    }


# --- what differs ---


def step_of(**values: list[float]) -> Step:
    return Step(numbers=values)


def test_values_are_compared_bit_for_bit() -> None:
    then, now = step_of(loss=[0.5, 0.25], same=[1.0]), step_of(loss=[0.5, 0.25000000000000006], same=[1.0])
    assert trace.differences(then, then) == []
    assert trace.differences(then, now) == [trace.Difference("numbers", "loss", 0.25, 0.25000000000000006)]


@pytest.mark.parametrize(
    ("then", "now", "is_same"),
    [
        (math.nan, -math.nan, True),
        (math.nan, 1.0, False),
        (0.0, -0.0, False),
        (0, 0, True),
        (math.inf, math.inf, True),
        (2**64 - 1, 2**64 - 2, False),
    ],
)
def test_what_counts_as_the_same(then: float, now: float, is_same: bool) -> None:
    assert trace.is_same(then, now) is is_same


def test_only_what_both_have_is_compared() -> None:
    assert trace.differences(step_of(loss=[1.0], gone=[2.0]), step_of(loss=[1.0], new=[3.0])) == []
    assert trace.differences(step_of(loss=[1.0, 9.0]), step_of(loss=[1.0])) == []
    assert trace.differences(step_of(loss=[9.0, 1.0]), step_of(loss=[1.0])) != []
