"""What systems do differently: the one module that uses ``/proc``, ``prctl``, and whatever else only some systems have.

Each function says what it does on Linux, and what elsewhere. Elsewhere psutil answers where it can, which is a
dependency on every other system; what nobody can answer is ``None``, or nothing, and the caller then does the safe
thing. The table in docs/promises.md says what that means for a run.

The monitor of the hang watch loads this file without its package and without psutil, so it imports only the standard
library, and little of that.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

# Not asked for anywhere else, so that a test can say that this is another system.
_is_linux = sys.platform == "linux"

# A thread with this much added to its nice value gets a third of the time of another that competes with it. More would
# also delay the thread that waits for it: Python runs one thread at a time.
_NICER_BY = 5

_SET_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36

# psutil computes the start of a process from the system's clock, which may be set meanwhile.
_TICKS_PER_SEC = 100
_START_DIFFERS_BY = 2 * _TICKS_PER_SEC

# What a file system answers that knows no flush of its drive, such as one on a network.
_NO_FLUSH = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENODEV})

_MOST_PATH_BYTES = 1024
_PS_SECS = 5.0


# --- files -----------------------------------------------------------------------------------------------------------


def flush_drive(descriptor: int) -> None:
    """Make the drive write what an fsync of ``descriptor`` has handed to it, and raise its error.

    The fsync of macOS stops at the drive's cache, and F_FULLFSYNC does the rest; a file system that lacks it gets no
    more than the fsync. Elsewhere the fsync has done so already, and this does nothing.
    """
    command = getattr(fcntl, "F_FULLFSYNC", None)
    if command is None:
        return
    try:
        fcntl.fcntl(descriptor, command)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def path_of(descriptor: int) -> str | None:
    """The path of an open file or directory of this process: on Linux and macOS. ``None`` if there is no knowing."""
    command = getattr(fcntl, "F_GETPATH", None)
    with contextlib.suppress(OSError):
        if command is not None:
            return os.fsdecode(fcntl.fcntl(descriptor, command, bytes(_MOST_PATH_BYTES)).rstrip(b"\0"))
        if _is_linux:
            return os.readlink(f"/proc/self/fd/{descriptor}")
    return None


def place_of(descriptor: int) -> Path:
    """A path that opens the file of ``descriptor`` anew, at its beginning.

    On Linux it does so even after the file has lost its name. On macOS the paths in ``/dev/fd`` share the position with
    the descriptor; so it is the path of the file there, and opening it after a removal raises FileNotFoundError.
    """
    path = None if _is_linux else path_of(descriptor)
    return Path(f"/dev/fd/{descriptor}" if path is None else path)


# --- processes -------------------------------------------------------------------------------------------------------


def yield_to_others() -> None:
    """Lower the priority of the calling thread for the rest of its life. Elsewhere threads have none of their own."""
    if _is_linux:
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICER_BY)


def is_running(pid: int, started: int | None) -> bool:
    """Whether the process ``pid`` of this host still runs, and is the one that was started at ``started``.

    Without ``/proc`` and psutil, any process of that pid counts as running, also one that was started later.
    """
    if pid <= 0:
        return False  # A group of processes, to the system.
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now_started = process_start(pid)
    # A zombie has ended; only its parent has not asked yet.
    if _is_zombie(pid):
        return False
    if started is None or now_started is None:
        return True
    return abs(started - now_started) <= (0 if _is_linux else _START_DIFFERS_BY)


def process_start(pid: int) -> int | None:
    """When a process of this host was started, in ticks: since the boot on Linux, by psutil since 1970 elsewhere.

    ``None`` where the system does not say. Compare the ticks by `is_running`.
    """
    if _is_linux:
        stat = _stat(pid)
        return int(stat[19]) if len(stat) > 19 else None
    started = _asked(pid, lambda process: process.create_time())
    return None if started is None else round(started * _TICKS_PER_SEC)


def _is_zombie(pid: int) -> bool:
    if _is_linux:
        return _stat(pid)[:1] == ["Z"]
    return bool(_asked(pid, lambda process: process.status()) == "zombie")


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has suspended a process of this host. Elsewhere ``ps`` says so, or nobody does."""
    if _is_linux:
        return _stat(pid)[:1] in (["T"], ["t"])
    import subprocess

    try:
        said = subprocess.run(
            ["ps", "-o", "state=", "-p", str(pid)], capture_output=True, timeout=_PS_SECS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return said.stdout.strip()[:1] in (b"T", b"t")


def children_by_parent() -> dict[int, list[int]]:
    """The running processes of this host by the pid of their parent; elsewhere by psutil, or none are known."""
    found: dict[int, list[int]] = {}
    if _is_linux:
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = path.read_bytes().rpartition(b")")[2].split()[:2]
            except (OSError, ValueError):
                continue
            if state not in (b"Z", b"X"):
                found.setdefault(int(parent), []).append(int(path.parent.name))
        return found
    psutil = _psutil()
    for process in () if psutil is None else psutil.process_iter(["ppid", "status"]):
        if process.info["ppid"] is not None and process.info["status"] not in ("zombie", "dead"):
            found.setdefault(process.info["ppid"], []).append(process.pid)
    return found


def with_open(status: os.stat_result) -> list[str]:
    """The processes of this host that have the file of ``status`` open, as far as this user may see: pid and name.

    Elsewhere psutil says so; without it nobody is named.
    """
    return _with_open_by_proc(status) if _is_linux else _with_open_by_psutil(status)


def _with_open_by_proc(status: os.stat_result) -> list[str]:
    found = []
    for process in _listed(Path("/proc")):
        if not process.isdigit():
            continue
        place = Path("/proc") / process / "fd"
        for descriptor in _listed(place):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(place / descriptor), status):
                    found.append(f"{process} ({_name(process)})")
                    break
    return found


def _with_open_by_psutil(status: os.stat_result) -> list[str]:
    psutil = _psutil()
    found = []
    for process in () if psutil is None else psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error, OSError):
            for file in process.open_files():
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.stat(file.path), status):
                        found.append(f"{process.pid} ({process.info['name'] or '?'})")
                        break
    return found


def adopt_orphans() -> bool:
    """Make this process inherit its descendants when their parents end, on Linux; elsewhere that is process 1."""
    if _is_linux:
        return bool(_libc().prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    return False


def end_with_parent(number: int) -> bool:
    """Make the system send ``number`` to this process when its parent ends; on Linux only, elsewhere it gets none.

    In a forked child, call this only if the parent has called `adopt_orphans`: nothing is loaded then.
    """
    if _is_linux:
        return bool(_libc().prctl(_SET_DEATH_SIGNAL, number, 0, 0, 0) == 0)
    return False


def file_size_limits(pid: int) -> tuple[int, int] | None:
    """The soft and the hard limit of the files that a process may write, in bytes; ``None`` if it cannot be read.

    Only Linux gives one process the limits of another.
    """
    import resource

    if hasattr(resource, "prlimit"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            return soft, hard
    return None


def limit_file_sizes(pid: int, limits: tuple[int, int]) -> bool:
    """Set what `file_size_limits` reads; return whether it was set."""
    import resource

    if hasattr(resource, "prlimit"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
            return True
    return False


# --- signals ---------------------------------------------------------------------------------------------------------


def handled_signals(pid: int) -> frozenset[int] | None:
    """The signals that a process of this host catches, ignores or blocks; ``None`` where the system does not say.

    Only Linux says so. A launcher elsewhere believes what the program's heartbeat says.
    """
    masks = (b"SigCgt:", b"SigIgn:", b"SigBlk:")
    try:
        lines = Path(f"/proc/{pid}/status").read_bytes().splitlines() if _is_linux else []
        bits = [int(line.split()[1], 16) for line in lines if line.startswith(masks)]
    except (OSError, ValueError, IndexError):
        return None
    return frozenset(number for number in range(1, 65) for one in bits if one >> (number - 1) & 1) if lines else None


def is_caught(number: int) -> bool | None:
    """Whether this process has a handler for a signal, also one in C, which `signal` does not know.

    Elsewhere the C library is asked. ``None`` if there is no knowing.
    """
    if _is_linux:
        try:
            # Bytes: a decoder may have to be imported, and a process without its user's rights may not reach it.
            with open("/proc/self/status", "rb") as status:
                caught = next(line.split()[1] for line in status if line.startswith(b"SigCgt:"))
        except (OSError, StopIteration):
            return None
        return bool(int(caught, 16) >> (number - 1) & 1)
    import ctypes

    # More than any sigaction has. It begins with the handler: 0 and 1 are the default action and "ignored".
    action = (ctypes.c_size_t * 64)()
    try:
        failed = _libc().sigaction(int(number), None, action)
    except (AttributeError, OSError, TypeError):
        return None
    return None if failed else action[0] not in (0, 1)


def spare_signals() -> list[int]:
    """Signals that programs leave alone, the best first: real-time ones, or those that only macOS and BSD have."""
    if hasattr(signal, "SIGRTMIN"):
        return list(range(signal.SIGRTMAX - 1, signal.SIGRTMIN, -1))
    # SIGEMT comes from no hardware of today, and SIGINFO from Ctrl-T.
    return [int(getattr(signal, name)) for name in ("SIGEMT", "SIGINFO") if hasattr(signal, name)]


def tells_senders() -> bool:
    """Whether a signal that is waited for says which process has sent it; macOS does not."""
    return hasattr(signal, "sigwaitinfo") and hasattr(signal, "sigtimedwait")


def wait_for_signal(numbers: Iterable[int]) -> tuple[int, bool | None]:
    """Wait for one of the signals, which are blocked. Its number, and whether the kernel itself has sent it.

    The latter is ``None`` where the system does not say (see `tells_senders`).
    """
    if tells_senders():
        info = signal.sigwaitinfo(numbers)
        return info.si_signo, info.si_code > 0
    return signal.sigwait(numbers), None


def signal_within(numbers: Iterable[int], secs: float) -> tuple[int, int] | None:
    """The next of the signals, which are blocked, and the pid of its sender; ``None`` if there is none in ``secs``.

    A process that was stopped meanwhile may get a signal that nobody has sent: CPython reads memory that nobody has
    filled. Call this only where `tells_senders`.
    """
    info = signal.sigtimedwait(numbers, secs)
    return None if info is None else (info.si_signo, info.si_pid)


# --- what the functions ask ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None)


def _psutil() -> Any:
    """The module psutil, or ``None`` if it is not installed. Loaded late: most processes never need it."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil


def _asked(pid: int, question: Callable[[Any], Any]) -> Any:
    """What psutil answers about a process; ``None`` if there is no such process, or no answer."""
    psutil = _psutil()
    if psutil is None:
        return None
    try:
        return question(psutil.Process(pid))
    except (psutil.Error, OSError, ValueError, OverflowError):
        return None


def _name(process: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/comm").read_bytes().decode("utf-8", "replace").strip()
    return "?"


def _listed(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _stat(pid: int) -> list[str]:
    """The fields of proc(5)'s stat from the third on: state, parent ..."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes().decode("utf-8", "replace")
    except OSError:
        return []
    # The name, in parentheses, may hold anything.
    return content.rpartition(")")[2].split()
