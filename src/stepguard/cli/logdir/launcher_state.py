"""The state of the newest `stepguard run` of a logdir, by its lines in the ledger."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stepguard.disk import system
from stepguard.watching.history import LAUNCHER


@dataclass(frozen=True, slots=True)
class Launcher:
    """The newest `stepguard run` of the logdir: "running", "waiting" (until ``next_start``), "gave up" or "ended".

    One that gave up has "ended" once the program was started without it.
    """

    pid: int | None
    host: str | None
    state: str
    next_start: float | None
    reason: str | None
    failure: str | None


def launcher_of(events: Sequence[Mapping[str, Any]]) -> Launcher | None:
    """The state of the launcher, by its lines in the ledger; None if there are none."""
    own = [one for one in events if one.get("role") == LAUNCHER]
    launches = [one for one in own if one["event"] == "launch"]
    if not launches:
        return None
    launch, last = launches[-1], own[-1]
    pid, host = launch.get("pid"), launch.get("host")
    found = Launcher(pid, host, "ended", None, last.get("reason"), last.get("failure"))
    if last["event"] == "gave_up":
        since = events[events.index(last) :]
        was_started_again = any(one["event"] == "start" for one in since)
        return found if was_started_again else replace(found, state="gave up")
    is_here = host == socket.gethostname() and isinstance(pid, int)
    if is_here and not system.is_running(int(pid or 0), launch.get("process_start")):
        return found
    if last["event"] == "restart" and isinstance(last.get("delay_secs"), (int, float)):
        return replace(found, state="waiting", next_start=last["time"] + last["delay_secs"])
    return replace(found, state="running") if last["event"] == "launch" else found
