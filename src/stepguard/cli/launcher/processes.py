"""The processes of a program: its start, its end, and the end of every process that it has started.

On Linux the launcher inherits the children of a parent that has ended, in any session, so that it can find and end
them; and the program gets SIGTERM when the launcher is killed. Elsewhere the launcher finds descendants whose parents
live, if psutil is installed, and always the group of the program; a killed launcher leaves its program running.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from stepguard.disk import system

_KILL_SECS = 10.0
_ENDING = {signal.SIGINT, signal.SIGTERM}


class Processes:
    """Starts programs, one after the other, and reaps all children of this process."""

    def __init__(self) -> None:
        system.adopt_orphans()
        self._ended: dict[int, int] = {}

    def start(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        stderr: int,
        stdout: int | None = None,
        has_own_group: bool,
        in_child: Callable[[], None],
    ) -> int:
        """Start a program and return its pid. ``in_child`` is called in the new process before the program. Its
        standard output is that of this process unless ``stdout`` is given.

        Raises:
            OSError: there is no such program, or it cannot be executed.
        """
        launcher = os.getpid()
        # Between fork and exec an exception would be lost, or an error of the start. There the signals end the process.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)

        def prepare() -> None:
            for number in _ENDING:
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if has_own_group:
                os.setpgid(0, 0)
            if system.end_with_parent(signal.SIGTERM) and os.getppid() != launcher:
                os._exit(128 + signal.SIGTERM)
            in_child()

        # Pids are reused: an orphan that ended earlier may have had the pid that this program gets.
        self._ended.clear()
        try:
            process = subprocess.Popen(argv, env=environment, stdout=stdout, stderr=stderr, preexec_fn=prepare)  # noqa: PLW1509
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # `reap` collects the exit code; this keeps the object from waiting for it as well.
        process.returncode = 0
        return process.pid

    def reap(self) -> None:
        """Reap all children that have ended, and keep their exit codes."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._ended[pid] = os.waitstatus_to_exitcode(status)

    def ending(self, pid: int) -> int | None:
        """The exit code of a child, negative for the signal that ended it; None while it runs."""
        self.reap()
        return self._ended.get(pid)

    def descendants(self) -> list[int]:
        """All running descendants of this process, parents before their children, as far as they are known."""
        return descendants_of(os.getpid())

    def orphans(self, known: int) -> list[int]:
        """The children that this process has inherited, without ``known``."""
        self.reap()
        return [pid for pid in system.children_by_parent().get(os.getpid(), []) if pid != known]

    def kill_all(self, spared: int, program: int | None = None) -> None:
        """Kill ``program`` and all descendants of this process except ``spared``, until none is left."""
        if program is not None:
            # Elsewhere than on Linux, fewer descendants are found; the group is reached, if the program has its own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                (os.killpg if os.getpgid(program) == program else os.kill)(program, signal.SIGKILL)
        deadline = time.monotonic() + _KILL_SECS
        while (alive := descendants_of(os.getpid(), spared)) and time.monotonic() < deadline:
            for pid in alive:
                send(pid, signal.SIGKILL)
            time.sleep(0.01)  # nothing signals that a descendant has ended, so scan again
            self.reap()


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants_of(root: int, spared: int = -1) -> list[int]:
    """All running descendants of a process except ``spared`` that are known, parents before their children."""
    children = system.children_by_parent()
    found = [pid for pid in children.get(root, []) if pid != spared]
    for pid in found:
        found += children.get(pid, [])
    return found
