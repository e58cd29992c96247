"""Passes on the standard error of a program at once, and keeps its last lines, which tell why the program failed.

A separate process does this. It lives until the last writer has closed the pipe, even if the launcher is killed. The
program can then still write its last lines, and no broken pipe ends it while it saves its last step. If standard error
is a terminal, the program gets a terminal too, so that its progress line works.

A traceback that ends a program as one has ended the start before is held back, and not shown again.
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
from collections.abc import Iterator

_KEPT_BYTES = 1 << 14
_LENGTH_BYTES = 8
_BLOCK_BYTES = 1 << 16
_TRACEBACK = re.compile(rb"^Traceback \(most recent call last\):", re.MULTILINE)
# A program that goes on so long after its traceback hangs, and its user wants to see why.
_HELD_SECS = 5.0
# A bar of tqdm with its times, and the counts that other progress lines show.
_BAR = re.compile(r"[^|]*\d+%\|[^|]*\| *\S+/\S+(?: *\[[^\]]*\])?")
_COUNT = re.compile(r"\d+ ?%|\d+ ?/ ?\d+|\d+ of \d+")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|.)")


class Relay:
    """Passes on from ``writer``, a descriptor for the program's standard error, to ``target``.

    ``before`` is what the relay of the start before has :attr:`kept`.
    """

    def __init__(self, target: int = 2, before: bytes = b"") -> None:
        self._before = before
        # The length of what is kept, that itself, and whether the traceback at its end was held back.
        self._kept = mmap.mmap(-1, _LENGTH_BYTES + _KEPT_BYTES + 1)
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

    @property
    def kept(self) -> bytes:
        """The last of what the program has written."""
        length = int.from_bytes(self._kept[:_LENGTH_BYTES], "little")
        return self._kept[_LENGTH_BYTES : _LENGTH_BYTES + length]

    @property
    def is_repeated(self) -> bool:
        """Whether the program has ended with the traceback of the start before, which was not shown again."""
        return bool(self._kept[-1])

    def last_lines(self) -> list[str]:
        """The last lines of the program, without blank lines, colours and progress bars."""
        return without_noise(self.kept)

    def _run(self, reader: int) -> None:
        # A session of its own gets no signals of the terminal. Standard input and output are closed because others may
        # wait for their end. The signals that the launcher has blocked stay blocked.
        os.setsid()
        for descriptor in {0, 1} - {self._target}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        kept = b""
        repeated = Repeated(self._before)
        while True:
            if repeated.held and not select.select([reader], [], [], _HELD_SECS)[0]:
                _write(self._target, repeated.release())
            block = _read(reader)
            if not block:
                break
            kept = (kept + block)[-_KEPT_BYTES:]
            self._kept[_LENGTH_BYTES : _LENGTH_BYTES + len(kept)] = kept
            self._kept[:_LENGTH_BYTES] = len(kept).to_bytes(_LENGTH_BYTES, "little")
            _write(self._target, repeated.without(block))
        self._kept[-1] = repeated.is_whole
        if not repeated.is_whole:
            _write(self._target, repeated.held)


class Repeated:
    """Finds the traceback at the end of ``before`` at the end of what a program writes, block after block."""

    def __init__(self, before: bytes) -> None:
        # One that has a cause has others inside, and a program may have logged some before.
        self._tracebacks = [before[found.start() :] for found in _TRACEBACK.finditer(before)]
        self._longest = max(map(len, self._tracebacks), default=0)
        self._is_at_line = True
        self.held = b""
        """What may be the beginning of the traceback, or all of it."""

    @property
    def is_whole(self) -> bool:
        """Whether all of the traceback is held."""
        return self.held in self._tracebacks

    def without(self, block: bytes) -> bytes:
        """What is to be passed on, now that the program has written ``block``."""
        text = self.held + block
        for start in self._lines(text):
            if any(one.startswith(text[start:]) for one in self._tracebacks):
                return self._passed(text, start)
        return self._passed(text, len(text))

    def release(self) -> bytes:
        """What was held, which is to be passed on after all."""
        return self._passed(self.held, len(self.held))

    def _lines(self, text: bytes) -> Iterator[int]:
        """Where lines begin that are followed by no more than a traceback has."""
        start = max(0, len(text) - self._longest)
        if start == 0 and self._is_at_line:
            yield 0
        while (start := text.find(b"\n", max(0, start - 1)) + 1) > 0:
            yield start
            start += 1

    def _passed(self, text: bytes, end: int) -> bytes:
        passed, self.held = text[:end], text[end:]
        if passed:
            self._is_at_line = passed.endswith(b"\n")
        return passed


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
