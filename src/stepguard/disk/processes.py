"""Processes of this machine: whether one still runs, and who has a file open. Less is known without ``/proc``."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path

# A thread with this much added to its nice value gets a third of the time of another that competes with it. More would
# also delay the thread that waits for it: Python runs one thread at a time.
_NICER_BY = 5


def yield_to_others() -> None:
    """Lower the priority of the calling thread for the rest of its life. Only on Linux are there such threads."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICER_BY)


def is_running(pid: int, started: int | None) -> bool:
    """Whether the process ``pid`` of this host still runs, and is the one that was started at ``started``."""
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
    if _stat(pid)[:1] == ["Z"]:
        return False
    return started is None or now_started is None or started == now_started


def process_start(pid: int) -> int | None:
    """When a process of this host was started, in ticks since the boot; ``None`` where the system does not say."""
    stat = _stat(pid)
    return int(stat[19]) if len(stat) > 19 else None


def handled_signals(pid: int) -> frozenset[int] | None:
    """The signals that a process of this host catches, ignores or blocks; ``None`` where the system does not say."""
    masks = (b"SigCgt:", b"SigIgn:", b"SigBlk:")
    try:
        lines = Path(f"/proc/{pid}/status").read_bytes().splitlines()
        bits = [int(line.split()[1], 16) for line in lines if line.startswith(masks)]
    except (OSError, ValueError, IndexError):
        return None
    return frozenset(number for number in range(1, 65) for one in bits if one >> (number - 1) & 1)


def with_open(status: os.stat_result) -> list[str]:
    """The processes of this host that have the file of ``status`` open, as far as this user may see: pid and name."""
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
