"""What systems do differently: on Linux, and as if it were another system, with psutil and without."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import stepguard
from stepguard.coordination.signals import has_default_action
from stepguard.disk import files, system
from stepguard.watching.hang_watch import _free_signal

SOON_SECS = 60.0
ONLY_ON_LINUX = ("sigwaitinfo", "sigtimedwait", "SIGRTMIN", "SIGRTMAX")

OF_ONE_SYSTEM = re.compile(
    r"/proc\b(?!ess)|/sys/|prctl|prlimit|setpriority|sched_|sigtimedwait|sigwaitinfo|SIGRT|sys\.platform|os\.uname\(\)\.sysname"
    r"|platform\.system|F_GETPATH|F_FULLFSYNC|posix_fallocate|import (psutil|ctypes)"
)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This system is neither Linux nor macOS."""
    monkeypatch.setattr(system, "_is_linux", False)
    for name in ONLY_ON_LINUX:
        monkeypatch.delattr(signal, name)
    monkeypatch.delattr(resource, "prlimit")


@pytest.fixture
def without_psutil(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)


class MacFcntl:
    """The fcntl of macOS, whose two commands answer with ``answer``, or raise it."""

    F_FULLFSYNC, F_GETPATH = 51, 50

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.calls: list[tuple[int, int]] = []

    def fcntl(self, descriptor: int, command: int, argument: bytes = b"") -> Any:
        self.calls.append((descriptor, command))
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer.ljust(len(argument), b"\0") if argument else 0


@pytest.fixture
def program() -> Iterator[subprocess.Popen[str]]:
    """A running program that has a child; it prints the pid of that."""
    script = "sleep 1000 & echo $!; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True) as one:
        yield one
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGCONT)
            os.killpg(one.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + SOON_SECS
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {SOON_SECS:g} s"
        time.sleep(0.01)


def test_only_this_module_knows_what_one_system_has() -> None:
    root = Path(stepguard.__file__).parent
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in sorted(root.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if OF_ONE_SYSTEM.search(line) and path != Path(system.__file__)
    ]
    assert found == []
    assert OF_ONE_SYSTEM.search(Path(system.__file__).read_text())


# --- processes ---


@pytest.fixture(params=["linux", "elsewhere", "without_psutil"])
def anywhere(request: pytest.FixtureRequest) -> str:
    if request.param != "linux":
        request.getfixturevalue(request.param)
    return request.param


def test_a_process_runs_until_its_end(anywhere: str, program: subprocess.Popen[str]) -> None:
    started = system.process_start(program.pid)
    assert (started is None) == (anywhere == "without_psutil")
    assert system.is_running(program.pid, started)
    assert system.is_running(program.pid, None)

    program.kill()
    os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)
    # A zombie still has its pid. Whoever cannot tell takes it for a process.
    assert system.is_running(program.pid, started) == (anywhere == "without_psutil")
    program.wait()
    assert not system.is_running(program.pid, started)


def test_a_process_that_was_started_at_another_time_is_another(anywhere: str) -> None:
    started = system.process_start(os.getpid()) or 0
    assert system.is_running(os.getpid(), started + 100_000) == (anywhere == "without_psutil")
    # The clock that psutil computes with may be set meanwhile.
    assert system.is_running(os.getpid(), started + 100) == (anywhere != "linux")


def test_the_children_of_each_process_are_known_by_proc_or_by_psutil(
    anywhere: str, program: subprocess.Popen[str]
) -> None:
    assert program.stdout is not None
    child = int(program.stdout.readline())
    known = system.children_by_parent()
    if anywhere == "without_psutil":
        assert known == {}
    else:
        assert program.pid in known[os.getpid()]
        assert known[program.pid] == [child]


def test_who_has_a_file_open_is_known_by_proc_or_by_psutil(anywhere: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w"):
        found = system.with_open(path.stat())
    named = [f"{os.getpid()} ({Path('/proc/self/comm').read_text().strip()})"]
    assert found == ([] if anywhere == "without_psutil" else named)
    assert system.with_open(path.stat()) == []


def test_a_suspended_process_is_known_by_proc_or_by_ps(anywhere: str, program: subprocess.Popen[str]) -> None:
    assert not system.is_stopped(program.pid)
    program.send_signal(signal.SIGSTOP)
    wait_until(lambda: system.is_stopped(program.pid), "the stop")
    program.send_signal(signal.SIGCONT)
    wait_until(lambda: not system.is_stopped(program.pid), "the continuation")


def test_without_ps_no_process_is_known_to_be_suspended(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert not system.is_stopped(os.getpid())


def test_nothing_is_promised_for_other_processes_elsewhere(elsewhere: None) -> None:
    assert not system.adopt_orphans()
    assert not system.end_with_parent(signal.SIGTERM)
    assert system.file_size_limits(os.getpid()) is None
    assert not system.limit_file_sizes(os.getpid(), (0, 0))
    assert system.handled_signals(os.getpid()) is None
    before = os.getpriority(os.PRIO_PROCESS, 0)
    system.yield_to_others()
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


# --- signals ---


def test_a_handler_in_c_is_seen_by_proc_or_by_the_c_library(anywhere: str) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    try:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        assert system.is_caught(signal.SIGUSR2) is False
        assert has_default_action(signal.SIGUSR2)
        faulthandler.register(signal.SIGUSR2)
        assert system.is_caught(signal.SIGUSR2) is True
        assert not has_default_action(signal.SIGUSR2)
        faulthandler.unregister(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        assert system.is_caught(signal.SIGUSR2) is False
        signal.signal(signal.SIGUSR2, lambda *_: None)
        assert system.is_caught(signal.SIGUSR2) is True
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert system.is_caught(1000) in (None, False)


def test_a_signal_that_is_waited_for_comes_with_or_without_its_sender(anywhere: str) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        # To this thread: that of the time limit of the tests does not block it.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        sender = False if anywhere == "linux" else None
        assert system.wait_for_signal([signal.SIGUSR1]) == (signal.SIGUSR1, sender)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert system.tells_senders() == (anywhere == "linux")


def test_stacks_are_asked_for_by_a_signal_that_programs_leave_alone(
    elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="none is free"):
        _free_signal()
    # Those of macOS; here they are two that nothing in this process handles.
    monkeypatch.setattr(signal, "SIGEMT", signal.SIGXCPU, raising=False)
    monkeypatch.setattr(signal, "SIGINFO", signal.SIGVTALRM, raising=False)
    assert system.spare_signals() == [signal.SIGXCPU, signal.SIGVTALRM]


# --- files ---


@pytest.mark.parametrize("code", [None, errno.ENOTSUP, errno.EIO])
def test_each_fsync_is_followed_by_a_flush_of_the_drive_on_macos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    mac = MacFcntl(None if code is None else OSError(code, "of the drive"))
    monkeypatch.setattr(system, "fcntl", mac)
    synced: list[int] = []

    class Os:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def fsync(self, descriptor: int) -> None:
            assert len(synced) == len(mac.calls), "two fsyncs without a flush between them"
            synced.append(descriptor)
            os.fsync(descriptor)

    monkeypatch.setattr(files, "os", Os())
    with pytest.raises(OSError, match="of the drive") if code == errno.EIO else contextlib.nullcontext():
        files.write_atomic(tmp_path / "file", b"content")

    assert len(synced) == (1 if code == errno.EIO else 2)  # the file, and its directory
    assert mac.calls == [(descriptor, mac.F_FULLFSYNC) for descriptor in synced]


def test_no_drive_is_flushed_where_the_fsync_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(system, "fcntl", SimpleNamespace(fcntl=lambda *arguments: asked.append(1)))
    system.flush_drive(0)
    assert asked == []


def test_the_path_of_an_open_file_is_known_on_linux_and_macos_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    with path.open("w") as file:
        assert system.path_of(file.fileno()) == str(path)
        monkeypatch.setattr(system, "_is_linux", False)
        assert system.path_of(file.fileno()) is None
        monkeypatch.setattr(system, "fcntl", MacFcntl(b"/private/run/file"))
        assert system.path_of(file.fileno()) == "/private/run/file"
        monkeypatch.setattr(system, "fcntl", MacFcntl(OSError(errno.EBADF, "closed")))
        assert system.path_of(file.fileno()) is None


def test_a_file_is_opened_anew_by_its_descriptor_or_on_macos_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.read(descriptor, 3)
        assert files.read_bytes(system.place_of(descriptor)) == b"content"
        monkeypatch.setattr(system, "_is_linux", False)
        monkeypatch.setattr(system, "fcntl", MacFcntl(os.fsencode(path)))
        assert system.place_of(descriptor) == path
    finally:
        os.close(descriptor)
