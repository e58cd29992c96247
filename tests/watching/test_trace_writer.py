"""The writer of a trace: bounded, whole after a kill, and never the reason why a run fails."""

from __future__ import annotations

import errno
import os
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from stepguard.disk import appended_file, files
from stepguard.watching import trace
from stepguard.watching.trace import NUMBERS, Fork, Item, Mark, Record, Start
from stepguard.watching.trace_writer import TraceWriter


class Disk:
    """Stands in for ``os`` in ``appended_file``: writes fail with ``error``, or take only a part of what is written."""

    def __init__(self) -> None:
        self.error: int | None = None
        self.takes: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, content: bytes) -> int:
        if self.takes is not None:
            return os.write(descriptor, content[: self.takes])
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return os.write(descriptor, content)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(appended_file, "os", disk)
    return disk


def opened(logdir: Path, start: Start | None = None, **options: Any) -> TraceWriter:
    writer = TraceWriter(logdir, "chief", **options)
    writer.open(Start(0) if start is None else start)
    return writer


def loss(step: int, value: float = 0.5) -> Record:
    return Record("numbers", step, 0, {"loss": value})


def test_everything_is_in_the_file_at_once(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    for step in range(3):
        writer.add(NUMBERS, step, 0, {"loss": 0.5})
    writer.add(NUMBERS, 3, 1, {"accuracy": 0.25}, 1)
    writer.note(Fork(2, 1))
    writer.note(Mark(7, 14))
    between = Record("numbers", 3, 1, {"accuracy": 0.25}, is_inside=False)
    assert trace.read(tmp_path) == [Start(0), loss(0), loss(1), loss(2), between, Fork(2, 1), Mark(7, 14)]


def test_the_next_start_gets_what_was_written_before(tmp_path: Path) -> None:
    opened(tmp_path).add(NUMBERS, 0, 0, {"loss": 0.5})
    again = TraceWriter(tmp_path, "chief")
    assert again.open(Start(0, is_resumed=True)).items == [Start(0), loss(0)]
    again.close()
    assert TraceWriter(tmp_path, "chief").open(Start(0)).items == []
    again = TraceWriter(tmp_path, "chief")
    again.open(Start(1, is_resumed=True))
    again.add(NUMBERS, 1, 0, {"loss": 0.5})
    resumed = Start(0, is_resumed=True)
    assert trace.read(tmp_path) == [Start(0), loss(0), resumed, Start(0), Start(1, is_resumed=True), loss(1)]


def test_a_start_learns_what_the_trace_has_lost(tmp_path: Path) -> None:
    writer = opened(tmp_path, most_bytes=2000)
    for step in range(1000):
        writer.add(NUMBERS, step, 0, {"loss": 0.5})
    first = next(one.step for one in trace.read(tmp_path) if isinstance(one, Record))
    assert not TraceWriter(tmp_path, "chief").open(Start(first - 1, is_resumed=True)).is_whole
    assert TraceWriter(tmp_path, "chief").open(Start(first + 1, is_resumed=True)).is_whole


def test_the_checkpoint_says_from_where_on_it_matters(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    for step in range(4):
        writer.add(NUMBERS, step, 0, {"loss": 0.5})
    writer.note(Mark(2, 1))
    past = TraceWriter(tmp_path, "chief").open(Start(1, is_resumed=True))
    assert [one.step for one in past.items if isinstance(one, Record)] == [2, 3]


@pytest.mark.parametrize("rest", [b"\x01", b"\x01" + bytes(30), b"garbage" * 20])
def test_a_record_that_was_cut_short_is_removed_by_the_next_start(tmp_path: Path, rest: bytes) -> None:
    opened(tmp_path).add(NUMBERS, 0, 0, {"loss": 0.5})
    with trace.path_of(tmp_path, "chief").open("ab") as file:
        file.write(rest)
    opened(tmp_path, Start(1, is_resumed=True)).add(NUMBERS, 1, 0, {"loss": 0.5})
    assert trace.read(tmp_path) == [Start(0), loss(0), Start(1, is_resumed=True), loss(1)]


def test_a_file_of_somebody_else_under_its_name_is_begun_anew(tmp_path: Path) -> None:
    path = trace.path_of(tmp_path, "chief")
    path.parent.mkdir()
    path.write_bytes(b"something else")
    opened(tmp_path).add(NUMBERS, 0, 0, {"loss": 0.5})
    assert trace.read(tmp_path) == [Start(0), loss(0)]


def test_it_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    writer = opened(tmp_path, most_bytes=2000)
    for step in range(1000):
        writer.add(NUMBERS, step, 0, {"loss": 0.5})
    names = sorted(one.name for one in (tmp_path / "traces").iterdir())
    assert names == ["chief.before.trace", "chief.trace"]
    assert all(one.stat().st_size < 2100 for one in (tmp_path / "traces").iterdir())
    found = trace.read(tmp_path)
    assert 72 < len(found) < 145
    assert found == [loss(step) for step in range(1000 - len(found), 1000)]


def test_large_summaries_and_long_names_become_several_records(tmp_path: Path) -> None:
    values = {f"{number}/{'x' * 300}": float(number) for number in range(300)}
    writer = opened(tmp_path)
    writer.add(NUMBERS, 0, 0, values)
    writer.add(NUMBERS, 0, 0, {})
    records = [one for one in trace.read(tmp_path) if isinstance(one, Record)]
    assert [len(one.values) for one in records] == [128, 128, 44]
    assert [value for one in records for value in one.values.values()] == list(values.values())


def test_a_program_that_makes_up_names_does_not_fill_the_memory(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    for number in range(5000):
        writer.add(NUMBERS, number, 0, {f"loss {number}": 0.5})
    assert len([one for one in trace.read(tmp_path) if isinstance(one, Record)]) == 4096


def test_records_of_several_threads_are_whole(tmp_path: Path) -> None:
    writer = opened(tmp_path, most_bytes=20_000)

    def train(number: int) -> None:
        for step in range(300):
            writer.add(NUMBERS, step, number, {f"loss {number}": float(step), "sum": 1.0})

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    writer.add(NUMBERS, 999, 0, {"last": 1.0})
    content = trace.path_of(tmp_path, "chief").read_bytes()
    assert trace.parse(content).end == len(content)
    assert trace.read(tmp_path)[-1] == Record("numbers", 999, 0, {"last": 1.0})
    of_each: dict[int, list[int]] = {}
    for one in trace.read(tmp_path)[:-1]:
        assert isinstance(one, Record)
        assert set(one.values) == {f"loss {one.epochs}", "sum"}
        of_each.setdefault(one.epochs, []).append(one.step)
    assert all(steps == sorted(steps) for steps in of_each.values())


# --- a disk that fails ---


def test_what_a_full_disk_refuses_is_written_when_there_is_room(tmp_path: Path, disk: Disk, caplog: Any) -> None:
    writer = opened(tmp_path)
    writer.add(NUMBERS, 0, 0, {"loss": 0.5})
    disk.error = errno.ENOSPC
    for step in range(1, 4):
        writer.add(NUMBERS, step, 0, {"loss": 0.5})
    writer.add(NUMBERS, 4, 0, {"new": 0.5})
    writer.retry()
    assert trace.read(tmp_path) == [Start(0), loss(0)]
    assert [one.levelname for one in caplog.records] == ["WARNING"]
    disk.error = None
    writer.retry()
    writer.add(NUMBERS, 5, 0, {"loss": 0.5})
    new = Record("numbers", 4, 0, {"new": 0.5})
    assert trace.read(tmp_path) == [Start(0), *map(loss, range(4)), new, loss(5)]


def test_a_record_that_was_taken_in_part_is_no_damage(tmp_path: Path, disk: Disk) -> None:
    writer = opened(tmp_path)
    disk.takes = 7
    writer.add(NUMBERS, 0, 0, {"loss": 0.5})
    disk.takes = None
    writer.retry()
    writer.add(NUMBERS, 1, 0, {"loss": 0.5})
    assert trace.read(tmp_path) == [Start(0), loss(0), loss(1)]


def test_a_disk_that_is_full_at_the_start_costs_a_warning(tmp_path: Path, disk: Disk, caplog: Any) -> None:
    disk.error = errno.ENOSPC
    writer = opened(tmp_path)
    for step in range(5000):
        writer.add(NUMBERS, step, 0, {"loss": 0.5})
    assert [one.levelname for one in caplog.records] == ["WARNING"]
    disk.error = None
    writer.retry()
    found = trace.read(tmp_path)
    assert 4000 < len(found) < 4097
    assert found[-1] == loss(4999)


def test_a_full_disk_when_the_next_file_begins_costs_no_step(tmp_path: Path, disk: Disk) -> None:
    writer = opened(tmp_path, most_bytes=1000)
    for step in range(15):
        writer.add(NUMBERS, step, 0, {"loss": 0.5})
    disk.error = errno.ENOSPC
    for step in range(15, 40):
        writer.add(NUMBERS, step, 0, {"loss": 0.5})
    disk.error = None
    writer.retry()
    assert trace.read(tmp_path)[-30:] == [loss(step) for step in range(10, 40)]


@pytest.mark.parametrize("where", ["a file for the directory", "a link for the directory", "a link for the file"])
def test_a_place_that_is_none_is_left_alone(tmp_path: Path, where: str, caplog: Any) -> None:
    logdir, outside = tmp_path / "logdir", tmp_path / "outside"
    logdir.mkdir()
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    place = logdir / "traces"
    if where == "a file for the directory":
        place.write_bytes(b"precious")
    elif where == "a link for the directory":
        place.symlink_to(outside)
    else:
        place.mkdir()
        (place / "chief.trace").symlink_to(outside / "file")
    writer = TraceWriter(logdir, "chief")
    assert writer.open(Start(0)).items == []
    writer.add(NUMBERS, 0, 0, {"loss": 0.5})
    writer.retry()
    assert "the trace could not be written" in caplog.text
    assert [one.name for one in outside.iterdir()] == ["file"]
    assert (outside / "file").read_bytes() == b"precious"
    if where == "a file for the directory":
        assert place.read_bytes() == b"precious"


def test_a_logdir_that_is_gone_is_not_made_again(tmp_path: Path, caplog: Any) -> None:
    writer = opened(tmp_path / "gone")
    writer.add(NUMBERS, 0, 0, {"loss": 0.5})
    assert not (tmp_path / "gone").exists()
    assert "the trace could not be written" in caplog.text


def test_after_its_end_nothing_is_written_and_the_file_is_closed(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    writer.close()
    writer.add(NUMBERS, 0, 0, {"loss": 0.5})
    writer.note(Fork(0, 0))
    writer.retry()
    assert trace.read(tmp_path) == [Start(0)]
    links = {os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd") if _is_open(one)}
    assert not any(one.startswith(str(tmp_path)) for one in links)


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


def test_a_number_that_is_none_raises_where_it_is_given(tmp_path: Path) -> None:
    with pytest.raises(struct.error):
        opened(tmp_path).add(NUMBERS, 0, 0, {"loss": "high"})  # type: ignore[dict-item]
    items: list[Item] = trace.read(tmp_path)
    assert items == [Start(0)]


MINE = Start(0, pid=7, time=100.0)


@pytest.mark.parametrize(
    ("items", "newest"),
    [
        ([MINE, loss(3), loss(4)], 4),
        ([MINE, loss(4), Start(2, is_resumed=True, pid=8, time=200.0)], None),  # another process
        ([Start(0, pid=7, time=99.0), loss(4)], None),  # an earlier process with its pid
        ([MINE], None),
        ([MINE, loss(8), Fork(5, 0)], 5),  # put back, and no step since
        ([MINE, loss(8), Mark(9, 4), loss(9)], None),  # two runs of the graph for each step
        ([MINE, loss(8), Mark(9, 9), loss(9)], 9),
        ([Start(0, pid=1), Mark(9, 4), MINE, loss(2)], 2),  # another run was here
    ],
)
def test_how_far_a_process_came_is_its_newest_step(tmp_path: Path, items: list[Item], newest: int | None) -> None:
    first, *others = items
    assert isinstance(first, Start)
    writer = opened(tmp_path, first)
    for item in others:
        if isinstance(item, Start):
            writer.close()
            writer = opened(tmp_path, item)
        elif isinstance(item, Record):
            writer.add(NUMBERS, item.step, item.epochs, item.values)
        else:
            writer.note(item)
    assert trace.came_to(tmp_path, "chief", pid=7, started=100.0) == newest
    writer.close()


def test_a_trace_that_cannot_be_read_tells_of_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert trace.came_to(tmp_path, "chief", pid=7, started=100.0) is None
    trace.path_of(tmp_path, "chief").mkdir(parents=True)
    assert trace.came_to(tmp_path, "chief", pid=7, started=100.0) is None
    assert not caplog.records


def test_a_step_does_not_wait_while_a_disk_is_tried_again(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = opened(tmp_path)
    writer.add(NUMBERS, 0, 0, {"loss": 0.5})
    disk.error = errno.ENOSPC
    writer.add(NUMBERS, 1, 0, {"loss": 0.5})
    disk.error = None
    tries, goes_on = threading.Event(), threading.Event()
    open_own = files.open_own

    def slow(*arguments: Any) -> int:
        tries.set()
        assert goes_on.wait(60)
        return open_own(*arguments)

    monkeypatch.setattr(files, "open_own", slow)
    retrying = threading.Thread(target=writer.retry)
    retrying.start()
    assert tries.wait(60)
    steps = threading.Thread(target=lambda: [writer.add(NUMBERS, 2, 0, {"new": 0.5}), writer.note(Mark(3, 6))])
    steps.start()
    steps.join(30)
    has_waited = steps.is_alive()
    goes_on.set()
    steps.join()
    retrying.join()

    assert not has_waited
    new = Record("numbers", 2, 0, {"new": 0.5})
    assert trace.read(tmp_path) == [Start(0), loss(0), loss(1), new, Mark(3, 6)]


def test_a_disk_that_is_tried_again_is_not_read(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = opened(tmp_path)
    monkeypatch.setattr(trace, "contents", None)
    for step in range(3):
        disk.error = errno.EFBIG  # A limit for files, as `stepguard prove` sets it, passes too.
        writer.add(NUMBERS, step, 0, {"loss": 0.5})
        disk.error = None
        writer.retry()
    assert trace.parse(trace.path_of(tmp_path, "chief").read_bytes()).items == [Start(0), *map(loss, range(3))]


def test_a_disk_that_fails_while_it_is_tried_again_loses_nothing(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = opened(tmp_path)
    disk.error = errno.ENOSPC
    for step in range(10):
        writer.add(NUMBERS, step, 0, {"loss": 0.5})
    disk.error = None
    left = 4
    write = os.write

    def for_a_while(descriptor: int, content: bytes) -> int:
        nonlocal left
        left -= 1
        if left == 0:
            return write(descriptor, content[:5])
        return write(descriptor, content)

    monkeypatch.setattr(disk, "write", for_a_while)
    writer.retry()
    writer.add(NUMBERS, 10, 0, {"loss": 0.5})
    writer.retry()
    assert trace.read(tmp_path) == [Start(0), *map(loss, range(11))]


def test_names_that_are_no_texts_are_written_as_texts(tmp_path: Path) -> None:
    opened(tmp_path).add(NUMBERS, 0, 0, {0: 0.5, "loss": 1.0})  # type: ignore[dict-item]
    assert trace.read(tmp_path) == [Start(0), Record("numbers", 0, 0, {"0": 0.5, "loss": 1.0})]


def test_a_record_that_was_taken_in_part_does_not_cut_off_another_threads(tmp_path: Path, disk: Disk) -> None:
    file = appended_file.AppendedFile(tmp_path / "file", keep=0)
    file.append(b"first;")
    disk.takes = 3
    with pytest.raises(OSError, match="No space"):
        file.append(b"second;")
    disk.takes = None
    # Another thread that still has the file: its record must not be behind what the next try cuts off.
    with pytest.raises(OSError, match="No space"):
        file.append(b"third;")
    assert (file.seal(), (tmp_path / "file").read_bytes()) == (6, b"first;")
