"""The end of a trace that is still written: only what is new is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from stepguard.cli.proving.program import Live, reached
from stepguard.cli.proving.trace_tail import TraceTail
from stepguard.watching import history, ledger, trace
from stepguard.watching.trace import NUMBERS, Start
from stepguard.watching.trace_writer import TraceWriter


def test_each_look_reads_what_was_added_since(tmp_path: Path, monkeypatch: Any) -> None:
    tail = TraceTail(tmp_path, "chief")
    tail.look()
    assert (tail.step, tail.started) == (None, None)
    writer = TraceWriter(tmp_path, "chief", most_bytes=2000)
    writer.open(Start(0, time=5.0))
    read = 0
    pread = os.pread

    def counting(descriptor: int, size: int, offset: int) -> bytes:
        nonlocal read
        content = pread(descriptor, size, offset)
        read += len(content)
        return content

    monkeypatch.setattr(os, "pread", counting)
    for step in range(1, 100):
        writer.add(NUMBERS, step, 0, {"loss": 0.5} if step % 2 else {"accuracy": 0.5})
        tail.look()
        assert (tail.step, tail.started) == (step, 5.0)
    # The next files begin with all shapes anew.
    assert trace.path_of(tmp_path, "chief").with_name("chief.before.trace").exists()
    assert read < 99 * 32 + 1000


def test_a_record_that_a_kill_has_cut_short_is_read_when_it_is_written_again(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, "chief")
    writer.open(Start(0))
    writer.add(NUMBERS, 1, 0, {"loss": 0.5})
    path = trace.path_of(tmp_path, "chief")
    tail = TraceTail(tmp_path, "chief")
    tail.look()
    path.write_bytes(path.read_bytes() + b"\x01\x00\x00")
    tail.look()
    assert tail.step == 1
    again = TraceWriter(tmp_path, "chief")
    again.open(Start(1, is_resumed=True, time=9.0))
    again.add(NUMBERS, 2, 0, {"loss": 0.5})
    tail.look()
    assert (tail.step, tail.started) == (2, 9.0)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "other", "chief")
    (tmp_path / "other").mkdir()
    writer.open(Start(7))
    (tmp_path / "run" / "traces").mkdir(parents=True)
    trace.path_of(tmp_path / "run", "chief").symlink_to(trace.path_of(tmp_path / "other", "chief"))
    tail = TraceTail(tmp_path / "run", "chief")
    tail.look()
    assert tail.step is None


def test_how_far_a_run_has_come_is_told_by_the_trace_of_its_newest_session(tmp_path: Path) -> None:
    written = ledger.Ledger(tmp_path, role=history.CHIEF)
    live = Live(tmp_path)
    assert live.step() is None
    written.append("fresh", step=0)
    writer = TraceWriter(tmp_path, "chief")
    writer.open(Start(0, time=1e12))
    writer.add(NUMBERS, 3, 0, {"loss": 0.5})
    assert live.step() == 3
    writer.add(NUMBERS, 4, 0, {"loss": 0.5})
    assert (live.step(), reached(tmp_path)) == (4, 4)
