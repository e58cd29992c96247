"""The ledger: what was appended is there, whatever happened to the lines before it."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest

from stepguard.disk import files
from stepguard.watching import ledger
from stepguard.watching.ledger import Ledger


class FailingOs:
    """``os``, but that the disk is full, or takes only a part, while ``left`` says so."""

    def __init__(self, left):
        self.left = left

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, descriptor, content):
        if self.left is None:
            return os.write(descriptor, content)
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = os.write(descriptor, bytes(content)[: self.left])
        self.left -= count
        return count


class QuickOs:
    """``os``, but that nothing is made durable: for hundreds of appends of which nothing must last."""

    def __getattr__(self, name):
        return getattr(os, name)

    def fsync(self, descriptor):
        pass


def steps(logdir):
    return [one.get("step") for one in ledger.read(logdir)]


def test_a_line_says_what_when_and_who(tmp_path):
    before = time.time()
    Ledger(tmp_path, role="chief").append("checkpoint", step=7, name="model.ckpt-7")
    (event,) = ledger.read(tmp_path)
    assert before - 0.001 <= event.pop("time") <= time.time() + 0.001
    assert event.pop("host")
    assert event == {"event": "checkpoint", "pid": os.getpid(), "role": "chief", "step": 7, "name": "model.ckpt-7"}


def test_a_logdir_that_is_gone_with_its_mount_is_not_made_again(tmp_path):
    Ledger(tmp_path / "gone", role="chief").append("checkpoint", step=1)
    assert not (tmp_path / "gone").exists()


def test_a_logdir_without_a_ledger_has_no_events(tmp_path):
    assert ledger.read(tmp_path) == []
    assert ledger.read(tmp_path / "missing") == []
    (tmp_path / "file").touch()
    assert ledger.read(tmp_path / "file") == []


def test_it_survives_a_kill_at_any_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "os", QuickOs())
    path = tmp_path / ledger.FILE_NAME
    first = Ledger(tmp_path, role="chief")
    for step in range(3):
        first.append("checkpoint", step=step)
    whole = path.read_bytes()
    ends = [number + 1 for number, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        Ledger(tmp_path, role="chief").append("checkpoint", step=99)
        # A line whose line end alone is missing is whole.
        kept = sum(end - 1 <= cut for end in ends)
        assert steps(tmp_path) == [*range(kept), 99], cut


def test_damaged_lines_cost_themselves_only(tmp_path):
    book = Ledger(tmp_path, role="chief")
    book.append("checkpoint", step=1)
    bad = [
        b"\0\0\0",
        b"\xff\xfe",
        b"{}",
        b"[1]",
        b'{"event": 1, "time": 2}',
        b'{"event": "x", "time": "now"}',
        b"[" * 9999,
    ]
    with open(tmp_path / ledger.FILE_NAME, "ab") as file:
        file.write(b"\n".join(bad))
    book.append("checkpoint", step=2)
    assert steps(tmp_path) == [1, 2]


def test_what_a_full_disk_held_up_comes_with_the_next_line(tmp_path, monkeypatch, caplog):
    book = Ledger(tmp_path, role="chief")
    book.append("checkpoint", step=1)
    full = FailingOs(0)
    monkeypatch.setattr(files, "os", full)
    book.append("checkpoint", step=2)
    book.append("checkpoint", step=3)
    assert steps(tmp_path) == [1]
    assert len(caplog.records) == 1
    assert "could not be written" in caplog.text
    full.left = None
    book.append("checkpoint", step=4)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_disk_that_takes_a_part_of_a_line_leaves_no_wrong_one(tmp_path, monkeypatch):
    book = Ledger(tmp_path, role="chief")
    book.append("checkpoint", step=1)
    part = FailingOs(20)
    monkeypatch.setattr(files, "os", part)
    book.append("checkpoint", step=2)
    part.left = None
    book.append("checkpoint", step=3)
    assert steps(tmp_path) == [1, 2, 3]


def test_numbers_that_are_not_finite_are_written_by_name():
    line = ledger.encode({"event": "return", "time": 1.0, "number": float("nan"), "all": [float("-inf")]})
    assert json.loads(line) == {"event": "return", "time": 1.0, "number": "nan", "all": ["-inf"]}


@pytest.mark.parametrize("processes", [4])
def test_several_processes_append_at_the_same_time(tmp_path, processes):
    program = (
        "import sys\n"
        "from stepguard.watching.ledger import Ledger\n"
        "book = Ledger(sys.argv[1], role=sys.argv[2])\n"
        "for step in range(100):\n"
        "    book.append('checkpoint', step=step, padding='x' * (step * 40))\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", program, tmp_path, f"worker-{n}"]) for n in range(processes)]
    assert [one.wait(60) for one in started] == [0] * processes
    for number in range(processes):
        found = [one["step"] for one in ledger.read(tmp_path) if one["role"] == f"worker-{number}"]
        assert found == list(range(100))
