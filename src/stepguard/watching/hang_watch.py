"""The hang watch: after too long without a step boundary, the stacks of all threads go to a file.

The protocol between two processes: native code that holds the GIL stops all Python of this process, so a child process
(``hang_monitor.py``) measures the time. The observer's thread writes a byte for each boundary to a pipe and never
waits for the child: the pipe does not block, and a full or closed pipe drops the byte. The child waits for the pipe, a
second at most, and is woken by a byte, by the end of the pipe, or by the time. After a hang it sends a signal. The
handler is C code of ``faulthandler``, which writes the stacks without the GIL. The child then waits a limited time for
the message that this process has warned by itself. Only :meth:`HangWatch.finish` waits for the child, after it has
killed the child, and for ``_REAP_SECS`` at most. So neither process can block the other.

If this process is killed at any point, the pipe ends or the child gets another parent, and the child exits. If the
child is killed, the run goes on without a watch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from stepguard.disk import files, system
from stepguard.watching import hang_monitor
from stepguard.words import logger

_log = logger(__name__)

DIR_NAME = "stacks"
_REAP_SECS = 1.0


class HangWatch:
    """Watches its own process from a small child process. Call it from one thread.

    Args:
        hang_secs: seconds without a boundary that count as a hang.
        ends_process: whether the monitor then kills the process, so that a launcher starts it again.
        logdir: where ``stacks/<role>-<pid>.txt`` is written.
        role: the role of this process, for the name of that file.
        ledger: the path of the ledger.
        head: the first fields of the line that the monitor adds to the ledger.
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
        """Begin to watch. An error is logged, and the run goes on without the watch."""
        try:
            self._start()
        except (OSError, ValueError, RuntimeError) as error:
            _log.warning("the hang watch could not be started: %s", error)
            self.finish()

    def _start(self) -> None:
        files.make_dirs(self.stacks.parent.parent)
        files.make_own_dir(self.stacks.parent)
        descriptor = files.open_own(self.stacks, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._file = os.fdopen(descriptor, "ab", buffering=0)
        self._reported_size = self.stacks.stat().st_size
        self._signal = _free_signal()
        faulthandler.register(self._signal, file=self._file, all_threads=True, chain=False)
        reader, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        arguments: list[object] = [reader, os.getpid(), self._signal, self._hang_secs, int(self._ends_process)]
        arguments += [self.stacks, self._ledger, json.dumps(self._head)]
        try:
            self._monitor = subprocess.Popen(
                # Isolated, without site-packages: the monitor needs only the standard library, and starts fast so.
                [sys.executable, "-I", "-S", hang_monitor.__file__, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # In a program without stderr, descriptor 2 may be any file that the program has opened.
                stderr=None if sys.stderr is not None else subprocess.DEVNULL,
                pass_fds=[reader],
                start_new_session=True,
            )
        finally:
            os.close(reader)

    def beat(self) -> None:
        """Tell the monitor that a step boundary was seen."""
        self._send(hang_monitor.BOUNDARY)

    def reported(self) -> bool:
        """Whether stacks were written since the last call. If so, the monitor leaves the warning to this process."""
        try:
            size = self.stacks.stat().st_size
        except OSError:
            return False
        has_grown, self._reported_size = size > self._reported_size, size
        if has_grown:
            self._send(hang_monitor.WARNED)
        return has_grown

    def finish(self) -> None:
        """End the watch. An empty file of stacks is removed."""
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            os.close(pipe)
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            # Kill it: a fork of this process may keep the pipe open.
            monitor.kill()
            # A monitor that writes to a disk that hangs does not even end by a kill.
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
            # A full pipe: the monitor is suspended. A closed pipe: the monitor has ended.
            with contextlib.suppress(OSError):
                os.write(self._pipe, message)


# The signals in use: signal.getsignal does not show handlers in C.
_used_signals: set[int] = set()


def _free_signal() -> int:
    """A signal without a handler, of those that have no meaning to programs."""
    for number in system.spare_signals():
        if number not in _used_signals and signal.getsignal(number) is signal.SIG_DFL:
            _used_signals.add(number)
            return number
    raise RuntimeError("the stacks are asked for by a signal, and none is free: each has a handler already")
