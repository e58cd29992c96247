"""The hang watch: no step boundary for too long, and the stacks of all threads go to a file, whoever holds the GIL."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from stepguard import files
from stepguard.watching import hang_monitor

_log = logging.getLogger(__name__)

DIR_NAME = "stacks"
_REAP_SECS = 1.0


class HangWatch:
    """Watches the process it is in, from a small process beside it. One thread.

    Python code of this process could not see it hang while some native code holds the interpreter's lock, nor end it.
    So a child process does both; the stacks are written by a signal handler in C that needs no interpreter.

    Args:
        hang_secs: seconds without a boundary that count as a hang.
        ends_process: whether the process is then killed, so that a launcher starts it again.
        logdir: where ``stacks/<role>-<pid>.txt`` is written.
        role: of this process, for the name of that file.
        ledger: the ledger's path, and
        head: the fields with which its line begins.
    """

    def __init__(
        self, hang_secs: float, *, ends_process: bool, logdir: Path, role: str, ledger: Path, head: Mapping[str, Any]
    ) -> None:
        self.stacks = (logdir / DIR_NAME / f"{role}-{os.getpid()}.txt").absolute()
        self._hang_secs = hang_secs
        self._ends_process = ends_process
        self._ledger = ledger.absolute()
        self._head = dict(head)
        self._signal: int | None = None
        self._file: IO[bytes] | None = None
        self._pipe: int | None = None
        self._monitor: subprocess.Popen[bytes] | None = None
        self._reported_size = 0

    def start(self) -> None:
        """Begin to watch. What hinders it is logged: a run goes on without."""
        try:
            self._start()
        except (OSError, ValueError, RuntimeError) as error:
            _log.warning("the hang watch could not be started: %s", error)
            self.finish()

    def _start(self) -> None:
        files.make_dirs(self.stacks.parent)
        self._file = open(self.stacks, "ab", buffering=0)  # noqa: SIM115 - as long as the watch lasts
        self._reported_size = self.stacks.stat().st_size
        self._signal = _free_signal()
        faulthandler.register(self._signal, file=self._file, all_threads=True, chain=False)
        reader, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        arguments: list[object] = [reader, os.getpid(), self._signal, self._hang_secs, int(self._ends_process)]
        arguments += [self.stacks, self._ledger, json.dumps(self._head)]
        try:
            self._monitor = subprocess.Popen(
                # Isolated and without site-packages: the standard library is all it needs, and starts in an instant.
                [sys.executable, "-I", "-S", hang_monitor.__file__, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Where the program has none, descriptor 2 may be any file that it has opened since.
                stderr=None if sys.stderr is not None else subprocess.DEVNULL,
                pass_fds=[reader],
                start_new_session=True,
            )
        finally:
            os.close(reader)

    def beat(self) -> None:
        """A step boundary was seen."""
        self._send(hang_monitor.BOUNDARY)

    def reported(self) -> bool:
        """Whether stacks were written since the last call; the monitor is told that this process says so itself."""
        try:
            size = self.stacks.stat().st_size
        except OSError:
            return False
        has_grown, self._reported_size = size > self._reported_size, size
        if has_grown:
            self._send(hang_monitor.WARNED)
        return has_grown

    def finish(self) -> None:
        """Watch no longer. An empty file of stacks is removed."""
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            os.close(pipe)
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            # Another fork of this process may hold the pipe's end.
            monitor.kill()
            # Not even a kill ends one that writes to a disk that hangs.
            with contextlib.suppress(subprocess.TimeoutExpired):
                monitor.wait(_REAP_SECS)
        number, self._signal = self._signal, None
        if number is not None:
            faulthandler.unregister(number)
            _used_signals.discard(number)
        file, self._file = self._file, None
        if file is not None:
            file.close()
            with contextlib.suppress(OSError):
                if self.stacks.stat().st_size == 0:
                    files.remove_quietly(self.stacks)
                    self.stacks.parent.rmdir()

    def _send(self, message: bytes) -> None:
        if self._pipe is not None:
            # Full: the monitor was stopped. Closed: it has ended.
            with contextlib.suppress(OSError):
                os.write(self._pipe, message)


# Python does not know of handlers in C.
_used_signals: set[int] = set()


def _free_signal() -> int:
    """A real-time signal that nobody handles: those of lower numbers have meanings that programs rely on."""
    if not hasattr(signal, "SIGRTMIN"):
        raise RuntimeError("this system has no real-time signals, which the stacks are asked for with")
    for number in range(signal.SIGRTMAX - 1, signal.SIGRTMIN, -1):
        if number not in _used_signals and signal.getsignal(number) is signal.SIG_DFL:
            _used_signals.add(number)
            return number
    raise RuntimeError("every real-time signal has a handler already")
