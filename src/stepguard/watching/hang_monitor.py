"""A small process beside a training process that notices a hang even while no Python runs in the training process.

Run as a script, with the standard library only: ``hang_monitor.py DESCRIPTOR PID SIGNAL SECS ENDS STACKS LEDGER HEAD``.
The parent writes bytes to the descriptor: ``.`` for a step boundary, ``w`` for "I have warned myself". After SECS
without a boundary, the monitor sends SIGNAL, which makes the parent write its stacks to the file STACKS, and appends a
line to the LEDGER, whose first fields are the JSON object HEAD. If ENDS is 1, the monitor then kills the parent. The
monitor ends when its parent ends; ``hang_watch.py`` describes the protocol between the two.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import sys
import time
from typing import Any

BOUNDARY = b"."
WARNED = b"w"
# How often the monitor checks its parent: a fork of the parent may keep the pipe open after the parent's end.
_LOOK_SECS = 1.0
# How long the monitor waits for the parent to write its stacks, and to say that it has warned, if Python runs there.
_STACKS_SECS = 2.0


class Monitor:
    """Waits for step boundaries and reports a hang. Unix only."""

    def __init__(
        self, descriptor: int, pid: int, number: int, secs: float, ends: bool, stacks: str, ledger: str, head: str
    ) -> None:
        self._descriptor = descriptor
        self._pid = pid
        self._signal = number
        self._secs = secs
        self._ends = ends
        self._stacks = stacks
        self._ledger = ledger
        self._head = json.loads(head)
        self._system = _system()

    def run(self) -> None:
        """Watch until the parent ends or closes the pipe."""
        last = time.monotonic()
        reported = False
        while True:
            began = time.monotonic()
            left_secs = _LOOK_SECS if reported else last + self._secs - began
            wait_secs = min(max(left_secs, 0.0), _LOOK_SECS)
            came = self._read(wait_secs)
            # Do not count time in which this process was stopped too: a frozen container, or a machine asleep.
            last += max(0.0, time.monotonic() - began - wait_secs)
            if came == b"" or os.getppid() != self._pid:
                return
            if came is not None and BOUNDARY in came:
                last = time.monotonic()
                reported = False
            elif self._is_stopped():
                # Ctrl-Z or a scheduler has suspended the parent. It gets the full time again when it continues.
                last = time.monotonic()
            elif not reported and time.monotonic() >= last + self._secs:
                reported = True
                if not self._report(time.monotonic() - last):
                    return

    def _read(self, timeout_secs: float) -> bytes | None:
        """The bytes that arrived; ``None`` if none arrived in time, empty if the pipe was closed."""
        ready, _, _ = select.select([self._descriptor], [], [], timeout_secs)
        return os.read(self._descriptor, 4096) if ready else None

    def _is_stopped(self) -> bool:
        return bool(self._system.is_stopped(self._pid))

    def _report(self, secs: float) -> bool:
        """Make the parent write its stacks, and report the hang. Returns whether a parent is left to watch."""
        ends = ", and ends it" if self._ends else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self._append(self._stacks, f"{when}: no step boundary for {secs:.1f} s in process {self._pid}\n")
        try:
            os.kill(self._pid, self._signal)
        except ProcessLookupError:
            return False
        line = {**self._head, "time": round(time.time(), 3), "secs": round(secs, 1), "stacks": self._stacks}
        self._append(self._ledger, json.dumps({**line, "ended": self._ends}) + "\n")
        if not self._has_warned():
            text = f"no step boundary for {secs:.1f} s in process {self._pid}: the stacks of its threads are in "
            os.write(2, f"stepguard: {text}{self._stacks}{ends}\n".encode())
        if self._ends and os.getppid() == self._pid:
            self._wait_for_stacks()
            os.kill(self._pid, signal.SIGKILL)
            return False
        return True

    def _wait_for_stacks(self) -> None:
        """Wait until the file of stacks stops growing."""
        deadline = time.monotonic() + _STACKS_SECS
        size = -1
        while time.monotonic() < deadline:
            last, size = size, os.stat(self._stacks).st_size if os.path.exists(self._stacks) else 0
            if last == size:
                return
            time.sleep(0.2)

    def _has_warned(self) -> bool:
        deadline = time.monotonic() + _STACKS_SECS
        while (left_secs := deadline - time.monotonic()) > 0:
            came = self._read(left_secs)
            if came is not None and WARNED in came:
                return True
            if came == b"":
                return False
        return False

    def _append(self, path: str, text: str) -> None:
        if not path:
            return
        # A full disk must not prevent the kill that follows.
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            # As `files.open_own`, which this process does not import.
            descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            os.write(2, f"stepguard: {path}: {error}\n".encode())


def _system() -> Any:
    """The module ``stepguard.disk.system``, without its package, which this process does not import."""
    path = os.path.join(os.path.dirname(os.path.dirname(__file__)), "disk", "system.py")
    spec = importlib.util.spec_from_file_location("stepguard_system", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str]) -> None:
    """Run the monitor with the arguments that ``hang_watch`` passes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # These signals are meant for the parent. One sent to the whole job must not end the watch before the parent.
        signal.signal(number, signal.SIG_IGN)
    descriptor, pid, asking, secs, ends, stacks, ledger, head = arguments
    Monitor(int(descriptor), int(pid), int(asking), float(secs), ends == "1", stacks, ledger, head).run()


if __name__ == "__main__":
    main(sys.argv[1:])
