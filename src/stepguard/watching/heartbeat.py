"""Heartbeats: each process of a run rewrites ``heartbeats/<role>.json`` in the logdir every two seconds.

A dead process leaves its last heartbeat behind, which says how far the process had come. A process that hangs with the
GIL held, or is suspended, writes no heartbeats.
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

from stepguard.disk import files, schema
from stepguard.disk.system import is_running, process_start
from stepguard.watching.outcome import Outcome

DIR_NAME = "heartbeats"
INTERVAL_SECS = 2.0
# How late a heartbeat may be before its process counts as silent: machines may be busy, and network disks slow.
LATE_SECS = 10.0

_MOST_BYTES = 1 << 20
_PHASES = ("preparing", "training", "stopping", "stopped")
_CADENCE: schema.Kinds = {
    "overhead": (float,),
    "interval_secs": (float,),
    "cost": (float,),
    "bytes_per_day": (float,),
}
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
    """The state that a process of a run reports. Times are Unix seconds; ``None`` means unknown.

    ``phase`` is "preparing", "training", "stopping" or "stopped". The ``reason`` of a stopped process is "finished",
    "exit", "error" or one of `stops.REQUESTS`; ``exit_code`` is what the program has chosen for it. ``boundary_time``
    is when the end of a step was last seen. ``stacks`` is the file with the stacks of a hang that still lasts.
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
    exit_code: int | None = None
    first_step: int | None = None
    step: int | None = None
    total_steps: int | None = None
    steps_per_sec: float | None = None
    boundary_time: float | None = None
    # name, step, time, bytes, secs (of the write), stall_secs (for which training waited)
    last_checkpoint: dict[str, Any] | None = None
    # overhead (the part of the time that is allowed), interval_secs, cost (the part of it that was measured),
    # bytes_per_day: see stepguard.saving.cadence.CadenceReport
    cadence: dict[str, Any] | None = None
    # step, to_step, outcome, compared, differs_at, cause, message: see stepguard.watching.outcome.Outcome
    replay: dict[str, Any] | None = None
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
    paths = [place / name for name in names if name.endswith(".json") and not name.startswith(".")]
    found = [one for path in paths if (one := _read_file(path, on_unreadable)) is not None]
    return sorted(found, key=lambda one: (one.role != "chief", one.role))


def _read_file(path: Path, on_unreadable: Callable[[Path, OSError], None] = _pass_over) -> Heartbeat | None:
    try:
        return _heartbeat(files.read_own(path, most=_MOST_BYTES), path.name.removesuffix(".json"))
    except FileNotFoundError:
        return None
    except OSError as error:
        on_unreadable(path, error)
    except ValueError:
        pass  # Damaged.
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


def _heartbeat(content: bytes, role: str) -> Heartbeat:
    found = Heartbeat(**schema.checked(schema.parse(content), schema.kinds_of(Heartbeat), required=("role",)))
    # What is forgotten by its role is the file of that name.
    if found.role != role:
        raise schema.SchemaError(f"role: expected {role!r}, found {found.role!r}")
    if found.phase not in _PHASES:
        raise schema.SchemaError(f"phase: expected one of {_PHASES}, found {found.phase!r}")
    if not all(isinstance(one, str) for one in found.warnings):
        raise schema.SchemaError("warnings: expected texts")
    if found.replay is not None:
        found.replay = schema.checked(found.replay, schema.kinds_of(Outcome), required=("outcome", "message"))
    if found.cadence is not None:
        found.cadence = schema.checked(found.cadence, _CADENCE, required=tuple(_CADENCE))
    if found.last_checkpoint is not None:
        found.last_checkpoint = schema.checked(found.last_checkpoint, _CHECKPOINT)
    return found
