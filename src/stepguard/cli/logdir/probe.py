"""Whether the run on this host lives, by the age of its heartbeats: for probes, which ask often and want it quickly."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from stepguard.watching import heartbeat
from stepguard.watching.heartbeat import Heartbeat
from stepguard.words import printable


@dataclass(frozen=True, slots=True)
class Probed:
    """The answer to a probe, with a line for the log of whoever probes. ``is_well`` is None without a heartbeat."""

    is_well: bool | None
    text: str


def probed(logdir: Path) -> Probed:
    """Probe the processes of this host, or those of all hosts if none of this one has ever written a heartbeat.

    A process is well if its last heartbeat is young enough and it does not hang, or if it has stopped without an error.
    One that has ended otherwise is well too as long as `stepguard run` lives on this host, which will start it again.
    Reads no checkpoint, and the ledger only in that case. Raises OSError if the logdir cannot be read.
    """
    beats = heartbeat.read(logdir)
    here = [one for one in beats if one.host == socket.gethostname()] or beats
    chief = next((one for one in here if one.role == "chief"), None)
    # What an earlier start has left behind does not count.
    present = [
        one
        for one in here
        if chief is None or one is chief or one.time >= chief.started or heartbeat.state(one) == "alive"
    ]
    if not present:
        return Probed(None, "no heartbeat yet")
    for one in present:
        state = heartbeat.state(one)
        if state == "alive" and one.stacks is None:
            continue
        if state == "stopped" and one.reason != "error":
            continue
        if state in ("dead", "stopped") and _is_launched(logdir):
            continue
        return Probed(False, _line(one, "hangs" if state == "alive" else state))
    return Probed(True, _line(present[0], heartbeat.state(present[0])))


def _is_launched(logdir: Path) -> bool:
    from stepguard.cli.logdir.launcher_state import launcher_of
    from stepguard.watching import ledger

    launcher = launcher_of(ledger.read(logdir))
    return launcher is not None and launcher.state in ("running", "waiting") and launcher.host == socket.gethostname()


def _line(one: Heartbeat, state: str) -> str:
    why = f": {printable(one.reason or 'unknown')}" if state == "stopped" else ""
    return f"{printable(one.role)} {state}{why}, step {'unknown' if one.step is None else one.step}"
