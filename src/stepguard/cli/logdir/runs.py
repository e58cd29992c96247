"""The logdirs below a directory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from stepguard.cli.logdir.contents import basenames
from stepguard.store import statefile
from stepguard.watching import heartbeat, ledger
from stepguard.words import printable

_DEEPEST = 6
_MOST_NAMED = 5
_OF_A_RUN = frozenset({ledger.FILE_NAME, heartbeat.DIR_NAME, statefile.FILE_NAME})


def below(path: Path) -> Iterator[Path]:
    """Yield ``path`` if it is a logdir, and else the logdirs below it, by name. Raises OSError if it is unreadable.

    What lies in a logdir is not searched, nor what begins with a dot; links to directories are followed once.
    """
    yield from _below(path, os.listdir(path), _DEEPEST, set())


def are_many(paths: Sequence[Path]) -> bool:
    """Whether more than one run is meant: by several paths, or by a directory with runs below it. Raises OSError."""
    return len(paths) != 1 or list(below(paths[0])) not in ([paths[0]], [])


def meant(paths: Sequence[Path]) -> list[Path]:
    """The logdirs in or below some paths, each once; a path without any stands for itself. Raises OSError."""
    return list(dict.fromkeys(logdir for path in paths for logdir in (list(below(path)) or [path])))


def elsewhere(path: Path) -> str:
    """What to say besides that there is no run in ``path``: the runs below it, for a command that takes one of them."""
    try:
        found = [str(one) for one in below(path) if one != path]
    except OSError:
        return ""  # The command itself says what it could not read.
    if not found:
        return ""
    named = printable(", ".join(found[:_MOST_NAMED]))
    more = f", and {len(found) - _MOST_NAMED:,} more" if len(found) > _MOST_NAMED else ""
    return f"; there are runs below it, of which this command takes one: {named}{more}"


def _below(path: Path, names: list[str], deepest: int, seen: set[tuple[int, int]]) -> Iterator[Path]:
    if _is_run(names):
        yield path
        return
    for name in sorted(names) if deepest else ():
        inner = path / name
        if name.startswith("."):
            continue
        try:
            status = inner.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            inner_names = os.listdir(inner)
        except OSError:
            continue  # It is no directory, or may not be read.
        yield from _below(inner, inner_names, deepest - 1, seen)


def _is_run(names: list[str]) -> bool:
    """Whether something has run in a directory with these names: a ledger, heartbeats, a state file, a checkpoint."""
    return not _OF_A_RUN.isdisjoint(names) or bool(basenames(names))
