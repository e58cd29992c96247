"""Signs of life: ``heartbeats/<role>.json`` in the logdir, written anew every two seconds by each process of a run.

A process that is gone leaves its last one behind, which says how far it had come; one that hangs with the interpreter's
lock held, or was stopped, writes no more.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from stepguard import files, schema
from stepguard.processes import is_running, process_start

DIR_NAME = "heartbeats"
INTERVAL_SECS = 2.0
# So long may a heartbeat be late before its process counts as gone or stuck: a busy machine, a slow network disk.
LATE_SECS = 10.0

_MOST_BYTES = 1 << 20
_PHASES = ("preparing", "training", "stopping", "stopped")
_CHECKPOINT: schema.Kinds = {
    "name": (str, NoneType),
    "step": (int, NoneType),
    "time": (float, NoneType),
    "bytes": (int, NoneType),
    "secs": (float, NoneType),
    "stall_secs": (float, NoneType),
}


@dataclass(slots=True)
class Heartbeat:
    """What a process of a run says of itself. Times are Unix seconds; ``None`` is what it does not know.

    ``phase`` is "preparing", "training", "stopping" or "stopped"; ``reason``, of one that has stopped, "finished",
    "sigterm", "interrupt", "exit" or "error". ``boundary_time`` is when it was last seen that a step had ended, and
    ``stacks`` the file with the stacks of a hang that is going on.
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
    # name, step, time, bytes, secs (to write it), stall_secs (that training waited for it)
    last_checkpoint: dict[str, Any] | None = None
    restarts: int = 0
    save_failures: int = 0
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    stacks: str | None = None
    metrics_url: str | None = None


def prepare(logdir: str | os.PathLike[str]) -> None:
    """Make the directory for the heartbeats, and the logdir, once: a logdir that is gone later, with its mount, must
    not be made again on the disk below. Raises OSError.
    """
    files.make_dirs(Path(logdir) / DIR_NAME)


def write(logdir: str | os.PathLike[str], heartbeat: Heartbeat) -> None:
    """Leave a sign of life in a directory that :func:`prepare` has made; also when the logdir was cleared since.

    Raises OSError.
    """
    path = Path(logdir) / DIR_NAME / f"{heartbeat.role}.json"
    heartbeat.time = time.time()
    content = json.dumps(asdict(heartbeat)).encode()
    if Path(logdir).is_dir():
        files.make_own_dir(path.parent)
    files.write_volatile(path, content)


def _pass_over(path: Path, error: OSError) -> None:
    """One that is replaced, or removed, under our eyes is no news."""


def read(
    logdir: str | os.PathLike[str], on_unreadable: Callable[[Path, OSError], None] = _pass_over
) -> list[Heartbeat]:
    """The newest heartbeat of each process that ever ran for this logdir, the chief's first.

    One that is empty, as a power loss leaves it, or damaged, or has fields of other kinds is passed over. So is what
    the system cannot read, and what is no file: ``on_unreadable`` is told.
    """
    place = Path(logdir) / DIR_NAME
    try:
        files.check_own_dir(place)
        names = sorted(os.listdir(place))
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.lexists(place):
            on_unreadable(place, error)
        return []
    except OSError as error:
        on_unreadable(place, error)
        return []
    found = []
    for name in names:
        if name.endswith(".json") and not name.startswith("."):
            try:
                found.append(_heartbeat(files.read_own(place / name, most=_MOST_BYTES), name.removesuffix(".json")))
            except FileNotFoundError:
                pass  # Removed since.
            except OSError as error:
                on_unreadable(place / name, error)
            except ValueError:
                pass
    return sorted(found, key=lambda one: (one.role != "chief", one.role))


def forget_the_gone(logdir: str | os.PathLike[str], role: str) -> None:
    """Remove the heartbeats of processes that have ended, but for those of ``role`` and the chief: a new run begins."""
    for one in read(logdir):
        if one.role not in (role, "chief") and state(one) in ("stopped", "dead"):
            forget(logdir, one.role)


def forget(logdir: str | os.PathLike[str], role: str) -> None:
    """Remove the heartbeat of one role."""
    files.remove_quietly(Path(logdir) / DIR_NAME / f"{role}.json")


def read_one(logdir: str | os.PathLike[str], role: str) -> Heartbeat | None:
    """The newest heartbeat of one role."""
    return next((one for one in read(logdir) if one.role == role), None)


def state(heartbeat: Heartbeat, now: float | None = None) -> str:
    """What is known of the process now: "alive", "stopped", "dead", or "silent".

    "stopped" has said so itself. "dead" was found to be gone, which only its own host can see. "silent" has given no
    sign for longer than ``LATE_SECS``: it hangs, or was stopped by a signal, or its host cannot be reached.
    """
    if heartbeat.phase == "stopped":
        return "stopped"
    if heartbeat.host == socket.gethostname() and not is_running(heartbeat.pid, heartbeat.process_start):
        return "dead"
    age_secs = (time.time() if now is None else now) - heartbeat.time
    return "alive" if age_secs <= LATE_SECS else "silent"


def _heartbeat(content: bytes, role: str) -> Heartbeat:
    found = Heartbeat(**schema.checked(schema.parse(content), schema.kinds_of(Heartbeat), required=("role",)))
    # What is forgotten by its role is the file of that name.
    if found.role != role:
        raise schema.SchemaError(f"role: expected {role!r}, found {found.role!r}")
    if found.phase not in _PHASES:
        raise schema.SchemaError(f"phase: expected one of {_PHASES}, found {found.phase!r}")
    if not all(isinstance(one, str) for one in found.warnings):
        raise schema.SchemaError("warnings: expected texts")
    if found.last_checkpoint is not None:
        found.last_checkpoint = schema.checked(found.last_checkpoint, _CHECKPOINT)
    return found
