"""Heartbeats: each process of a run rewrites ``heartbeats/<role>.json`` in the logdir every two seconds.

A dead process leaves its last heartbeat behind, which says how far the process had come. A process that hangs with the
GIL held, or is suspended, writes no heartbeats.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from stepguard import files

DIR_NAME = "heartbeats"
INTERVAL_SECS = 2.0
# How late a heartbeat may be before its process counts as silent: machines may be busy, and network disks slow.
LATE_SECS = 10.0


@dataclass(slots=True)
class Heartbeat:
    """The state that a process of a run reports. Times are Unix seconds; ``None`` means unknown.

    ``phase`` is "preparing", "training", "stopping" or "stopped". The ``reason`` of a stopped process is "finished",
    "sigterm", "interrupt", "request_stop", "exit" or "error". ``boundary_time`` is when the end of a step was last
    seen. ``stacks`` is the file with the stacks of a hang that still lasts.
    """

    role: str
    engine: str = ""
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    process_start: int | None = field(default_factory=lambda: process_start(os.getpid()))
    started: float = field(default_factory=time.time)
    time: float = 0.0
    phase: str = "preparing"
    reason: str | None = None
    first_step: int | None = None
    step: int | None = None
    total_steps: int | None = None
    steps_per_sec: float | None = None
    boundary_time: float | None = None
    # name, step, time, bytes, secs (of the write), stall_secs (for which training waited)
    last_checkpoint: dict[str, Any] | None = None
    restarts: int = 0
    save_failures: int = 0
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    stacks: str | None = None
    metrics_url: str | None = None


def prepare(logdir: str | os.PathLike[str]) -> None:
    """Make the logdir and its directory of heartbeats, once. Raises OSError.

    If the file system of the logdir is unmounted later, nothing may make the logdir again on the disk below.
    """
    files.make_dirs(Path(logdir) / DIR_NAME)


def write(logdir: str | os.PathLike[str], heartbeat: Heartbeat) -> None:
    """Write ``heartbeat`` into the directory that :func:`prepare` has made. Raises OSError.

    If the logdir was cleared meanwhile, the directory of heartbeats is made again.
    """
    path = Path(logdir) / DIR_NAME / f"{heartbeat.role}.json"
    heartbeat.time = time.time()
    content = json.dumps(asdict(heartbeat)).encode()
    try:
        files.write_volatile(path, content)
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):
            files.make_dir(path.parent)
        files.write_volatile(path, content)


def read(logdir: str | os.PathLike[str]) -> list[Heartbeat]:
    """The last heartbeat of each process that ran for this logdir, the chief's first.

    A heartbeat that is damaged, has fields of wrong types, or is empty (after a power loss) is skipped.
    """
    try:
        names = sorted(os.listdir(Path(logdir) / DIR_NAME))
    except (FileNotFoundError, NotADirectoryError):
        return []
    paths = [Path(logdir) / DIR_NAME / name for name in names if name.endswith(".json") and not name.startswith(".")]
    found = [one for path in paths if (one := _read_file(path)) is not None]
    return sorted(found, key=lambda one: (one.role != "chief", one.role))


def _read_file(path: Path) -> Heartbeat | None:
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        return _heartbeat(json.loads(files.read_bytes(path)))
    return None


def forget_the_gone(logdir: str | os.PathLike[str], role: str) -> None:
    """At the start of a run, remove the heartbeats of ended processes, except those of ``role`` and the chief."""
    for one in read(logdir):
        if one.role not in (role, "chief") and state(one) in ("stopped", "dead"):
            forget(logdir, one.role)


def forget(logdir: str | os.PathLike[str], role: str) -> None:
    """Remove the heartbeat of one role."""
    files.remove_quietly(Path(logdir) / DIR_NAME / f"{role}.json")


def read_one(logdir: str | os.PathLike[str], role: str) -> Heartbeat | None:
    """The last heartbeat of one role; ``None`` if it is missing or damaged.

    Only that file is read, because each of a thousand processes asks for its own at its start.
    """
    found = _read_file(Path(logdir) / DIR_NAME / f"{role}.json")
    return found if found is not None and found.role == role else None


def state(heartbeat: Heartbeat, now: float | None = None) -> str:
    """The state of the process now: "alive", "stopped", "dead", or "silent".

    A "stopped" process has reported that itself. A "dead" process no longer exists, which only its own host can see. A
    "silent" process has written no heartbeat for longer than ``LATE_SECS``: it hangs, a signal has suspended it, or its
    host cannot be reached.
    """
    if heartbeat.phase == "stopped":
        return "stopped"
    if heartbeat.host == socket.gethostname() and not is_running(heartbeat.pid, heartbeat.process_start):
        return "dead"
    age_secs = (time.time() if now is None else now) - heartbeat.time
    return "alive" if age_secs <= LATE_SECS else "silent"


def is_running(pid: int, started: int | None) -> bool:
    """Whether the process ``pid`` of this host still runs and is the process that was started at ``started``."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now_started = process_start(pid)
    # A zombie has ended; its parent has only not collected it yet.
    if _stat(pid)[:1] == ["Z"]:
        return False
    return started is None or now_started is None or started == now_started


def process_start(pid: int) -> int | None:
    """The start of a process of this host, in clock ticks since boot; ``None`` if the system does not tell."""
    stat = _stat(pid)
    return int(stat[19]) if len(stat) > 19 else None


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/<pid>/stat``, see proc(5), from the third on: state, parent ..."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes().decode("utf-8", "replace")
    except OSError:
        return []
    # Skip the name, which is in parentheses and may contain anything.
    return content.rpartition(")")[2].split()


def _heartbeat(content: Any) -> Heartbeat:
    if not isinstance(content, Mapping):
        raise TypeError(f"expected an object, found {type(content).__name__}")
    types = _field_types()
    known = {name: value for name, value in content.items() if name in types}
    for name, value in known.items():
        if not _is_of(value, types[name]):
            raise TypeError(f"{name}: found {type(value).__name__}")
    return Heartbeat(**known)


@functools.cache
def _field_types() -> dict[str, tuple[type, ...]]:
    """The types that JSON may have for each field."""
    found = {}
    for name, hint in get_type_hints(Heartbeat).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        accepted = {get_origin(one) or one for one in kinds}
        found[name] = tuple(accepted | {int} if float in accepted else accepted)
    return found


def _is_of(value: object, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool) or not isinstance(value, types):
        return False
    if isinstance(value, list):
        return all(isinstance(one, str) for one in value)
    # Code adds and formats times, so refuse an infinite number and one that does not fit a float.
    return not (float in types and isinstance(value, (int, float))) or _is_finite(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
