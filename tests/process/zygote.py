"""Real processes, quickly: one parent that has imported TensorFlow and forks a child for each program.

Importing TensorFlow takes seconds, a fork takes milliseconds. The parent makes no session and starts no thread of its
own, so its children begin as if they had imported TensorFlow themselves; they end as programs do, by returning, by an
uncaught error or by a signal, with the interpreter's own clearing up.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# More than anything here takes on a busy machine, and less than anyone would wait.
SOON_SECS = 60.0

_SELF = Path(__file__).resolve()


def wait_until(condition: Callable[[], Any], what: str, timeout_secs: float = SOON_SECS) -> Any:
    """Wait for ``condition`` and return what it gave, or fail saying ``what`` did not come."""
    deadline = time.monotonic() + timeout_secs
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_secs:g} s"
        time.sleep(0.002)
    return found


# ------------------------------------------------------------------------------------------------ in the child


class Reporter:
    """Where a child says what it does: one JSON object a line, in the kernel's hands before ``__call__`` returns.

    So a line stands even if the very next instruction kills the process.
    """

    def __init__(self) -> None:
        self._descriptor = -1

    def open(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def __call__(self, kind: str, **fields: Any) -> None:
        os.write(self._descriptor, (json.dumps({"kind": kind, **fields}) + "\n").encode())


report = Reporter()


# ------------------------------------------------------------------------------------------------ in the test


class Child:
    """A process that runs one function."""

    def __init__(self, zygote: Zygote, number: int, pid: int, place: Path) -> None:
        self._zygote = zygote
        self._number = number
        self.pid = pid
        self._reports = place / "reports"
        self._output = place / "output"

    @property
    def output(self) -> str:
        """What it wrote to stdout and stderr so far."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def reports(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What it has reported so far; a line that a kill cut short was not said."""
        if not self._reports.exists():
            return []
        lines = self._reports.read_text().split("\n")[:-1]
        found = [json.loads(line) for line in lines]
        return [one for one in found if kind is None or one["kind"] == kind]

    def wait_for(self, kind: str, *, count: int = 1, timeout_secs: float = SOON_SECS) -> dict[str, Any]:
        """Wait until it has made ``count`` reports of a kind; the last of them."""

        def found() -> bool:
            if len(self.reports(kind)) >= count:
                return True
            assert self.poll() is None, f"ended with {self.poll()} before {kind!r}:\n{self.output}"
            return False

        try:
            wait_until(found, f"report {kind!r} number {count}", timeout_secs)
        except AssertionError as error:
            raise AssertionError(f"{error}; reported {self.reports()[-5:]}; output:\n{self.output[-4000:]}") from None
        return self.reports(kind)[count - 1]

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def state(self) -> str:
        """The letter by which the kernel names what it does: R, S, D, T (stopped), Z."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._zygote._status(self._number, 0.0)

    def wait(self, timeout_secs: float = SOON_SECS) -> int:
        """Wait for its end, and return its exit status."""
        status = self._zygote._status(self._number, timeout_secs)
        assert status is not None, f"still running after {timeout_secs:g} s:\n{self.output[-4000:]}"
        return status

    def kill(self) -> int:
        """SIGKILL, and wait for the end."""
        self.send(signal.SIGKILL)
        return self.wait()


class Zygote:
    """The parent of the children, itself a child of the test run. They call functions of ``module``."""

    def __init__(self, place: Path, module: str) -> None:
        self._place = place
        self._count = 0
        self._statuses: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self._unread = b""
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._process = subprocess.Popen(
            [sys.executable, str(_SELF), str(theirs.fileno()), module], pass_fds=[theirs.fileno()]
        )
        theirs.close()

    def start(self, function: str, *, uid: int | None = None, **arguments: Any) -> Child:
        """Start a process that calls a function of the module, as another user if ``uid`` says so."""
        self._count += 1
        number = self._count
        place = self._place / str(number)
        place.mkdir()
        order = {"number": number, "function": function, "arguments": arguments, "place": str(place), "uid": uid}
        self._socket.sendall((json.dumps(order) + "\n").encode())
        deadline = time.monotonic() + SOON_SECS
        while number not in self._pids:
            self._read(deadline - time.monotonic())
        return Child(self, number, self._pids[number], place)

    def close(self) -> None:
        """End the parent; the kernel ends its children with it."""
        self._socket.close()
        self._process.wait(SOON_SECS)

    def _status(self, number: int, timeout_secs: float) -> int | None:
        deadline = time.monotonic() + timeout_secs
        while number not in self._statuses:
            remaining = deadline - time.monotonic()
            if not self._read(max(0.0, remaining)) and remaining <= 0:
                return None
        return self._statuses[number]

    def _read(self, timeout_secs: float) -> bool:
        readable, _, _ = select.select([self._socket], [], [], max(0.0, timeout_secs))
        if not readable:
            return False
        received = self._socket.recv(65536)
        assert received, "the parent of the children has ended"
        *lines, self._unread = (self._unread + received).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "pid" in message:
                self._pids[message["number"]] = message["pid"]
            else:
                self._statuses[message["number"]] = os.waitstatus_to_exitcode(message["status"])
        return True


# ------------------------------------------------------------------------------------------------ the parent


def _serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork a child for each order. Returns in each child, with its order, and at the end, with None."""
    running: dict[int, tuple[int, int]] = {}
    unread = b""
    while True:
        readable, _, _ = select.select([connection, *running], [], [])
        for descriptor in [one for one in readable if one in running]:
            pid, number = running.pop(descriptor)
            os.close(descriptor)
            _, status = os.waitpid(pid, 0)
            connection.sendall((json.dumps({"number": number, "status": status}) + "\n").encode())
        if connection not in readable:
            continue
        received = connection.recv(65536)
        if not received:
            return None
        *lines, unread = (unread + received).split(b"\n")
        for line in lines:
            order = json.loads(line)
            pid = os.fork()
            if pid == 0:
                connection.close()
                for descriptor in running:
                    os.close(descriptor)
                return order  # type: ignore[no-any-return]
            running[os.pidfd_open(pid)] = (pid, order["number"])
            connection.sendall((json.dumps({"number": order["number"], "pid": pid}) + "\n").encode())


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def _become(order: dict[str, Any]) -> None:
    """Make this fork a process of its own: its output, its user, its reports."""
    output = os.open(os.path.join(order["place"], "output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    report.open(os.path.join(order["place"], "reports"))
    if order["uid"] is not None:
        os.setgroups([])
        os.setgid(order["uid"])
        os.setuid(order["uid"])
    _die_with_parent()


if __name__ == "__main__":
    import importlib

    sys.path.insert(0, str(_SELF.parent))
    # The children find this very module, with its `report`, under its own name.
    sys.modules["zygote"] = sys.modules["__main__"]
    _children = importlib.import_module(sys.argv[2])
    importlib.import_module("frozen_heap")
    _order = _serve(socket.socket(fileno=int(sys.argv[1])))
    if _order is not None:
        _become(_order)
        getattr(_children, _order["function"])(**_order["arguments"])
