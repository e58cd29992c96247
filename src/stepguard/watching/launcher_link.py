"""How `stepguard run` and the programs that it starts communicate: through two environment variables.

``STEPGUARD_ATTEMPT`` is the number of the start, from 1. ``STEPGUARD_LAUNCHER_DIR`` is a directory of the launcher, in
which each process of a run leaves the name of its logdir, so that the launcher finds ledger, heartbeats and
checkpoints, and the signals at which it stops. A program in between, such as torchrun or a script, passes the variables
on without knowing them.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from stepguard.disk import files

ATTEMPT = "STEPGUARD_ATTEMPT"
LAUNCHER_DIR = "STEPGUARD_LAUNCHER_DIR"

_SUFFIX = ".logdir"
_SIGNALS_SUFFIX = ".signals"


def attempt() -> int | None:
    """The number of this start, from 1; ``None`` if no launcher started this process."""
    given = os.environ.get(ATTEMPT, "")
    return int(given) if given.isascii() and given.isdigit() else None


def announce(logdir: str | os.PathLike[str]) -> None:
    """Tell the launcher, if there is one, the logdir of this process. Does nothing if the launcher has ended."""
    _leave(_SUFFIX, os.fsencode(os.path.abspath(logdir)))


def answers(signals: Iterable[signal.Signals]) -> None:
    """Tell the launcher, if there is one, the signals at which this process stops from now on, saving its last step."""
    _leave(_SIGNALS_SUFFIX, " ".join(one.name for one in signals).encode())


def answered(directory: Path, pid: int) -> list[signal.Signals]:
    """The signals at which a process stops, in its order; empty if it has named none."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        names = files.read_bytes(directory / f"{pid}{_SIGNALS_SUFFIX}").decode("ascii").split()
        return [signal.Signals[name] for name in names]
    return []


def _leave(suffix: str, content: bytes) -> None:
    directory = os.environ.get(LAUNCHER_DIR)
    if directory:
        with contextlib.suppress(OSError):
            files.write_volatile(Path(directory) / f"{os.getpid()}{suffix}", content)


def announced(directory: Path) -> list[Path]:
    """The logdirs that processes have announced so far, sorted, without duplicates."""
    found = set()
    for path in directory.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            found.add(Path(os.fsdecode(files.read_bytes(path))))
    return sorted(found)
