"""Passes on the standard error of a program at once, and keeps its last lines, which tell why the program failed.

A separate process does this. It lives until the last writer has closed the pipe, even if the launcher is killed. The
program can then still write its last lines, and no broken pipe ends it while it saves its last step. If standard error
is a terminal, the program gets a terminal too, so that its progress line works.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import select
import termios
import tty

_KEPT_BYTES = 1 << 14
_LENGTH_BYTES = 8
_BLOCK_BYTES = 1 << 16
# A bar of tqdm with its times, and the counts that other progress lines show.
_BAR = re.compile(r"[^|]*\d+%\|[^|]*\| *\S+/\S+(?: *\[[^\]]*\])?")
_COUNT = re.compile(r"\d+ ?%|\d+ ?/ ?\d+|\d+ of \d+")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|.)")


class Relay:
    """Passes on from ``writer``, a descriptor for the program's standard error, to ``target``."""

    def __init__(self, target: int = 2) -> None:
        self._kept = mmap.mmap(-1, _LENGTH_BYTES + _KEPT_BYTES)
        self._terminal: int | None = None
        is_terminal = os.isatty(target)
        reader, self.writer = os.openpty() if is_terminal else os.pipe()
        if is_terminal:
            # The real terminal turns "\n" into "\r\n"; this one must not do that again.
            tty.setraw(self.writer)
            _copy_size(target, self.writer)
        self._target = target
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self.writer)
                self._run(reader)
            finally:
                os._exit(0)
        if is_terminal:
            self._terminal = reader
        else:
            os.close(reader)

    def program_has_it(self) -> None:
        """Close our copy of the writer's descriptor, now that the program has its own."""
        os.close(self.writer)

    def resized(self) -> None:
        """Take over the size of the terminal, which has changed."""
        if self._terminal is not None:
            _copy_size(self._target, self._terminal)

    def close(self) -> None:
        """Close our descriptors. The relay goes on until the last writer has closed its end."""
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None

    def last_lines(self) -> list[str]:
        """The last lines that were passed on, without blank lines, colours and progress bars."""
        length = int.from_bytes(self._kept[:_LENGTH_BYTES], "little")
        return without_noise(self._kept[_LENGTH_BYTES : _LENGTH_BYTES + length])

    def _run(self, reader: int) -> None:
        # A session of its own gets no signals of the terminal. Standard input and output are closed because others may
        # wait for their end. The signals that the launcher has blocked stay blocked.
        os.setsid()
        for descriptor in {0, 1} - {self._target}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        kept = b""
        while block := _read(reader):
            kept = (kept + block)[-_KEPT_BYTES:]
            self._kept[_LENGTH_BYTES : _LENGTH_BYTES + len(kept)] = kept
            self._kept[:_LENGTH_BYTES] = len(kept).to_bytes(_LENGTH_BYTES, "little")
            _write(self._target, block)


def without_noise(printed: bytes) -> list[str]:
    """The lines of what a program has printed, without blank lines, colours and progress bars."""
    text = printed.decode("utf-8", "replace")
    lines = (_without_progress(line.rstrip("\r")) for line in _ESCAPES.sub("", text).split("\n"))
    return [line.rstrip() for line in lines if line.strip()]


def _without_progress(line: str) -> str:
    """The line without a progress bar. Text that was written behind the bar is kept."""
    *overwritten, last = line.split("\r")
    bar = _BAR.match(last)
    if bar is not None:
        return last[bar.end() :]
    return "" if overwritten and _COUNT.search(last) else last


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, _BLOCK_BYTES)
    except OSError:
        # Linux answers EIO once nobody has the terminal open any more.
        return b""


def _write(target: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        try:
            view = view[os.write(target, view) :]
        except BlockingIOError:
            select.select([], [target], [])
        except OSError:
            # The reader is gone, which must not end the program.
            return


def _copy_size(source: int, target: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, termios.TIOCSWINSZ, fcntl.ioctl(source, termios.TIOCGWINSZ, b"\0" * 8))
